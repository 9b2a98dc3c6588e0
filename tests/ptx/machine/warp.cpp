// Thread blocks of a launch, one after the other: their warps, each from barrier to barrier.
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <numeric>

#include "count.h"
#include "halves.h"
#include "memory.h"
#include "module.h"

namespace ptx {
namespace {

constexpr size_t kMaxReports = 64;
constexpr uint32_t kAll = ~uint32_t(0);

struct Dim {
  uint32_t x, y, z;
};

// A copy of cp.async that has not arrived.
struct Copy {
  int lane, group;
  uint64_t to;
  int size;
  uint8_t bytes[16];
};

struct Warp {
  int index = 0;
  uint32_t live = 0, since = 0;  // the lanes that have not returned; the time of the last barrier
  bool waiting = false;
  std::array<int, kLanes> pc{};
  std::array<int, kLanes> group{};  // of cp.async, that each lane has open
  std::vector<Register> registers;
  std::vector<Copy> copies;
};

// How tensor cores add products; nothing about it is specified. kAligned is what measurements found of an A100 (Fasi et
// al. 2021, Khattak and Mikaitis 2025): the sum and 8 products, 4 in TF32, are cut towards zero one place below the
// last of the largest of them, added, and cut to float32. kTruncated cuts after every product, which is worse than any
// hardware known.
enum class Adding : int { kNearest = 0, kAligned = 1, kTruncated = 2 };
Adding adding = Adding::kNearest;
bool counting = false;  // sectors and bank conflicts, which takes time
Counts last_counts;

float cut_to_float(double value) {
  const float nearest = float(value);
  return std::fabs(double(nearest)) > std::fabs(value) ? std::nextafter(nearest, 0.0f) : nearest;
}

// sum + the products of k pairs, of which tensor cores add `group` at once. Products are exact in double.
float dot(const float* a, const float* b, int k, int group, float sum) {
  if (adding == Adding::kNearest) {
    for (int at = 0; at < k; ++at) sum = std::fma(a[at], b[at], sum);
    return sum;
  }
  const bool align = adding == Adding::kAligned;
  const int step = align ? group : 1;
  for (int first = 0; first < k; first += step) {
    double exponent = std::logb(sum);  // the largest; infinite where all are zero or one is infinite
    for (int at = first; at < first + step; ++at) {
      exponent = std::fmax(exponent, std::logb(a[at]) + std::logb(b[at]));
    }
    const bool cut = align && std::isfinite(exponent);
    const double unit = cut ? std::ldexp(1.0, int(exponent) - 24) : 0.0;  // the last place of a float32 is 23 behind
    auto aligned = [&](double term) { return cut ? std::trunc(term / unit) * unit : term; };
    double all = aligned(sum);
    for (int at = first; at < first + step; ++at) all += aligned(double(a[at]) * double(b[at]));
    sum = cut_to_float(all);
  }
  return sum;
}

class Launch {
 public:
  Launch(const Module& module, const Kernel& kernel, Dim grid, Dim block, int64_t dynamic, const uint8_t* params,
         Memory& memory)
      : module_(module),
        kernel_(kernel),
        grid_(grid),
        block_(block),
        params_(params),
        memory_(memory),
        shared_(kernel.shared_bytes + dynamic, kernel.narrow_shared) {}

  void run(bool backwards) {
    const int threads = int(block_.x * block_.y * block_.z);
    warps_.resize(size_t((threads + kLanes - 1) / kLanes));
    for (size_t w = 0; w < warps_.size(); ++w) set_up(warps_[w], int(w));
    const int64_t blocks = int64_t(grid_.x) * grid_.y * grid_.z;
    const uint32_t first = memory_.launch(blocks);
    for (int64_t b = 0; b < blocks; ++b) {
      number_ = backwards ? blocks - 1 - b : b;
      memory_.enter_block(first + uint32_t(number_));
      run_block(backwards, threads);
    }
  }

  std::vector<std::string> reports;
  Counts counts;

