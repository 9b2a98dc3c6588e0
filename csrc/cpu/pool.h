// Buffers of the CPU operators, kept from call to call: fresh pages cost as much as the kernels that
// write them.
#pragma once

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <utility>
#include <vector>

namespace mfef::cpu {

// Set by tests: every buffer is filled with NaN when it is taken, so that an element that is read before it
// is written shows.
inline std::atomic<bool> poison_buffers{false};

// One pool per thread; at most kKept bytes stay in it between calls.
class Pool {
 public:
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  struct Piece {
    std::unique_ptr<void, Free> memory;
    int64_t size = 0;
  };

  // A buffer of at least `bytes`, aligned to a cache line; without memory if there is none.
  Piece take(int64_t bytes) {
    Piece piece = find(bytes);
    if (piece.memory && poison_buffers) std::memset(piece.memory.get(), 0xff, size_t(piece.size));
    return piece;
  }

  void give(Piece piece) {
    if (piece.size > kKept || !piece.memory) return;
    while (kept_ + piece.size > kKept) {  // the oldest go first
      kept_ -= pieces_.front().size;
      pieces_.erase(pieces_.begin());
    }
    try {  // worker threads call this, which no exception may leave
      pieces_.push_back(std::move(piece));
      kept_ += pieces_.back().size;
    } catch (const std::bad_alloc&) {
      // push_back() has left the piece where it was: it is freed
    }
  }

 private:
  static constexpr int64_t kKept = int64_t(64) << 20;

  Piece find(int64_t bytes) {
    bytes = (bytes > 0 ? bytes : 1) + 63;
    bytes -= bytes % 64;
    size_t best = pieces_.size();
    for (size_t i = 0; i < pieces_.size(); ++i) {
      const bool fits = pieces_[i].size >= bytes && pieces_[i].size <= 2 * bytes + 4096;
      if (fits && (best == pieces_.size() || pieces_[i].size < pieces_[best].size)) best = i;
    }
    Piece piece;
    if (best == pieces_.size()) {
      piece.memory.reset(std::aligned_alloc(64, size_t(bytes)));
      piece.size = bytes;
    } else {
      piece = std::move(pieces_[best]);
      pieces_.erase(pieces_.begin() + std::ptrdiff_t(best));
      kept_ -= piece.size;
    }
    return piece;
  }

  std::vector<Piece> pieces_;
  int64_t kept_ = 0;
};

inline thread_local Pool pool;

}  // namespace mfef::cpu
