// Thread blocks of a launch, one after the other: warps of 32 lanes, memory and what is watched in it.
#include <algorithm>
#include <bit>
#include <cfenv>
#include <cmath>
#include <cstring>
#include <memory>

#include "module.h"

namespace ptx {
namespace {

constexpr int kLanes = 32;
constexpr size_t kMostReports = 64;

struct Dim {
  uint32_t x, y, z;
};

struct Range {
  uint64_t begin, end;
  std::vector<int32_t> writer, reader;  // per byte: the block that wrote or read it, plus 1; -1: several blocks read
};

struct SharedByte {
  bool written = false, pending = false, several = false, other_warp = false;
  int writer = -1, reader = -1;
  uint32_t write_epoch = 0, write_warp_epoch = 0, read_epoch = 0, read_warp_epoch = 0;
};

struct Copy {
  uint64_t to;
  std::vector<uint8_t> bytes;
};

struct Warp {
  int index = 0;
  uint32_t live = 0, epoch = 0;
  bool waiting = false;
  std::array<int, kLanes> pc{};
  std::vector<std::array<uint64_t, kLanes>> registers;
  std::vector<Copy> open;
  std::vector<std::vector<Copy>> groups;
};

float as_float(uint64_t bits) { return std::bit_cast<float>(uint32_t(bits)); }
uint64_t of_float(float value) { return std::bit_cast<uint32_t>(value); }

float widen(uint16_t bits, bool bfloat) {
  if (bfloat) return std::bit_cast<float>(uint32_t(bits) << 16);
  return float(std::bit_cast<_Float16>(bits));
}

uint16_t narrow(float value, bool bfloat) {
  if (!bfloat) return std::bit_cast<uint16_t>(_Float16(value));
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  if (std::isnan(value)) return 0x7fff;
  return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

uint64_t cut(uint64_t bits, int width) { return width == 64 ? bits : bits & ((uint64_t(1) << width) - 1); }

int64_t extend(uint64_t bits, int width) { return int64_t(bits << (64 - width)) >> (64 - width); }

class Launch {
 public:
  Launch(const Module& module, const Kernel& kernel, Dim grid, Dim block, int64_t dynamic, const uint8_t* params,
         std::vector<Range>& ranges)
      : module_(module), kernel_(kernel), grid_(grid), block_(block), params_(params), ranges_(ranges) {
    shared_.resize(size_t(kernel.shared_bytes + dynamic));
    shadow_.resize(shared_.size());
  }

  void run(bool backwards) {
    const int64_t blocks = int64_t(grid_.x) * grid_.y * grid_.z;
    for (int64_t b = 0; b < blocks; ++b) run_block(backwards ? blocks - 1 - b : b, backwards);
  }

  std::vector<std::string> reports;
  uint64_t executed = 0;

 private:
  void run_block(int64_t number, bool backwards) {
    number_ = number;
    ctaid_ = {uint32_t(number % grid_.x), uint32_t(number / grid_.x % grid_.y), uint32_t(number / grid_.x / grid_.y)};
    std::fill(shadow_.begin(), shadow_.end(), SharedByte{});
    std::fill(shared_.begin(), shared_.end(), uint8_t(0xff));  // NaN, if it is read
    epoch_ = 1;
    const int threads = int(block_.x * block_.y * block_.z);
    warps_.assign(size_t((threads + kLanes - 1) / kLanes), Warp{});
    for (size_t w = 0; w < warps_.size(); ++w) start(warps_[w], int(w), threads);
    while (true) {
      for (size_t w = 0; w < warps_.size(); ++w) {
        Warp& warp = warps_[backwards ? warps_.size() - 1 - w : w];
        if (warp.live && !warp.waiting) run_warp(warp);
      }
      const auto waiting = std::count_if(warps_.begin(), warps_.end(), [](const Warp& w) { return w.waiting; });
      if (waiting == 0) break;
      if (size_t(waiting) != warps_.size()) {
        const Warp& at = *std::find_if(warps_.begin(), warps_.end(), [](const Warp& w) { return w.waiting; });
        warp_ = &warps_[size_t(at.index)];
        const int lane = std::countr_zero(at.live);
        report(kernel_.code[size_t(at.pc[size_t(lane)]) - 1], lane, "barrier that not all threads reach");
      }
      ++epoch_;
      for (Warp& warp : warps_) warp.waiting = false;
    }
  }

  void start(Warp& warp, int index, int threads) {
    warp.index = index;
    const int lanes = std::min(kLanes, threads - index * kLanes);
    warp.live = uint32_t((uint64_t(1) << lanes) - 1);
    warp.epoch = 1;
    warp.registers.assign(size_t(kernel_.slots), {});
    for (size_t c = 0; c < kernel_.constants.size(); ++c) {
      for (int lane = 0; lane < kLanes; ++lane) {
        const Constant& constant = kernel_.constants[c];
        const uint32_t thread = uint32_t(index * kLanes + lane);
        const Dim tid{thread % block_.x, thread / block_.x % block_.y, thread / block_.x / block_.y};
        auto of = [&](const Dim& d) { return constant.value == 0 ? d.x : constant.value == 1 ? d.y : d.z; };
        using Kind = Constant::Kind;
        uint64_t value = constant.value;
        if (constant.kind == Kind::tid) value = of(tid);
        if (constant.kind == Kind::ntid) value = of(block_);
        if (constant.kind == Kind::ctaid) value = of(ctaid_);
        if (constant.kind == Kind::nctaid) value = of(grid_);
        if (constant.kind == Kind::laneid) value = uint64_t(lane);
        if (constant.kind == Kind::warpid) value = uint64_t(index);
        warp.registers[c][size_t(lane)] = value;
      }
    }
  }

  // The lanes at the lowest instruction run until they part or come to where others are.
  void run_warp(Warp& warp) {
    warp_ = &warp;
    while (warp.live && !warp.waiting) {
      int pc = INT32_MAX, next = INT32_MAX;
      uint32_t mask = 0;
      for (uint32_t rest = warp.live; rest; rest &= rest - 1) {
        const int lane = std::countr_zero(rest), at = warp.pc[size_t(lane)];
        if (at < pc) {
          next = pc;
          pc = at;
          mask = 0;
        } else if (at > pc) {
          next = std::min(next, at);
        }
        if (at == pc) mask |= uint32_t(1) << lane;
      }
      bool together = true;
      while (together && pc < next) {
        const Instruction& i = kernel_.code[size_t(pc)];
        uint32_t active = mask;
        if (i.guard >= 0) {
          const auto& guard = warp.registers[size_t(i.guard)];
          for (uint32_t rest = mask; rest; rest &= rest - 1) {
            const int lane = std::countr_zero(rest);
            if ((guard[size_t(lane)] != 0) == i.guard_not) active &= ~(uint32_t(1) << lane);
          }
        }
        ++executed;
        ++pc;
        if (i.op == Op::bra) {
          if (active == mask) {
            pc = i.target;
          } else if (active) {
            for (uint32_t rest = mask; rest; rest &= rest - 1) {
              const int lane = std::countr_zero(rest);
              warp.pc[size_t(lane)] = active >> lane & 1 ? i.target : pc;
            }
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

  static void set(Warp& warp, uint32_t mask, int pc) {
    for (uint32_t rest = mask; rest; rest &= rest - 1) warp.pc[size_t(std::countr_zero(rest))] = pc;
  }

  void report(const Instruction& i, int lane, const std::string& what) {
    if (reports.size() >= kMostReports) return;
    const std::string line = i.line ? module_.lines[size_t(i.line) - 1] : "";
    const size_t from = std::min(line.find_first_not_of(" \t"), line.size());
    reports.push_back(what + ": kernel " + kernel_.name + ", block " + std::to_string(number_) + ", thread " +
                      std::to_string(warp_->index * kLanes + lane) + ", line " + std::to_string(i.line) + ": " +
                      line.substr(from));
  }

  uint64_t get(const Warp& warp, const Instruction& i, size_t operand, int lane) const {
    return warp.registers[size_t(i.in[operand])][size_t(lane)];
  }

  void execute(Warp& warp, const Instruction& i, uint32_t mask);
  uint64_t compute(const Instruction& i, uint64_t a, uint64_t b, uint64_t c);
  uint64_t convert(const Instruction& i, uint64_t a, uint64_t b);
  bool holds(const Instruction& i, uint64_t a, uint64_t b);
  void multiply(Warp& warp, const Instruction& i);
  bool load(const Instruction& i, int lane, Space space, uint64_t address, int bytes, uint8_t* to);
  void store(const Instruction& i, int lane, Space space, uint64_t address, int bytes, const uint8_t* from);
  uint8_t* global(const Instruction& i, int lane, uint64_t address, int bytes, bool writes);
  bool shared(const Instruction& i, int lane, uint64_t address, int bytes, bool writes);

  const Module& module_;
  const Kernel& kernel_;
  Dim grid_, block_, ctaid_{};
  const uint8_t* params_;
  std::vector<Range>& ranges_;
  std::vector<uint8_t> shared_;
  std::vector<SharedByte> shadow_;
  std::vector<Warp> warps_;
  Warp* warp_ = nullptr;
  int64_t number_ = 0;
  uint32_t epoch_ = 1;
};

// --- memory --------------------------------------------------------------------------------------

uint8_t* Launch::global(const Instruction& i, int lane, uint64_t address, int bytes, bool writes) {
  if (address % uint64_t(bytes)) return report(i, lane, "misaligned global access"), nullptr;
  for (Range& range : ranges_) {
    if (address < range.begin || address + uint64_t(bytes) > range.end) continue;
    const int32_t me = int32_t(number_) + 1;
    bool race = false;
    for (uint64_t at = address - range.begin; at < address - range.begin + uint64_t(bytes); ++at) {
      int32_t &writer = range.writer[at], &reader = range.reader[at];
      race |= (writer && writer != me) || (writes && reader && reader != me);
      if (writes) {
        writer = me;
      } else {
        reader = reader == 0 || reader == me ? me : -1;
      }
    }
    if (race) report(i, lane, "race in global memory between blocks");
    return reinterpret_cast<uint8_t*>(address);
  }
  report(i, lane, "global access outside of the tensors");
  return nullptr;
}

bool Launch::shared(const Instruction& i, int lane, uint64_t address, int bytes, bool writes) {
  if (address % uint64_t(bytes)) return report(i, lane, "misaligned shared access"), false;
  if (address + uint64_t(bytes) > shared_.size()) return report(i, lane, "access outside of shared memory"), false;
  const int thread = warp_->index * kLanes + lane;
  bool race = false, unwritten = false, early = false;
  // Threads of one warp are ordered by __syncwarp too.
  auto unordered = [&](int other, uint32_t epoch, uint32_t warp_epoch) {
    return other >= 0 && other != thread && epoch == epoch_ &&
           (other / kLanes != warp_->index || warp_epoch == warp_->epoch);
  };
  for (uint64_t at = address; at < address + uint64_t(bytes); ++at) {
    SharedByte& byte = shadow_[at];
    race |= unordered(byte.writer, byte.write_epoch, byte.write_warp_epoch);
    early |= byte.pending;
    if (writes) {
      race |= unordered(byte.reader, byte.read_epoch, byte.read_warp_epoch) ||
              (byte.several && byte.read_epoch == epoch_ && (byte.other_warp || byte.read_warp_epoch == warp_->epoch));
      byte.written = true;
      byte.writer = thread;
      byte.write_epoch = epoch_;
      byte.write_warp_epoch = warp_->epoch;
    } else {
      unwritten |= !byte.written && !byte.pending;
      const bool fresh = byte.read_epoch != epoch_;
      if (fresh) byte.several = byte.other_warp = false;
      if (!fresh && byte.reader != thread) {
        byte.other_warp |= byte.reader / kLanes != warp_->index;
        byte.several = byte.other_warp || byte.read_warp_epoch == warp_->epoch;
      }
      byte.reader = thread;
      byte.read_epoch = epoch_;
      byte.read_warp_epoch = warp_->epoch;
    }
  }
  if (early) report(i, lane, "shared memory accessed before the wait for its copy");
  if (unwritten) report(i, lane, "uninitialised shared memory read");
  if (race) report(i, lane, "race in shared memory");
  return true;
}

bool Launch::load(const Instruction& i, int lane, Space space, uint64_t address, int bytes, uint8_t* to) {
  if (space == Space::generic && address >= kParamWindow) space = Space::param, address -= kParamWindow;
  if (space == Space::generic && address >= kSharedWindow) space = Space::shared, address -= kSharedWindow;
  std::memset(to, 0, size_t(bytes));
  if (space == Space::param) {
    if (address + uint64_t(bytes) > uint64_t(kernel_.param_bytes)) {
      return report(i, lane, "access outside of the parameters"), false;
    }
    std::memcpy(to, params_ + address, size_t(bytes));
  } else if (space == Space::shared) {
    if (!shared(i, lane, address, bytes, false)) return false;
    std::memcpy(to, &shared_[address], size_t(bytes));
  } else {
    const uint8_t* from = global(i, lane, address, bytes, false);
    if (!from) return false;
    std::memcpy(to, from, size_t(bytes));
  }
  return true;
}

void Launch::store(const Instruction& i, int lane, Space space, uint64_t address, int bytes, const uint8_t* from) {
  if (space == Space::generic && address >= kSharedWindow) space = Space::shared, address -= kSharedWindow;
  if (space == Space::shared) {
    if (shared(i, lane, address, bytes, true)) std::memcpy(&shared_[address], from, size_t(bytes));
  } else if (uint8_t* to = global(i, lane, address, bytes, true)) {
    std::memcpy(to, from, size_t(bytes));
  }
}

// --- arithmetic ----------------------------------------------------------------------------------

template <class T>
T arithmetic(Op op, T a, T b, T c) {
  switch (op) {
    case Op::add:
      return a + b;
    case Op::sub:
      return a - b;
    case Op::mul:
      return a * b;
    case Op::div:
      return a / b;
    case Op::fma:
    case Op::mad:
      return std::fma(a, b, c);
    case Op::min:
      return std::fmin(a, b);
    case Op::max:
      return std::fmax(a, b);
    case Op::neg:
      return -a;
    case Op::abs:
      return std::fabs(a);
    case Op::ex2:
      return std::exp2(a);
    case Op::rcp:
      return T(1) / a;
    case Op::sqrt:
      return std::sqrt(a);
    case Op::rsqrt:
      return T(1) / std::sqrt(a);
    default:
      throw std::runtime_error("no arithmetic of floating-point numbers");
  }
}

uint64_t Launch::compute(const Instruction& i, uint64_t a, uint64_t b, uint64_t c) {
  const int bits = i.type.bits;
  if (i.type.kind == 'f' && bits == 32) {
    const bool directed = i.mode == 'm' || i.mode == 'p' || i.mode == 'z';
    if (directed && i.op != Op::fma) {
      throw std::runtime_error("rounding is not known: " + module_.lines[size_t(i.line) - 1]);
    }
    if (directed) std::fesetround(i.mode == 'm' ? FE_DOWNWARD : i.mode == 'p' ? FE_UPWARD : FE_TOWARDZERO);
    float value = arithmetic(i.op, as_float(a), as_float(b), as_float(c));
    if (directed) std::fesetround(FE_TONEAREST);
    if (i.saturate) value = std::isnan(value) ? 0 : std::clamp(value, 0.0f, 1.0f);
    if (i.ftz && std::fabs(value) < 0x1p-126f) value = std::copysign(0.0f, value);
    return of_float(value);
  }
  if (i.type.kind == 'f') {
    using D = double;
    return std::bit_cast<uint64_t>(arithmetic(i.op, std::bit_cast<D>(a), std::bit_cast<D>(b), std::bit_cast<D>(c)));
  }
  if (i.type.kind == 'h') {
    uint64_t result = 0;
    for (int n = 0; n < i.type.count; ++n) {
      auto part = [&](uint64_t x) { return double(widen(uint16_t(x >> 16 * n), i.type.bfloat)); };
      const float value = float(arithmetic(i.op, part(a), part(b), part(c)));
      result |= uint64_t(narrow(value, i.type.bfloat)) << 16 * n;
    }
    return result;
  }
  const bool is_signed = i.type.kind == 's';
  const int64_t sa = extend(a, bits), sb = extend(b, bits);
  const uint64_t ua = cut(a, bits), ub = cut(b, bits);
  auto product = [&] {
    if (i.mode == 'w') return is_signed ? uint64_t(sa * sb) : ua * ub;
    if (i.mode != 'h') return ua * ub;
    if (is_signed) return uint64_t(__int128(sa) * sb >> bits);
    return uint64_t((unsigned __int128)(ua)*ub >> bits);
  };
  const int width = i.mode == 'w' ? 2 * bits : bits;
  switch (i.op) {
    case Op::add:
      return cut(a + b, width);
    case Op::sub:
      return cut(a - b, width);
    case Op::mul:
      return cut(product(), width);
    case Op::mad:
      return cut(product() + c, width);
    case Op::div:
      if (ub == 0) return cut(~uint64_t(0), bits);
      return is_signed ? cut(uint64_t(sb == -1 ? -sa : sa / sb), bits) : ua / ub;
    case Op::rem:
      if (ub == 0) return ua;
      return is_signed ? cut(uint64_t(sb == -1 ? 0 : sa % sb), bits) : ua % ub;
    case Op::min:
      return is_signed ? cut(uint64_t(std::min(sa, sb)), bits) : std::min(ua, ub);
    case Op::max:
      return is_signed ? cut(uint64_t(std::max(sa, sb)), bits) : std::max(ua, ub);
    case Op::neg:
      return cut(-a, bits);
    case Op::abs:
      return cut(uint64_t(sa < 0 ? -sa : sa), bits);
    case Op::and_:
      return a & b;
    case Op::or_:
      return a | b;
    case Op::xor_:
      return a ^ b;
    case Op::not_:
      return i.type.kind == 'p' ? a == 0 : cut(~a, bits);
    case Op::shl:
      return cut(b, 32) >= uint64_t(bits) ? 0 : cut(a << cut(b, 32), bits);
    case Op::shr: {
      const uint64_t by = std::min<uint64_t>(cut(b, 32), 63);
      return is_signed ? cut(uint64_t(sa >> by), bits) : by >= uint64_t(bits) ? 0 : ua >> by;
    }
    case Op::bfe: {
      const int start = int(b & 255), length = int(c & 255);
      if (length == 0 || start >= bits) return is_signed && length && sa < 0 ? cut(~uint64_t(0), bits) : 0;
      const uint64_t shifted = uint64_t(is_signed ? sa >> start : int64_t(ua >> start));
      if (length >= 64) return cut(shifted, bits);
      return is_signed ? cut(uint64_t(extend(shifted, length)), bits) : cut(cut(shifted, length), bits);
    }
    case Op::prmt: {
      const uint64_t both = cut(a, 32) | cut(b, 32) << 32;
      uint64_t result = 0;
      for (int n = 0; n < 4; ++n) {
        const int selector = int(c >> 4 * n & 15);
        uint64_t byte = both >> 8 * (selector & 7) & 255;
        if (selector & 8) byte = byte & 128 ? 255 : 0;
        result |= byte << 8 * n;
      }
      return result;
    }
    case Op::popc:
      return uint64_t(std::popcount(ua));
    case Op::clz:
      return uint64_t(std::countl_zero(ua) - (64 - bits));
    default:
      throw std::runtime_error("unknown integer instruction: " + module_.lines[size_t(i.line) - 1]);
  }
}

bool Launch::holds(const Instruction& i, uint64_t ia, uint64_t ib) {
  auto test = [&](auto a, auto b) {
    const bool unordered = a != a || b != b;
    switch (i.compare) {
      case Compare::eq:
        return a == b;
      case Compare::ne:
        return a != b && !unordered;
      case Compare::lt:
        return a < b;
      case Compare::le:
        return a <= b;
      case Compare::gt:
        return a > b;
      case Compare::ge:
        return a >= b;
      case Compare::equ:
        return a == b || unordered;
      case Compare::neu:
        return a != b;
      case Compare::ltu:
        return !(a >= b);
      case Compare::leu:
        return !(a > b);
      case Compare::gtu:
        return !(a <= b);
      case Compare::geu:
        return !(a < b);
      case Compare::num:
        return !unordered;
      case Compare::nan:
        return unordered;
    }
    return false;
  };
  const int bits = i.type.bits;
  if (i.type.kind == 'h') {
    return test(widen(uint16_t(ia), i.type.bfloat), widen(uint16_t(ib), i.type.bfloat));
  }
  if (i.type.kind == 'f' && bits == 32) return test(as_float(ia), as_float(ib));
  if (i.type.kind == 'f') return test(std::bit_cast<double>(ia), std::bit_cast<double>(ib));
  if (i.type.kind == 's') return test(extend(ia, bits), extend(ib, bits));
  return test(cut(ia, bits), cut(ib, bits));
}

uint64_t Launch::convert(const Instruction& i, uint64_t a, uint64_t b) {
  const Type &to = i.type, &from = i.from;
  if (to.kind == 'h' && to.count == 2) {
    return uint64_t(narrow(as_float(a), to.bfloat)) << 16 | narrow(as_float(b), to.bfloat);
  }
  if (to.kind == 't') {  // round to nearest, ties away (.rna) or to even
    const uint32_t bits = uint32_t(a);
    if (std::isnan(as_float(a))) return 0x7fffffff;
    return i.mode == 'a' ? (bits + 0x1000) & 0xffffe000 : (bits + 0xfff + (bits >> 13 & 1)) & 0xffffe000;
  }
  const bool from_float = from.kind == 'f' || from.kind == 'h', to_float = to.kind == 'f' || to.kind == 'h';
  double value = 0;
  if (from.kind == 'f') value = from.bits == 32 ? double(as_float(a)) : std::bit_cast<double>(a);
  if (from.kind == 'h') value = double(widen(uint16_t(a), from.bfloat));
  if (from_float) {
    if (i.mode == 'N') value = std::nearbyint(value);
    if (i.mode == 'Z') value = std::trunc(value);
    if (i.mode == 'M') value = std::floor(value);
    if (i.mode == 'P') value = std::ceil(value);
    if (i.saturate && to_float) value = std::isnan(value) ? 0 : std::clamp(value, 0.0, 1.0);
    if (!to_float) {
      if (std::isnan(value)) return 0;
      const bool is_signed = to.kind == 's';
      const double low = is_signed ? -std::ldexp(1.0, to.bits - 1) : 0;
      const double high = std::ldexp(1.0, is_signed ? to.bits - 1 : to.bits);
      if (value >= high) return cut(~uint64_t(0), is_signed ? to.bits - 1 : to.bits);
      value = std::max(value, low);
      return is_signed ? cut(uint64_t(int64_t(value)), to.bits) : uint64_t(value);
    }
  } else {
    const bool is_signed = from.kind == 's';
    const int64_t integer = is_signed ? extend(a, from.bits) : int64_t(cut(a, from.bits));
    if (!to_float) return cut(uint64_t(integer), to.bits);
    if (to.kind == 'f' && to.bits == 32) return of_float(is_signed ? float(integer) : float(uint64_t(integer)));
    value = is_signed ? double(integer) : double(uint64_t(integer));
  }
  if (to.kind == 'h') return narrow(float(value), to.bfloat);
  return to.bits == 32 ? of_float(float(value)) : std::bit_cast<uint64_t>(value);
}

// How tensor cores add products; nothing about it is specified. kAligned is what measurements found of an A100 (Fasi et
// al. 2021, Khattak and Mikaitis 2025): the sum and 8 products, 4 in TF32, are cut towards zero one place below the last
// of the largest of them, added, and cut to float32. kTruncated cuts after every product, which is worse than any
// hardware known.
enum class Adding : int { kNearest = 0, kAligned = 1, kTruncated = 2 };
Adding adding = Adding::kNearest;

float cut_to_float(double value) {
  const float nearest = float(value);
  return std::fabs(double(nearest)) > std::fabs(value) ? std::nextafter(nearest, 0.0f) : nearest;
}

// sum + a b, of which tensor cores add `group` products at once. Products are exact in double.
float dot(const float* a, const float* b, int k, int stride_b, int group, float sum) {
  if (adding == Adding::kNearest) {
    for (int at = 0; at < k; ++at) sum = std::fma(a[at], b[at * stride_b], sum);
    return sum;
  }
  const bool align = adding == Adding::kAligned;
  const int step = align ? group : 1;
  for (int first = 0; first < k; first += step) {
    double exponent = std::logb(sum);  // the largest; infinite where all are zero or one is infinite
    for (int at = first; at < first + step; ++at) {
      exponent = std::fmax(exponent, std::logb(a[at]) + std::logb(b[at * stride_b]));
    }
    const bool cut = align && std::isfinite(exponent);
    const double unit = cut ? std::ldexp(1.0, int(exponent) - 24) : 0.0;  // the last place of a float32 is 23 behind
    auto aligned = [&](double term) { return cut ? std::trunc(term / unit) * unit : term; };
    double all = aligned(sum);
    for (int at = first; at < first + step; ++at) all += aligned(double(a[at]) * double(b[at * stride_b]));
    sum = cut_to_float(all);
  }
  return sum;
}

// The fragments are those of the PTX manual: lane 4 r + q holds rows r and r + 8 of A and of C, and column r of B.
void Launch::multiply(Warp& warp, const Instruction& i) {
  const bool halves = i.from.kind == 'h';
  const int per = halves ? 2 : 1, k = i.k;  // elements per register
  std::vector<float> a(size_t(16 * k)), b(size_t(k * 8));
  auto element = [&](size_t operand, int slot, int lane, int part) {
    const uint64_t bits = get(warp, i, size_t(i.groups[operand][0] + slot), lane);
    if (halves) return widen(uint16_t(bits >> 16 * part), i.from.bfloat);
    return std::bit_cast<float>(uint32_t(bits) & 0xffffe000);
  };
  for (int lane = 0; lane < kLanes; ++lane) {
    const int row = lane / 4, column = lane % 4;
    for (int n = 0; n < i.groups[0][1]; ++n) {
      for (int part = 0; part < per; ++part) {
        const int at = (n / 2 * 4 + column) * per + part;
        a[size_t((row + n % 2 * 8) * k + at)] = element(0, n, lane, part);
      }
    }
    for (int n = 0; n < i.groups[1][1]; ++n) {
      for (int part = 0; part < per; ++part) {
        b[size_t(((n * 4 + column) * per + part) * 8 + row)] = element(1, n, lane, part);
      }
    }
  }
  for (int lane = 0; lane < kLanes; ++lane) {
    for (int n = 0; n < 4; ++n) {
      const int row = lane / 4 + n / 2 * 8, column = lane % 4 * 2 + n % 2;
      const float before = as_float(get(warp, i, size_t(i.groups[2][0] + n), lane));
      const float sum = dot(&a[size_t(row * k)], &b[size_t(column)], k, 8, halves ? 8 : 4, before);
      warp.registers[size_t(i.out[size_t(n)])][size_t(lane)] = of_float(sum);
    }
  }
}

void Launch::execute(Warp& warp, const Instruction& i, uint32_t mask) {
  auto each = [&](auto&& body) {
    for (uint32_t rest = mask; rest; rest &= rest - 1) body(std::countr_zero(rest));
  };
  auto put = [&](size_t result, int lane, uint64_t value) {
    if (i.out[result] >= 0) warp.registers[size_t(i.out[result])][size_t(lane)] = value;
  };
  auto truth = [&](size_t operand, int lane) { return (get(warp, i, operand, lane) != 0) != i.in_not[operand]; };
  const bool whole = mask == warp.live;
  switch (i.op) {
    case Op::mov:
      if (i.in.size() == i.out.size()) {
        each([&](int lane) {
          for (size_t n = 0; n < i.out.size(); ++n) put(n, lane, get(warp, i, n, lane));
        });
      } else if (i.out.size() == 1) {
        const int bits = i.type.bits / int(i.in.size());
        each([&](int lane) {
          uint64_t value = 0;
          for (size_t n = 0; n < i.in.size(); ++n) value |= cut(get(warp, i, n, lane), bits) << bits * int(n);
          put(0, lane, value);
        });
      } else {
        const int bits = i.type.bits / int(i.out.size());
        each([&](int lane) {
          const uint64_t value = get(warp, i, 0, lane);
          for (size_t n = 0; n < i.out.size(); ++n) put(n, lane, cut(value >> bits * int(n), bits));
        });
      }
      break;
    case Op::selp:
      each([&](int lane) { put(0, lane, get(warp, i, truth(2, lane) ? 0 : 1, lane)); });
      break;
    case Op::setp:
      each([&](int lane) {
        const bool is = holds(i, get(warp, i, 0, lane), get(warp, i, 1, lane));
        auto joined = [&](bool value) {
          if (i.combine == ' ') return value;
          const bool other = truth(2, lane);
          return i.combine == 'a' ? value && other : i.combine == 'o' ? value || other : value != other;
        };
        put(0, lane, joined(is));
        if (i.out.size() > 1) put(1, lane, joined(!is));
      });
      break;
    case Op::cvt:
      each([&](int lane) {
        put(0, lane, convert(i, get(warp, i, 0, lane), i.in.size() > 1 ? get(warp, i, 1, lane) : 0));
      });
      break;
    case Op::cvta: {
      const uint64_t window = i.space == Space::shared ? kSharedWindow : i.space == Space::param ? kParamWindow : 0;
      each([&](int lane) { put(0, lane, get(warp, i, 0, lane) + (i.to ? -window : window)); });
      break;
    }
    case Op::lop3:
      each([&](int lane) {
        const uint64_t a = get(warp, i, 0, lane), b = get(warp, i, 1, lane), c = get(warp, i, 2, lane);
        const uint64_t table = get(warp, i, 3, lane);
        uint64_t result = 0;
        for (int n = 0; n < 8; ++n) {
          if (table >> n & 1) result |= (n & 4 ? a : ~a) & (n & 2 ? b : ~b) & (n & 1 ? c : ~c);
        }
        put(0, lane, cut(result, 32));
      });
      break;
    case Op::ld:
      each([&](int lane) {
        alignas(16) uint8_t bytes[16] = {};
        const int size = i.type.bits / 8;
        load(i, lane, i.space, get(warp, i, 0, lane) + uint64_t(i.offset), size * i.vector, bytes);
        for (int n = 0; n < i.vector; ++n) {
          uint64_t value = 0;
          std::memcpy(&value, bytes + n * size, size_t(size));
          if (i.type.kind == 's') value = uint64_t(extend(value, i.type.bits));
          put(size_t(n), lane, value);
        }
      });
      break;
    case Op::st:
      each([&](int lane) {
        alignas(16) uint8_t bytes[16] = {};
        const int size = i.type.bits / 8;
        for (int n = 0; n < i.vector; ++n) {
          const uint64_t value = get(warp, i, size_t(n + 1), lane);
          std::memcpy(bytes + n * size, &value, size_t(size));
        }
        store(i, lane, i.space, get(warp, i, 0, lane) + uint64_t(i.offset), size * i.vector, bytes);
      });
      break;
    case Op::shfl: {
      const auto source = warp.registers[size_t(i.in[0])];
      each([&](int lane) {
        const int b = int(get(warp, i, 1, lane) & 31), c = int(get(warp, i, 2, lane));
        const int segment = c >> 8 & 31, clamp = c & 31;
        const int high = (lane & segment) | (clamp & ~segment), low = lane & segment;
        int from = i.mode == 'b'   ? lane ^ b
                   : i.mode == 'u' ? lane - b
                   : i.mode == 'd' ? lane + b
                                   : low | (b & ~segment);
        const bool inside = i.mode == 'u' ? from >= high : from <= high;
        if (!inside) from = lane;
        if (uint32_t(get(warp, i, 3, lane)) >> lane & 1 ? !(mask >> from & 1) : true) {
          report(i, lane, "warp instruction without the lane that it reads");
        }
        put(0, lane, source[size_t(from)]);
        if (i.out.size() > 1) put(1, lane, inside);
      });
      if (!whole) report(i, std::countr_zero(mask), "warp instruction under a partial mask");
      break;
    }
    case Op::vote: {
      uint32_t yes = 0;
      each([&](int lane) { yes |= uint32_t(truth(0, lane)) << lane; });
      each([&](int lane) { put(0, lane, i.mode == 'b' ? yes : i.mode == 'a' ? yes == mask : yes != 0); });
      if (!whole) report(i, std::countr_zero(mask), "warp instruction under a partial mask");
      break;
    }
    case Op::activemask:
      each([&](int lane) { put(0, lane, mask); });
      break;
    case Op::bar_warp:
      if (!whole) report(i, std::countr_zero(mask), "warp instruction under a partial mask");
      ++warp.epoch;
      break;
    case Op::cp_async:
      each([&](int lane) {
        const uint64_t to = get(warp, i, 0, lane) + uint64_t(i.offset);
        const uint64_t from = get(warp, i, 1, lane) + uint64_t(i.target);
        const int size = int(get(warp, i, 2, lane));
        const int taken = i.in.size() > 3 ? int(get(warp, i, 3, lane)) : size;
        Copy copy{to, std::vector<uint8_t>(size_t(size))};
        if (from % uint64_t(size)) report(i, lane, "misaligned global access");
        for (int n = 0; n < taken; ++n) load(i, lane, Space::global, from + uint64_t(n), 1, &copy.bytes[size_t(n)]);
        if (!shared(i, lane, to, size, true)) return;
        for (int n = 0; n < size; ++n) shadow_[to + uint64_t(n)].pending = true;
        warp.open.push_back(std::move(copy));
      });
      break;
    case Op::cp_commit:
      warp.groups.push_back(std::move(warp.open));
      warp.open.clear();
      break;
    case Op::cp_wait: {
      if (i.in.empty()) {
        warp.groups.push_back(std::move(warp.open));
        warp.open.clear();
      }
      const size_t keep = i.in.empty() ? 0 : size_t(get(warp, i, 0, std::countr_zero(mask)));
      while (warp.groups.size() > keep) {
        for (const Copy& copy : warp.groups.front()) {
          std::memcpy(&shared_[copy.to], copy.bytes.data(), copy.bytes.size());
          for (size_t n = 0; n < copy.bytes.size(); ++n) shadow_[copy.to + n].pending = false;
        }
        warp.groups.erase(warp.groups.begin());
      }
      break;
    }
    case Op::ldmatrix: {
      if (mask != ~uint32_t(0)) report(i, std::countr_zero(mask), "warp instruction under a partial mask");
      for (int n = 0; n < i.vector; ++n) {
        uint16_t matrix[8][8] = {};
        for (int row = 0; row < 8; ++row) {
          const int lane = n * 8 + row;
          load(i, lane, Space::shared, get(warp, i, 0, lane) + uint64_t(i.offset), 16,
               reinterpret_cast<uint8_t*>(matrix[row]));
        }
        each([&](int lane) {
          const int row = lane / 4, column = lane % 4 * 2;
          const uint32_t first = i.trans ? matrix[column][row] : matrix[row][column];
          const uint32_t second = i.trans ? matrix[column + 1][row] : matrix[row][column + 1];
          put(size_t(n), lane, first | second << 16);
        });
      }
      break;
    }
    case Op::mma:
      if (mask != ~uint32_t(0)) report(i, std::countr_zero(mask), "warp instruction under a partial mask");
      multiply(warp, i);
      break;
    case Op::fence:
      break;
    default:
      each([&](int lane) {
        put(0, lane,
            compute(i, get(warp, i, 0, lane), i.in.size() > 1 ? get(warp, i, 1, lane) : 0,
                    i.in.size() > 2 ? get(warp, i, 2, lane) : 0));
      });
  }
}

std::string& answer() {
  static std::string text;
  return text;
}

}  // namespace
}  // namespace ptx

// --- what Python calls ---------------------------------------------------------------------------

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

// Bytes of a kernel's parameters, or -1.
PTX_EXPORT int64_t ptx_param_bytes(const void* module, const char* name) {
  const auto& kernels = static_cast<const ptx::Module*>(module)->kernels;
  const auto found = kernels.find(name);
  if (found != kernels.end()) return found->second.param_bytes;
  ptx::answer() = std::string("no kernel ") + name;
  return -1;
}

// The instructions executed, or -1; ptx_answer() has the reports, one a line. ranges: begins and ends of the memory
// that the kernel may use. dims: grid, then block.
PTX_EXPORT int64_t ptx_launch(const void* module, const char* name, const uint32_t* dims, int64_t shared,
                              const uint8_t* params, int64_t param_bytes, const uint64_t* ranges, int count,
                              int backwards) {
  ptx::answer().clear();
  try {
    const auto& kernels = static_cast<const ptx::Module*>(module)->kernels;
    const auto found = kernels.find(name);
    if (found == kernels.end()) throw std::runtime_error(std::string("no kernel ") + name);
    if (param_bytes != found->second.param_bytes) throw std::runtime_error("parameters of another size");
    std::vector<ptx::Range> allowed;
    for (int n = 0; n < count; ++n) {
      const uint64_t begin = ranges[2 * n], end = ranges[2 * n + 1];
      allowed.push_back({begin, end, std::vector<int32_t>(end - begin), std::vector<int32_t>(end - begin)});
    }
    ptx::Launch launch(*static_cast<const ptx::Module*>(module), found->second, {dims[0], dims[1], dims[2]},
                       {dims[3], dims[4], dims[5]}, shared, params, allowed);
    launch.run(backwards != 0);
    for (const auto& report : launch.reports) ptx::answer() += report + "\n";
    return int64_t(launch.executed);
  } catch (const std::exception& error) {
    ptx::answer() = error.what();
    return -1;
  }
}