 private:
  void set_up(Warp& warp, int index);
  void start(Warp& warp, int threads);
  void run_block(bool backwards, int threads);
  void run_warp(Warp& warp);
  void report(const Instruction& i, int lane, const std::string& what);
  void execute(Warp& warp, const Instruction& i, uint32_t mask);
  void load(Warp& warp, const Instruction& i, uint32_t mask);
  void store(Warp& warp, const Instruction& i, uint32_t mask);
  void atomic(Warp& warp, const Instruction& i, uint32_t mask);
  void shuffle(Warp& warp, const Instruction& i, uint32_t mask);
  void vote(Warp& warp, const Instruction& i, uint32_t mask);
  void copy(Warp& warp, const Instruction& i, uint32_t mask);
  void wait(Warp& warp, const Instruction& i, uint32_t mask);
  void load_matrices(Warp& warp, const Instruction& i, uint32_t mask);
  void multiply(Warp& warp, const Instruction& i, uint32_t mask);
  // Where an address is, after all checks; null where there is nothing.
  uint8_t* reach(const Warp& warp, const Instruction& i, int lane, Space space, uint64_t address, int bytes,
                 bool writes, bool atomic = false);
  void whole(const Warp& warp, const Instruction& i, uint32_t mask) {
    if (mask != warp.live) report(i, std::countr_zero(mask), "warp instruction under a partial mask");
  }

  // An access by bytes of all lanes, at addresses that are not those of parameters.
  void count(const Access& access, Space space, int bytes) {
    if (space == Space::shared || (space == Space::generic && access.address[0] >= kSharedWindow)) {
      access.shared(bytes, counts);
    } else {
      counts.sectors += access.sectors();
    }
  }

  template <class F>
  static void each(uint32_t mask, const F& f) {
    for (; mask; mask &= mask - 1) f(std::countr_zero(mask));
  }

