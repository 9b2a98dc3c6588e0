// Global memory and the shared memory of a thread block, and what is watched in them. Accesses have a time, which every
// barrier moves on: two are ordered if a barrier of both threads lies between them.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "module.h"

namespace ptx {

// What an access was found to do wrong; null for nothing. One is enough for a report.
using Finding = const char*;

// Ranges that kernels may use, for all launches of a call.
class Memory {
 public:
  // fresh: nobody has written it yet.
  void add(uint64_t begin, uint64_t end, bool fresh);

  // A launch begins; blocks of it are numbered from the result on.
  uint32_t launch(int64_t blocks);
  void enter_block(uint32_t block);

  // `memory` becomes where the bytes are, null where there are none.
  Finding access(uint64_t address, int bytes, bool writes, bool atomic, uint8_t** memory);

  // Bytes that the launch has touched so far.
  int64_t touched() const { return touched_ * int64_t(kGrain); }

  // An atomic of this block: what blocks did before a release is ordered before what others do after an acquire of the
  // same word. A fence makes acquires of the atomics before it and releases of those behind it.
  void synchronise(uint64_t address, bool acquire, bool release);
  void fence();

 private:
  static constexpr uint64_t kGrain = 2;                    // bytes that are watched together
  static constexpr uint32_t kSeveral = uint32_t(1) << 31;  // with the last of them
  struct Word {
    uint32_t writer = 0, reader = 0;  // blocks; 0: none
  };
  struct Range {
    uint64_t begin, end;
    std::unique_ptr<Word[]> words;
    std::vector<bool> written;  // empty where all of it is
  };

  Range* find(uint64_t address, uint64_t bytes);
  bool ordered(uint32_t block) const;

  std::map<uint64_t, Range> ranges_;  // by their ends
  Range* last_ = nullptr;
  uint32_t next_block_ = 1, first_block_ = 1, block_ = 0;
  std::map<uint64_t, std::vector<uint32_t>> released_;  // by address
  std::vector<uint32_t> before_, seen_;                 // blocks that came before this one; that a fence will order
  bool fenced_ = false;
  int64_t touched_ = 0;
};

class Shared {
 public:
  Shared(int64_t bytes, bool narrow);

  void enter_block();
  void barrier() { block_since_ = ++clock_; }
  // The time of a barrier of one warp.
  uint32_t warp_barrier() { return ++clock_; }

  int64_t size() const { return int64_t(bytes_.size()); }
  uint8_t* at(uint64_t address) { return &bytes_[address]; }

  // warp_since: of the last barrier of the thread's warp.
  Finding access(uint64_t address, int bytes, bool writes, int thread, uint32_t warp_since);
  // A copy by cp.async that has begun, that has arrived, and that nobody has waited for.
  void pend(uint64_t address, int bytes);
  void arrive(uint64_t address, int bytes, const uint8_t* data, int thread);
  void drop(uint64_t address, int bytes);

 private:
  struct Word {
    uint32_t write_time = 0, read_time = 0;
    uint16_t writer = 0, reader = 0;
    bool several = false, several_warps = false, pending = false;
  };

  template <class F>
  void each_word(uint64_t address, int bytes, const F& f) {
    for (uint64_t at = address >> shift_; at <= (address + uint64_t(bytes) - 1) >> shift_; ++at) f(words_[at]);
  }

  std::vector<uint8_t> bytes_;
  std::vector<Word> words_;
  int shift_;  // log2 of the bytes that are watched together
  uint32_t clock_ = 1, block_start_ = 1, block_since_ = 1;
};

}  // namespace ptx
