#include "memory.h"

#include <algorithm>
#include <cstring>

namespace ptx {

// --- global memory -------------------------------------------------------------------------------

void Memory::add(uint64_t begin, uint64_t end, bool fresh) {
  if (begin == end) return;
  const auto found = ranges_.find(end);
  if (found != ranges_.end() && found->second.begin == begin && !fresh) return;
  Range& range = ranges_[end];
  range.begin = begin;
  range.end = end;
  range.words = std::make_unique<Word[]>((end - begin + kGrain - 1) / kGrain);
  range.written.assign(fresh ? (end - begin + kGrain - 1) / kGrain : 0, false);
}

uint32_t Memory::launch(int64_t blocks) {
  first_block_ = next_block_;
  next_block_ += uint32_t(blocks);
  released_.clear();
  touched_ = 0;
  return first_block_;
}

void Memory::enter_block(uint32_t block) {
  block_ = block;
  before_.clear();
  seen_.clear();
  fenced_ = false;
}

Memory::Range* Memory::find(uint64_t address, uint64_t bytes) {
  if (last_ && address >= last_->begin && address + bytes <= last_->end) return last_;
  const auto found = ranges_.upper_bound(address);
  if (found == ranges_.end() || address < found->second.begin || address + bytes > found->second.end) return nullptr;
  return last_ = &found->second;
}

bool Memory::ordered(uint32_t block) const { return std::binary_search(before_.begin(), before_.end(), block); }

Finding Memory::access(uint64_t address, int bytes, bool writes, bool atomic, uint8_t** memory) {
  *memory = nullptr;
  if (address % uint64_t(bytes)) return "misaligned global access";
  Range* range = find(address, uint64_t(bytes));
  if (!range) return "global access outside of the tensors";
  *memory = reinterpret_cast<uint8_t*>(address);
  const uint64_t first = (address - range->begin) / kGrain;
  const uint64_t last = (address - range->begin + uint64_t(bytes) - 1) / kGrain;
  // Blocks of this launch other than this one, and ordered neither.
  auto unordered = [&](uint32_t other) { return other >= first_block_ && other != block_ && !ordered(other); };
  bool race = false, unwritten = false;
  for (uint64_t at = first; at <= last; ++at) {
    Word& word = range->words[at];
    if (!range->written.empty()) {
      if (writes) {
        range->written[at] = true;
      } else {
        unwritten |= !range->written[at];
      }
    }
    const uint32_t reader = word.reader & ~kSeveral;
    const bool several = reader >= first_block_ && (word.reader & kSeveral);
    touched_ += word.writer < first_block_ && reader < first_block_;
    if (atomic) {  // which are ordered among themselves
      word.reader = several ? block_ | kSeveral : block_;
      continue;
    }
    if (word.writer != block_) race |= unordered(word.writer);
    if (writes) {
      race |= several || unordered(reader);
      word.writer = block_;
    } else {
      word.reader = several || (reader >= first_block_ && reader != block_) ? block_ | kSeveral : block_;
    }
  }
  if (race) return "race in global memory between blocks";
  if (unwritten) return "uninitialised global memory read";
  return nullptr;
}

void Memory::synchronise(uint64_t address, bool acquire, bool release) {
  std::vector<uint32_t>& blocks = released_[address];
  std::vector<uint32_t>& to = acquire ? before_ : seen_;
  to.insert(to.end(), blocks.begin(), blocks.end());
  std::sort(to.begin(), to.end());
  if ((release || fenced_) && (blocks.empty() || blocks.back() != block_)) blocks.push_back(block_);
}

void Memory::fence() {
  fenced_ = true;
  before_.insert(before_.end(), seen_.begin(), seen_.end());
  std::sort(before_.begin(), before_.end());
  seen_.clear();
}

// --- shared memory -------------------------------------------------------------------------------

Shared::Shared(int64_t bytes, bool narrow) : bytes_(size_t(bytes)), shift_(narrow ? 1 : 2) {
  words_.resize(size_t(bytes >> shift_) + 1);
}

void Shared::enter_block() {
  block_start_ = block_since_ = ++clock_;
  std::fill(bytes_.begin(), bytes_.end(), uint8_t(0xff));  // NaN, if it is read
}

Finding Shared::access(uint64_t address, int bytes, bool writes, int thread, uint32_t warp_since) {
  if (address % uint64_t(bytes)) return "misaligned shared access";
  if (address + uint64_t(bytes) > bytes_.size()) return "access outside of shared memory";
  bool race = false, unwritten = false, early = false;
  auto same_warp = [&](int other) { return other / kLanes == thread / kLanes; };
  // Whether nothing orders this access behind the one of another thread at a time.
  auto unordered = [&](int other, uint32_t time) {
    return other != thread && time >= (same_warp(other) ? std::max(warp_since, block_since_) : block_since_);
  };
  each_word(address, bytes, [&](Word& word) {
    const bool was_written = word.write_time >= block_start_;
    if (word.write_time >= block_since_) race |= unordered(word.writer, word.write_time);
    early |= word.pending;
    if (writes) {
      if (word.read_time >= block_since_) {
        race |= unordered(word.reader, word.read_time) || (word.several && word.several_warps) ||
                (word.several && word.read_time >= warp_since);
      }
      word.writer = uint16_t(thread);
      word.write_time = clock_;
      return;
    }
    unwritten |= !was_written && !word.pending;
    const bool first_reader = word.read_time < block_since_;
    if (first_reader) word.several = word.several_warps = false;
    if (!first_reader && word.reader != thread) {
      word.several_warps |= !same_warp(word.reader);
      word.several = word.several_warps || word.read_time >= warp_since;
    }
    word.reader = uint16_t(thread);
    word.read_time = clock_;
  });
  if (early) return "shared memory accessed before the wait for its copy";
  if (unwritten) return "uninitialised shared memory read";
  return race ? "race in shared memory" : nullptr;
}

void Shared::pend(uint64_t address, int bytes) {
  each_word(address, bytes, [](Word& word) { word.pending = true; });
}

void Shared::drop(uint64_t address, int bytes) {
  each_word(address, bytes, [](Word& word) { word.pending = false; });
}

void Shared::arrive(uint64_t address, int bytes, const uint8_t* data, int thread) {
  std::memcpy(&bytes_[address], data, size_t(bytes));
  drop(address, bytes);
  each_word(address, bytes, [&](Word& word) {
    word.writer = uint16_t(thread);
    word.write_time = clock_;
  });
}

}  // namespace ptx