  const Module& module_;
  const Kernel& kernel_;
  Dim grid_, block_;
  const uint8_t* params_;
  Memory& memory_;
  Shared shared_;
  std::vector<Warp> warps_;
  Warp* warp_ = nullptr;
  int64_t number_ = 0;
};

// --- blocks and warps ----------------------------------------------------------------------------

// What is the same in all blocks.
void Launch::set_up(Warp& warp, int index) {
  warp.index = index;
  warp.registers.assign(size_t(kernel_.slots) + 1, {});
  for (size_t c = 0; c < kernel_.constants.size(); ++c) {
    const Constant& constant = kernel_.constants[c];
    auto of = [&](const Dim& d) { return constant.value == 0 ? d.x : constant.value == 1 ? d.y : d.z; };
    for (int lane = 0; lane < kLanes; ++lane) {
      const uint32_t thread = uint32_t(index * kLanes + lane);
      const Dim tid{thread % block_.x, thread / block_.x % block_.y, thread / block_.x / block_.y};
      using Kind = Constant::Kind;
      uint64_t value = constant.value;
      if (constant.kind == Kind::tid) value = of(tid);
      if (constant.kind == Kind::ntid) value = of(block_);
      if (constant.kind == Kind::nctaid) value = of(grid_);
      if (constant.kind == Kind::laneid) value = uint64_t(lane);
      if (constant.kind == Kind::warpid) value = uint64_t(index);
      warp.registers[c].set(lane, value);
    }
  }
}

void Launch::start(Warp& warp, int threads) {
  const int lanes = std::min(kLanes, threads - warp.index * kLanes);
  warp.live = uint32_t((uint64_t(1) << lanes) - 1);
  warp.since = 0;
  warp.waiting = false;
  warp.pc = {};
  warp.group = {};
  for (const Copy& left : warp.copies) shared_.drop(left.to, left.size);
  warp.copies.clear();
  const uint32_t place[3] = {uint32_t(number_ % grid_.x), uint32_t(number_ / grid_.x % grid_.y),
                             uint32_t(number_ / grid_.x / grid_.y)};
  for (size_t c = 0; c < kernel_.constants.size(); ++c) {
    const Constant& constant = kernel_.constants[c];
    if (constant.kind != Constant::Kind::ctaid) continue;
    for (int lane = 0; lane < kLanes; ++lane) warp.registers[c].set(lane, place[constant.value]);
  }
}

void Launch::run_block(bool backwards, int threads) {
  shared_.enter_block();
  for (Warp& warp : warps_) start(warp, threads);
  while (true) {
    for (size_t w = 0; w < warps_.size(); ++w) {
      Warp& warp = warps_[backwards ? warps_.size() - 1 - w : w];
      if (warp.live && !warp.waiting) run_warp(warp);
    }
    const auto waiting = std::count_if(warps_.begin(), warps_.end(), [](const Warp& w) { return w.waiting; });
    if (waiting == 0) break;
    if (size_t(waiting) != warps_.size()) {
      warp_ = &*std::find_if(warps_.begin(), warps_.end(), [](const Warp& w) { return w.waiting; });
      const int lane = std::countr_zero(warp_->live);
      report(kernel_.code[size_t(warp_->pc[size_t(lane)]) - 1], lane, "barrier that not all threads reach");
    }
    shared_.barrier();
    ++counts.barriers;
    for (Warp& warp : warps_) warp.waiting = false;
  }
}

void set(Warp& warp, uint32_t mask, int pc) {
  for (; mask; mask &= mask - 1) warp.pc[size_t(std::countr_zero(mask))] = pc;
}

// The lanes of a mask whose guard lets them act.
uint32_t guarded(const Warp& warp, const Instruction& i, uint32_t mask) {
  if (i.guard < 0) return mask;
  const Register& guard = warp.registers[size_t(i.guard)];
  uint32_t on = 0;
  for (int lane = 0; lane < kLanes; ++lane) on |= uint32_t(guard.low[lane] != 0) << lane;
  return mask & (i.guard_not ? ~on : on);
}

// The lanes at the lowest instruction run until they part or come to where others are.
void Launch::run_warp(Warp& warp) {
  warp_ = &warp;
  while (warp.live && !warp.waiting) {
    int pc = INT32_MAX, next = INT32_MAX;
    uint32_t mask = 0;
    each(warp.live, [&](int lane) {
      const int at = warp.pc[size_t(lane)];
      if (at < pc) {
        next = pc;
        pc = at;
        mask = 0;
      } else if (at > pc) {
        next = std::min(next, at);
      }
      if (at == pc) mask |= uint32_t(1) << lane;
    });
    bool together = true;
    while (together && pc < next) {
      const Instruction& i = kernel_.code[size_t(pc)];
      const uint32_t active = guarded(warp, i, mask);
      ++counts.instructions[i.kind];
      counts.lanes += std::popcount(active);
      ++pc;
      if (i.handler) {
        if (active) i.handler(warp.registers.data(), i, active);
      } else if (i.op == Op::bra) {
        if (active == mask) {
          pc = i.target;
        } else if (active) {
          set(warp, active, i.target);
          set(warp, mask & ~active, pc);
          together = false;
        }
      } else if (i.op == Op::ret) {
        warp.live &= ~active;
        mask &= ~active;
        together = mask != 0;
        set(warp, mask, pc);
      } else if (i.op == Op::bar) {
        if (active != warp.live) report(i, std::countr_zero(active), "barrier that not all threads reach");
        set(warp, mask, pc);
        warp.waiting = true;
        return;
      } else if (active) {
        execute(warp, i, active);
      }
    }
    if (together) set(warp, mask, pc);
  }
}

// " [file:line < file:line of the call that was inlined < ...]"
std::string source_of(const Module& module, int place) {
  std::string text;
  for (int depth = 0; place >= 0 && depth < 12; ++depth) {
    const Place& p = module.places[size_t(place)];
    const auto file = module.files.find(p.file);
    text += (depth ? " < " : " [") + (file == module.files.end() ? "?" : file->second) + ":" + std::to_string(p.line);
    place = p.caller == place ? -1 : p.caller;
  }
  return text.empty() ? "" : text + "]";
}

void Launch::report(const Instruction& i, int lane, const std::string& what) {
  if (reports.size() >= kMaxReports) return;
  const std::string line = i.line ? module_.lines[size_t(i.line) - 1] : "";
  const size_t from = std::min(line.find_first_not_of(" \t"), line.size());
  reports.push_back(what + ": kernel " + kernel_.name + ", block " + std::to_string(number_) + ", thread " +
                    std::to_string(warp_->index * kLanes + lane) + ", line " + std::to_string(i.line) + ": " +
                    line.substr(from) + source_of(module_, i.place));
}

void Launch::execute(Warp& warp, const Instruction& i, uint32_t mask) {
  switch (i.op) {
    case Op::ld:
      return load(warp, i, mask);
    case Op::st:
      return store(warp, i, mask);
    case Op::atom:
    case Op::red:
      return atomic(warp, i, mask);
    case Op::shfl:
      return shuffle(warp, i, mask);
    case Op::vote:
      return vote(warp, i, mask);
    case Op::activemask:
      return each(mask, [&](int lane) { warp.registers[size_t(i.out[0])].set(lane, mask); });
    case Op::bar_warp:
      whole(warp, i, mask);
      warp.since = shared_.warp_barrier();
      return;
    case Op::cp_async:
      return copy(warp, i, mask);
    case Op::cp_commit:
      return each(mask, [&](int lane) { ++warp.group[size_t(lane)]; });
    case Op::cp_wait:
      return wait(warp, i, mask);
    case Op::ldmatrix:
      return load_matrices(warp, i, mask);
    case Op::mma:
      return multiply(warp, i, mask);
    case Op::fence:
      return memory_.fence();
    default:
      throw std::runtime_error("unknown instruction: " + module_.lines[size_t(i.line) - 1]);
  }
}

// --- memory --------------------------------------------------------------------------------------

uint8_t* Launch::reach(const Warp& warp, const Instruction& i, int lane, Space space, uint64_t address, int bytes,
                       bool writes, bool atomic) {
  if (space == Space::generic && address >= kParamWindow) space = Space::param, address -= kParamWindow;
  if (space == Space::generic && address >= kSharedWindow) space = Space::shared, address -= kSharedWindow;
  Finding found = nullptr;
  uint8_t* memory = nullptr;
  if (space == Space::param) {
    if (address + uint64_t(bytes) > uint64_t(kernel_.param_bytes)) {
      found = "access outside of the parameters";
    } else {
      memory = const_cast<uint8_t*>(params_ + address);
    }
  } else if (space == Space::shared) {
    found = shared_.access(address, bytes, writes, warp.index * kLanes + lane, warp.since);
    if (address + uint64_t(bytes) <= uint64_t(shared_.size())) memory = shared_.at(address);
  } else {
    found = memory_.access(address, bytes, writes, atomic, &memory);
  }
  if (found) report(i, lane, found);
  return memory;
}

// Addresses of shared memory have 32 bits and wrap around.
uint64_t address_of(const Register& base, int lane, Space space, int64_t offset) {
  const uint64_t address = base.get(lane) + uint64_t(offset);
  return space == Space::shared ? uint32_t(address) : address;
}

uint64_t fetch(const uint8_t* from, int size) {
  auto as = [&](auto value) {
    std::memcpy(&value, from, sizeof value);
    return uint64_t(value);
  };
  return size == 4 ? as(uint32_t()) : size == 8 ? as(uint64_t()) : size == 2 ? as(uint16_t()) : as(uint8_t());
}

void put(uint8_t* to, uint64_t value, int size) {
  auto as = [&](auto narrow) { std::memcpy(to, &narrow, sizeof narrow); };
  size == 4 ? as(uint32_t(value)) : size == 8 ? as(value) : size == 2 ? as(uint16_t(value)) : as(uint8_t(value));
}

void Launch::load(Warp& warp, const Instruction& i, uint32_t mask) {
  const int size = i.type.bits / 8, bytes = size * i.vector;
  // Signed values fill their register.
  auto value_at = [&](const uint8_t* from) {
    const uint64_t value = from ? fetch(from, size) : 0;
    if (i.type.kind != 's' || size == 8) return value;
    return uint64_t(int64_t(value << (64 - 8 * size)) >> (64 - 8 * size));
  };
  const Register address = warp.registers[size_t(i.in[0])];
  if (i.uniform) {
    const int first = std::countr_zero(mask);
    const uint8_t* from = reach(warp, i, first, i.space, address.get(first) + uint64_t(i.offset), bytes, false);
    for (int n = 0; n < i.vector; ++n) {
      const uint64_t value = value_at(from ? from + n * size : nullptr);
      if (i.out[n] >= 0) each(mask, [&](int lane) { warp.registers[size_t(i.out[n])].set(lane, value); });
    }
    return;
  }
  Access access;
  each(mask, [&](int lane) {
    const uint64_t at = address_of(address, lane, i.space, i.offset);
    access.add(at);
    const uint8_t* from = reach(warp, i, lane, i.space, at, bytes, false);
    for (int n = 0; n < i.vector; ++n) {
      const uint64_t value = value_at(from ? from + n * size : nullptr);
      if (i.out[n] >= 0) warp.registers[size_t(i.out[n])].set(lane, value);
    }
  });
  if (counting && i.space != Space::param) count(access, i.space, bytes);
}

void Launch::store(Warp& warp, const Instruction& i, uint32_t mask) {
  const int size = i.type.bits / 8, bytes = size * i.vector;
  const Register& address = warp.registers[size_t(i.in[0])];
  Access access;
  each(mask, [&](int lane) {
    const uint64_t at = address_of(address, lane, i.space, i.offset);
    access.add(at);
    uint8_t* to = reach(warp, i, lane, i.space, at, bytes, true);
    if (!to) return;
    for (int n = 0; n < i.vector; ++n) {
      put(to + n * size, warp.registers[size_t(i.in[n + 1])].get(lane), size);
    }
  });
  if (counting) count(access, i.space, bytes);
}

template <class T>
T combined(const std::string& how, T old, T b, T c) {
  if (how == "add") return T(old + b);
  if (how == "min") return std::min(old, b);
  if (how == "max") return std::max(old, b);
  if (how == "exch") return b;
  if (how == "cas") return old == b ? c : old;
  if constexpr (std::is_integral_v<T>) {
    if (how == "and") return old & b;
    if (how == "or") return old | b;
    if (how == "xor") return old ^ b;
    if (how == "inc") return old >= b ? T(0) : T(old + 1);
  }
  throw std::runtime_error("unknown atomic ." + how);
}

uint64_t combined(const Instruction& i, uint64_t old, uint64_t b, uint64_t c) {
  const bool wide = i.type.bits == 64;
  if (i.type.kind == 'f') {
    auto f = [](uint64_t v) { return std::bit_cast<float>(uint32_t(v)); };
    auto d = [](uint64_t v) { return std::bit_cast<double>(v); };
    if (wide) return std::bit_cast<uint64_t>(combined(i.atomic, d(old), d(b), d(c)));
    return std::bit_cast<uint32_t>(combined(i.atomic, f(old), f(b), f(c)));
  }
  if (i.type.kind == 's' && wide) return uint64_t(combined(i.atomic, int64_t(old), int64_t(b), int64_t(c)));
  if (i.type.kind == 's') return uint32_t(combined(i.atomic, int32_t(old), int32_t(b), int32_t(c)));
  if (wide) return combined(i.atomic, old, b, c);
  return combined(i.atomic, uint32_t(old), uint32_t(b), uint32_t(c));
}

// Lanes one after the other.
void Launch::atomic(Warp& warp, const Instruction& i, uint32_t mask) {
  const int size = i.type.bits / 8;
  if (size != 4 && size != 8) throw std::runtime_error("unknown atomic: " + module_.lines[size_t(i.line) - 1]);
  each(mask, [&](int lane) {
    const uint64_t address = address_of(warp.registers[size_t(i.in[0])], lane, i.space, i.offset);
    uint8_t* at = reach(warp, i, lane, i.space, address, size, true, true);
    if (!at) return;
    memory_.synchronise(address, i.acquire, i.release);
    const uint64_t old = fetch(at, size);
    auto operand = [&](int n) { return i.in.size() > n ? warp.registers[size_t(i.in[n])].get(lane) : 0; };
    const uint64_t value = combined(i, old, operand(1), operand(2));
    put(at, value, size);
    if (i.out.size() && i.out[0] >= 0) warp.registers[size_t(i.out[0])].set(lane, old);
  });
}

// Bytes that a lane's cp.async reads.
int taken_of(const Instruction& i, const Warp& warp, int lane) {
  const int size = int(warp.registers[size_t(i.in[2])].low[lane]);
  return i.in.size() > 3 ? std::min(int(warp.registers[size_t(i.in[3])].low[lane]), size) : size;
}

void Launch::copy(Warp& warp, const Instruction& i, uint32_t mask) {
  Access access;
  int size = 0;
  each(mask, [&](int lane) {
    auto operand = [&](int n) { return warp.registers[size_t(i.in[n])].get(lane); };
    const uint64_t to = address_of(warp.registers[size_t(i.in[0])], lane, Space::shared, i.offset);
    Copy one{lane, warp.group[size_t(lane)], to, int(operand(2)), {}};
    const uint64_t from = operand(1) + uint64_t(i.from_offset);
    if (taken_of(i, warp, lane)) access.add(from);
    size = one.size;
    const int taken = taken_of(i, warp, lane);  // zeros behind
    if (from % uint64_t(one.size)) report(i, lane, "misaligned global access");
    if (taken == one.size) {
      if (const uint8_t* data = reach(warp, i, lane, Space::global, from, one.size, false)) {
        std::memcpy(one.bytes, data, size_t(one.size));
      }
    } else {
      for (int n = 0; n < taken; ++n) {
        if (const uint8_t* data = reach(warp, i, lane, Space::global, from + uint64_t(n), 1, false)) {
          one.bytes[n] = *data;
        }
      }
    }
    if (!reach(warp, i, lane, Space::shared, one.to, one.size, true)) return;
    shared_.pend(one.to, one.size);
    warp.copies.push_back(one);
  });
  if (counting && access.lanes) count(access, Space::global, size);
}

void Launch::wait(Warp& warp, const Instruction& i, uint32_t mask) {
  const bool all = i.mode == 'a';
  if (all) each(mask, [&](int lane) { ++warp.group[size_t(lane)]; });
  const int keep = all ? 0 : int(warp.registers[size_t(i.in[0])].low[std::countr_zero(mask)]);
  std::erase_if(warp.copies, [&](const Copy& one) {
    if (!(mask >> one.lane & 1) || one.group >= warp.group[size_t(one.lane)] - keep) return false;
    shared_.arrive(one.to, one.size, one.bytes, warp.index * kLanes + one.lane);
    return true;
  });
}

// --- warps together ------------------------------------------------------------------------------

void Launch::shuffle(Warp& warp, const Instruction& i, uint32_t mask) {
  whole(warp, i, mask);
  const Register source = warp.registers[size_t(i.in[0])], by = warp.registers[size_t(i.in[1])];
  const Register &clamps = warp.registers[size_t(i.in[2])], members = warp.registers[size_t(i.in[3])];
  uint32_t value[kLanes] = {}, inside[kLanes] = {};
  each(mask, [&](int lane) {
    const int b = int(by.low[lane] & 31), c = int(clamps.low[lane]);
    const int segment = c >> 8 & 31, clamp = c & 31;
    const int low = lane & segment, high = low | (clamp & ~segment);
    int from = i.mode == 'b' ? lane ^ b : i.mode == 'u' ? lane - b : i.mode == 'd' ? lane + b : low | (b & ~segment);
    inside[lane] = i.mode == 'u' ? from >= high : from <= high;
    if (!inside[lane]) from = lane;
    if (!(members.low[lane] >> lane & 1) || !(mask >> from & 1)) {
      report(i, lane, "warp instruction without the lane that it reads");
    }
    value[lane] = source.low[from];
  });
  each(mask, [&](int lane) {
    if (i.out[0] >= 0) warp.registers[size_t(i.out[0])].set(lane, value[lane]);
    if (i.out.size() > 1 && i.out[1] >= 0) warp.registers[size_t(i.out[1])].set(lane, inside[lane]);
  });
}

void Launch::vote(Warp& warp, const Instruction& i, uint32_t mask) {
  whole(warp, i, mask);
  uint32_t yes = 0;
  each(mask, [&](int lane) {
    const bool is = (warp.registers[size_t(i.in[0])].low[lane] != 0) != (i.in_not & 1);
    yes |= uint32_t(is) << lane;
  });
  const uint32_t result = i.mode == 'b' ? yes : i.mode == 'a' ? yes == mask : yes != 0;
  each(mask, [&](int lane) { warp.registers[size_t(i.out[0])].set(lane, result); });
}

void Launch::load_matrices(Warp& warp, const Instruction& i, uint32_t mask) {
  if (mask != kAll) return report(i, std::countr_zero(mask), "warp instruction under a partial mask");
  const Register address = warp.registers[size_t(i.in[0])];
  for (int n = 0; n < i.vector; ++n) {
    uint16_t matrix[8][8] = {};
    for (int row = 0; row < 8; ++row) {
      const int lane = n * 8 + row;
      const uint64_t at = address_of(address, lane, Space::shared, i.offset);
      if (const uint8_t* from = reach(warp, i, lane, Space::shared, at, 16, false)) std::memcpy(matrix[row], from, 16);
    }
    Register& to = warp.registers[size_t(i.out[n])];
    for (int lane = 0; lane < kLanes; ++lane) {
      const int row = lane / 4, column = lane % 4 * 2;
      const uint32_t first = i.trans ? matrix[column][row] : matrix[row][column];
      const uint32_t second = i.trans ? matrix[column + 1][row] : matrix[row][column + 1];
      to.set(lane, first | second << 16);
    }
  }
}

// The fragments are those of the PTX manual: lane 4 r + q holds rows r and r + 8 of A and of C, and column r of B.
void Launch::multiply(Warp& warp, const Instruction& i, uint32_t mask) {
  if (mask != kAll) return report(i, std::countr_zero(mask), "warp instruction under a partial mask");
  const bool halves = i.from.kind == 'h';
  const int per = halves ? 2 : 1, k = i.k;  // elements per register
  float a[16][16], b[8][16];                // rows of A, columns of B
  auto element = [&](int operand, int n, int lane, int part) {
    const uint32_t bits = warp.registers[size_t(i.in[i.operands[operand].first + n])].low[lane];
    if (halves) return widen(uint16_t(bits >> 16 * part), i.from.bfloat);
    return std::bit_cast<float>(bits & 0xffffe000);
  };
  for (int lane = 0; lane < kLanes; ++lane) {
    const int row = lane / 4, column = lane % 4;
    for (int part = 0; part < per; ++part) {
      for (int n = 0; n < i.operands[0].count; ++n) {
        a[row + n % 2 * 8][(n / 2 * 4 + column) * per + part] = element(0, n, lane, part);
      }
      for (int n = 0; n < i.operands[1].count; ++n) b[row][(n * 4 + column) * per + part] = element(1, n, lane, part);
    }
  }
  float sums[4][kLanes];
  for (int lane = 0; lane < kLanes; ++lane) {
    for (int n = 0; n < 4; ++n) {
      const int row = lane / 4 + n / 2 * 8, column = lane % 4 * 2 + n % 2;
      const Register& before = warp.registers[size_t(i.in[i.operands[2].first + n])];
      sums[n][lane] = dot(a[row], b[column], k, halves ? 8 : 4, std::bit_cast<float>(before.low[lane]));
    }
  }
  for (int n = 0; n < 4; ++n) {
    Register& to = warp.registers[size_t(i.out[n])];
    for (int lane = 0; lane < kLanes; ++lane) to.low[lane] = std::bit_cast<uint32_t>(sums[n][lane]);
  }
}

std::string& answer() {
  static std::string text;
  return text;
}

}  // namespace
}  // namespace ptx

