// What a launch does, as a profiler would count it: instructions of warps by class, sectors of global memory,
// wavefronts of shared memory.
#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <cstdint>

#include "module.h"

namespace ptx {

enum class Class { floating, integer, convert, tensor, global, shared, parameter, control, other };
constexpr int kClasses = int(Class::other) + 1;

inline Class class_of(const Instruction& i) {
  const bool floating = i.type.kind == 'f' || i.type.kind == 'h';
  switch (i.op) {
    case Op::mma:
    case Op::ldmatrix:
      return Class::tensor;
    case Op::ld:
    case Op::st:
      return i.space == Space::param ? Class::parameter : i.space == Space::shared ? Class::shared : Class::global;
    case Op::atom:
    case Op::red:
    case Op::cp_async:
      return Class::global;
    case Op::bra:
    case Op::ret:
    case Op::bar:
    case Op::bar_warp:
    case Op::setp:
      return Class::control;
    case Op::cvt:
    case Op::cvta:
    case Op::mov:
    case Op::selp:
      return Class::convert;
    default:
      return i.op > Op::rsqrt ? Class::other : floating ? Class::floating : Class::integer;
  }
}

struct Counts {
  std::array<int64_t, kClasses> instructions{};
  int64_t lanes = 0;                              // that were active, over all instructions
  int64_t barriers = 0;                           // of thread blocks
  int64_t sectors = 0;                            // of 32 bytes, that warps asked of global memory
  int64_t unique = 0;                             // bytes of global memory that were touched
  int64_t shared_passes = 0, shared_replays = 0;  // of shared memory: without bank conflicts, and what these add
};

// The addresses of a warp's access.
struct Access {
  int lanes = 0;
  std::array<uint64_t, kLanes> address;

  void add(uint64_t at) { address[size_t(lanes++)] = at; }

  // Sectors of 32 bytes; an element lies in one.
  int sectors() const {
    std::array<uint64_t, kLanes> all = address;
    for (int lane = 0; lane < lanes; ++lane) all[size_t(lane)] /= 32;
    std::sort(all.begin(), all.begin() + lanes);
    return int(std::unique(all.begin(), all.begin() + lanes) - all.begin());
  }

  // Elements of 4 bytes and less take one pass, of 8 two, of 16 four. A pass takes as many wavefronts as there are
  // different words in one bank.
  void shared(int bytes, Counts& counts) const {
    const int per_pass = bytes <= 4 ? kLanes : kLanes * 4 / bytes, words = std::max(bytes / 4, 1);
    for (int first = 0; first < lanes; first += per_pass) {
      std::array<uint64_t, kLanes> all;
      int count = 0;
      for (int lane = first; lane < std::min(first + per_pass, lanes); ++lane) {
        for (int word = 0; word < words; ++word) all[size_t(count++)] = address[size_t(lane)] / 4 + uint64_t(word);
      }
      std::sort(all.begin(), all.begin() + count);
      count = int(std::unique(all.begin(), all.begin() + count) - all.begin());
      std::array<int, 32> of_bank{};
      for (int n = 0; n < count; ++n) ++of_bank[all[size_t(n)] % 32];
      counts.shared_passes += 1;
      counts.shared_replays += *std::max_element(of_bank.begin(), of_bank.end()) - 1;
    }
  }
};

}  // namespace ptx