// --- what Python and runtime.cpp call ------------------------------------------------------------

#define PTX_EXPORT extern "C" __attribute__((visibility("default")))

// Null, and ptx_answer() says why, for text that is not understood.
PTX_EXPORT void* ptx_parse(const char* text) {
  try {
    return new ptx::Module(ptx::parse(text));
  } catch (const std::exception& error) {
    ptx::answer() = error.what();
    return nullptr;
  }
}

PTX_EXPORT void ptx_free(void* module) { delete static_cast<ptx::Module*>(module); }

PTX_EXPORT const char* ptx_answer() { return ptx::answer().c_str(); }

// 0: to the nearest, 1: as an A100, 2: every product cut.
PTX_EXPORT void ptx_set_adding(int adding) { ptx::adding = static_cast<ptx::Adding>(adding); }

// Whether sectors of global memory and bank conflicts are counted from now on.
PTX_EXPORT void ptx_set_counting(bool counting) { ptx::counting = counting; }

// Of the last launch: instructions of warps by class, then active lanes, barriers, sectors, bytes that were touched,
// passes of shared memory and replays.
PTX_EXPORT void ptx_counts(int64_t* counts) {
  const ptx::Counts& c = ptx::last_counts;
  counts = std::copy(c.instructions.begin(), c.instructions.end(), counts);
  for (int64_t value : {c.lanes, c.barriers, c.sectors, c.unique, c.shared_passes, c.shared_replays}) *counts++ = value;
}

// The memory that kernels may use, range by range; fresh: nobody has written it yet.
PTX_EXPORT void* ptx_memory() { return new ptx::Memory; }
PTX_EXPORT void ptx_memory_add(void* memory, uint64_t begin, uint64_t end, bool fresh) {
  static_cast<ptx::Memory*>(memory)->add(begin, end, fresh);
}
PTX_EXPORT void ptx_memory_free(void* memory) { delete static_cast<ptx::Memory*>(memory); }

// How many parameters a kernel has, or -1; offsets: the offset and bytes of each, where it is not null.
PTX_EXPORT int ptx_params(const void* module, const char* name, int64_t* offsets) {
  const auto& kernels = static_cast<const ptx::Module*>(module)->kernels;
  const auto found = kernels.find(name);
  if (found == kernels.end()) {
    ptx::answer() = std::string("no kernel ") + name;
    return -1;
  }
  if (offsets) {
    for (const auto& [offset, bytes] : found->second.params) {
      *offsets++ = offset;
      *offsets++ = bytes;
    }
  }
  return int(found->second.params.size());
}

// The instructions executed, or -1; ptx_answer() has the reports, one a line. dims: grid, then block. params: as the
// kernel has them in memory.
PTX_EXPORT int64_t ptx_launch(const void* module, const char* name, const uint32_t* dims, int64_t shared,
                              const uint8_t* params, void* memory, bool backwards) {
  ptx::answer().clear();
  try {
    const auto& kernels = static_cast<const ptx::Module*>(module)->kernels;
    const auto found = kernels.find(name);
    if (found == kernels.end()) throw std::runtime_error(std::string("no kernel ") + name);
    ptx::Launch launch(*static_cast<const ptx::Module*>(module), found->second, {dims[0], dims[1], dims[2]},
                       {dims[3], dims[4], dims[5]}, shared, params, *static_cast<ptx::Memory*>(memory));
    launch.run(backwards);
    for (const auto& report : launch.reports) ptx::answer() += report + "\n";
    ptx::last_counts = launch.counts;
    ptx::last_counts.unique = static_cast<ptx::Memory*>(memory)->touched();
    const auto& all = launch.counts.instructions;
    return std::accumulate(all.begin(), all.end(), int64_t(0));
  } catch (const std::exception& error) {
    ptx::answer() = error.what();
    return -1;
  }
}
