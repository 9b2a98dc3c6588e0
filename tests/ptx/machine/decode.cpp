// From the registers of PTX, each of which is written about once, to few slots; and the arithmetic of every
// instruction, as a loop over lanes that the compiler vectorises.
#include <algorithm>
#include <bit>
#include <cfenv>
#include <cmath>
#include <limits>

#include "count.h"
#include "halves.h"
#include "module.h"

namespace ptx {
namespace {

// --- slots ---------------------------------------------------------------------------------------

struct Life {
  int first = std::numeric_limits<int>::max(), last = -1, first_write = std::numeric_limits<int>::max();
};

// Where in the code each register is needed, at least.
std::vector<Life> lives_of(const Kernel& kernel) {
  const int constants = int(kernel.constants.size());
  std::vector<Life> lives(size_t(kernel.slots - constants));
  auto see = [&](int slot, int at, bool writes) {
    if (slot < constants) return;
    Life& life = lives[size_t(slot - constants)];
    life.first = std::min(life.first, at);
    life.last = std::max(life.last, at);
    if (writes) life.first_write = std::min(life.first_write, at);
  };
  std::vector<std::array<int, 2>> loops;
  for (int at = 0; at < int(kernel.code.size()); ++at) {
    const Instruction& i = kernel.code[size_t(at)];
    for (int slot : i.in) see(slot, at, false);
    for (int slot : i.out) see(slot, at, true);
    see(i.guard, at, false);
    // A register that a guarded instruction or a divergent branch leaves alone in some lanes keeps their values: it was
    // written before, so it lives already.
    if (i.op == Op::bra && i.target <= at) loops.push_back({i.target, at});
  }
  // What a loop reads before it writes it, or what comes from before it, lives as long as the loop.
  for (bool changed = true; changed;) {
    changed = false;
    for (const auto& [begin, end] : loops) {
      for (Life& life : lives) {
        if (life.last < begin || life.first > end) continue;
        const bool carried = life.first < begin || life.first < life.first_write || life.last > end;
        if (!carried) continue;
        const Life before = life;
        life.last = std::max(life.last, end);
        if (life.first >= begin) life.first = begin;
        changed |= life.last != before.last || life.first != before.first;
      }
    }
  }
  return lives;
}

void share_slots(Kernel& kernel) {
  const int constants = int(kernel.constants.size());
  const std::vector<Life> lives = lives_of(kernel);
  std::vector<int> order, place(lives.size(), -1), free;
  for (int r = 0; r < int(lives.size()); ++r) {
    if (lives[size_t(r)].last >= 0) order.push_back(r);
  }
  std::stable_sort(order.begin(), order.end(),
                   [&](int a, int b) { return lives[size_t(a)].first < lives[size_t(b)].first; });
  std::vector<std::pair<int, int>> busy;  // a heap of where slots become free
  int slots = 0;
  for (int r : order) {
    while (!busy.empty() && -busy.front().first < lives[size_t(r)].first) {
      std::pop_heap(busy.begin(), busy.end());
      free.push_back(busy.back().second);
      busy.pop_back();
    }
    if (free.empty()) free.push_back(slots++);
    place[size_t(r)] = free.back();
    free.pop_back();
    busy.emplace_back(-lives[size_t(r)].last, place[size_t(r)]);
    std::push_heap(busy.begin(), busy.end());
  }
  auto move = [&](int& slot) {
    if (slot >= constants) slot = constants + place[size_t(slot - constants)];
  };
  for (Instruction& i : kernel.code) {
    for (int& slot : i.in) move(slot);
    for (int& slot : i.out) move(slot);
    move(i.guard);
  }
  kernel.slots = constants + slots;
}

// --- lanes ---------------------------------------------------------------------------------------

template <class T>
T read(const Register& r, int lane) {
  if constexpr (sizeof(T) == 8) {
    return std::bit_cast<T>(r.get(lane));
  } else if constexpr (sizeof(T) == 4) {
    return std::bit_cast<T>(r.low[lane]);
  } else {
    return T(r.low[lane]);
  }
}

template <class T>
uint64_t bits_of(T value) {
  if constexpr (sizeof(T) == 8) {
    return std::bit_cast<uint64_t>(value);
  } else if constexpr (sizeof(T) == 4) {
    return std::bit_cast<uint32_t>(value);
  } else {
    return std::make_unsigned_t<T>(value);
  }
}

template <class T>
void write(Register& r, const T* values, uint32_t mask) {
  if (mask == ~uint32_t(0)) {
    for (int lane = 0; lane < kLanes; ++lane) {
      const uint64_t bits = bits_of(values[lane]);
      r.low[lane] = uint32_t(bits);
      r.high[lane] = uint32_t(bits >> 32);
    }
  } else {
    for (int lane = 0; lane < kLanes; ++lane) {
      const bool on = mask >> lane & 1;
      const uint64_t bits = bits_of(values[lane]);
      r.low[lane] = on ? uint32_t(bits) : r.low[lane];
      r.high[lane] = on ? uint32_t(bits >> 32) : r.high[lane];
    }
  }
}

// The result of F, of type To, from up to three operands of type From; missing ones are any register.
template <class To, class From, class F>
void apply(Register* r, const Instruction& i, uint32_t mask) {
  To result[kLanes];
  const Register &a = r[i.in[0]], &b = r[i.in[1]], &c = r[i.in[2]];
  for (int lane = 0; lane < kLanes; ++lane) {
    result[lane] = F()(read<From>(a, lane), read<From>(b, lane), read<From>(c, lane));
  }
  write(r[i.out[0]], result, mask);
}

template <class F>
Instruction::Handler of_integers(const Type& type) {
  const bool is_signed = type.kind == 's';
  if (type.bits == 16) return is_signed ? apply<int16_t, int16_t, F> : apply<uint16_t, uint16_t, F>;
  if (type.bits == 32) return is_signed ? apply<int32_t, int32_t, F> : apply<uint32_t, uint32_t, F>;
  if (type.bits == 64) return is_signed ? apply<int64_t, int64_t, F> : apply<uint64_t, uint64_t, F>;
  return nullptr;
}

// float32 whose subnormal operands and results are 0.
template <class F>
struct Flushed {
  static float flush(float v) { return std::fabs(v) < 0x1p-126f ? std::copysign(0.0f, v) : v; }
  float operator()(float a, float b, float c) const { return flush(F()(flush(a), flush(b), flush(c))); }
};

// One or two values of 16 bits; everything but fma is right also when rounded twice, and fma is rounded once.
template <class F, bool kBFloat, int kCount>
struct OfHalves {
  uint32_t operator()(uint32_t a, uint32_t b, uint32_t c) const {
    uint32_t result = 0;
    for (int n = 0; n < kCount; ++n) {
      auto part = [&](uint32_t x) { return double(widen(uint16_t(x >> 16 * n), kBFloat)); };
      result |= uint32_t(narrow(F()(part(a), part(b), part(c)), kBFloat)) << 16 * n;
    }
    return result;
  }
};

template <class F>
Instruction::Handler of_floats(const Instruction& i) {
  const Type& type = i.type;
  if (type.kind == 'f' && type.bits == 64) return apply<double, double, F>;
  if (type.kind == 'f') return i.ftz ? apply<float, float, Flushed<F>> : apply<float, float, F>;
  if (type.bfloat) {
    if (type.count == 2) return apply<uint32_t, uint32_t, OfHalves<F, true, 2>>;
    return apply<uint32_t, uint32_t, OfHalves<F, true, 1>>;
  }
  if (type.count == 2) return apply<uint32_t, uint32_t, OfHalves<F, false, 2>>;
  return apply<uint32_t, uint32_t, OfHalves<F, false, 1>>;
}

template <class F>
Instruction::Handler of_numbers(const Instruction& i) {
  return i.type.kind == 'f' || i.type.kind == 'h' ? of_floats<F>(i) : of_integers<F>(i.type);
}

// --- the instructions ----------------------------------------------------------------------------

template <class T>
constexpr bool kFloating = std::is_floating_point_v<T>;
template <class T>
using Unsigned = std::make_unsigned_t<T>;

struct Add {
  template <class T>
  T operator()(T a, T b, T) const {
    if constexpr (kFloating<T>)
      return a + b;
    else
      return T(Unsigned<T>(a) + Unsigned<T>(b));
  }
};
struct Subtract {
  template <class T>
  T operator()(T a, T b, T) const {
    if constexpr (kFloating<T>)
      return a - b;
    else
      return T(Unsigned<T>(a) - Unsigned<T>(b));
  }
};
struct Multiply {
  template <class T>
  T operator()(T a, T b, T) const {
    if constexpr (kFloating<T>)
      return a * b;
    else
      return T(uint64_t(a) * uint64_t(b));
  }
};
struct MultiplyAdd {
  template <class T>
  T operator()(T a, T b, T c) const {
    if constexpr (kFloating<T>)
      return std::fma(a, b, c);
    else
      return T(uint64_t(a) * uint64_t(b) + uint64_t(c));
  }
};
template <class T>
T high_product(T a, T b) {
  using Wide = std::conditional_t<std::is_signed_v<T>, __int128, unsigned __int128>;
  return T(Wide(a) * Wide(b) >> 8 * sizeof(T));
}
struct MultiplyHigh {
  template <class T>
  T operator()(T a, T b, T) const {
    return high_product(a, b);
  }
};
struct MultiplyHighAdd {
  template <class T>
  T operator()(T a, T b, T c) const {
    return T(Unsigned<T>(high_product(a, b)) + Unsigned<T>(c));
  }
};
struct Divide {
  template <class T>
  T operator()(T a, T b, T) const {
    if constexpr (kFloating<T>)
      return a / b;
    else
      return b == 0 ? T(-1) : b == T(-1) && std::is_signed_v<T> ? T(-Unsigned<T>(a)) : T(a / b);
  }
};
struct Remainder {
  template <class T>
  T operator()(T a, T b, T) const {
    return b == 0 ? a : b == T(-1) && std::is_signed_v<T> ? T(0) : T(a % b);
  }
};
struct Minimum {
  template <class T>
  T operator()(T a, T b, T) const {
    if constexpr (kFloating<T>)
      return std::fmin(a, b);
    else
      return std::min(a, b);
  }
};
struct Maximum {
  template <class T>
  T operator()(T a, T b, T) const {
    if constexpr (kFloating<T>)
      return std::fmax(a, b);
    else
      return std::max(a, b);
  }
};
struct Negate {
  template <class T>
  T operator()(T a, T, T) const {
    if constexpr (kFloating<T>)
      return -a;
    else
      return T(-Unsigned<T>(a));
  }
};
struct Absolute {
  template <class T>
  T operator()(T a, T, T) const {
    if constexpr (kFloating<T>)
      return std::fabs(a);
    else
      return a < 0 ? T(-Unsigned<T>(a)) : a;
  }
};
struct PowerOf2 {
  template <class T>
  T operator()(T a, T, T) const {
    return T(std::exp2(double(a)));
  }
};
struct Reciprocal {
  template <class T>
  T operator()(T a, T, T) const {
    return T(1) / a;
  }
};
struct SquareRoot {
  template <class T>
  T operator()(T a, T, T) const {
    return std::sqrt(a);
  }
};
struct ReciprocalRoot {
  template <class T>
  T operator()(T a, T, T) const {
    return T(1 / std::sqrt(double(a)));
  }
};
struct And {
  template <class T>
  T operator()(T a, T b, T) const {
    return a & b;
  }
};
struct Or {
  template <class T>
  T operator()(T a, T b, T) const {
    return a | b;
  }
};
struct Xor {
  template <class T>
  T operator()(T a, T b, T) const {
    return a ^ b;
  }
};
struct Not {
  template <class T>
  T operator()(T a, T, T) const {
    return T(~a);
  }
};
struct NotPredicate {
  uint32_t operator()(uint32_t a, uint32_t, uint32_t) const { return a == 0; }
};
struct ExtractBits {
  template <class T>
  T operator()(T a, T b, T c) const {
    constexpr int kBits = 8 * sizeof(T);
    const int start = int(b & 255), length = int(c & 255);
    const bool negative = std::is_signed_v<T> && a < 0;
    if (length == 0) return 0;
    if (start >= kBits) return negative ? T(-1) : T(0);
    const T shifted = a >> start;
    if (length >= kBits - start) return shifted;  // beyond the end there are copies of the sign
    const Unsigned<T> kept = Unsigned<T>(shifted) & ((Unsigned<T>(1) << length) - 1);
    if constexpr (std::is_signed_v<T>)
      return T(kept << (kBits - length)) >> (kBits - length);
    else
      return kept;
  }
};
struct Permute {
  uint32_t operator()(uint32_t a, uint32_t b, uint32_t c) const {
    const uint64_t both = a | uint64_t(b) << 32;
    uint32_t result = 0;
    for (int n = 0; n < 4; ++n) {
      const uint32_t selector = c >> 4 * n & 15;
      uint32_t byte = uint32_t(both >> 8 * (selector & 7)) & 255;
      if (selector & 8) byte = byte & 128 ? 255 : 0;
      result |= byte << 8 * n;
    }
    return result;
  }
};
struct CountOnes {
  template <class T>
  uint32_t operator()(T a, T, T) const {
    return uint32_t(std::popcount(a));
  }
};
struct CountZeros {
  template <class T>
  uint32_t operator()(T a, T, T) const {
    return uint32_t(std::countl_zero(a));
  }
};

// The count is of 32 bits whatever the type is, and may be beyond it.
template <class T, bool kLeft>
void shift(Register* r, const Instruction& i, uint32_t mask) {
  constexpr uint32_t kBits = 8 * sizeof(T);
  T result[kLanes];
  for (int lane = 0; lane < kLanes; ++lane) {
    const T a = read<T>(r[i.in[0]], lane);
    const uint32_t by = r[i.in[1]].low[lane], inside = by < kBits ? by : kBits - 1;
    if constexpr (kLeft) {
      result[lane] = by < kBits ? T(a << inside) : T(0);
    } else {
      result[lane] = by < kBits || std::is_signed_v<T> ? T(a >> inside) : T(0);
    }
  }
  write(r[i.out[0]], result, mask);
}

template <bool kLeft>
Instruction::Handler shift_of(const Type& type) {
  const bool is_signed = type.kind == 's';
  if (type.bits == 16) return is_signed ? shift<int16_t, kLeft> : shift<uint16_t, kLeft>;
  if (type.bits == 32) return is_signed ? shift<int32_t, kLeft> : shift<uint32_t, kLeft>;
  return is_signed ? shift<int64_t, kLeft> : shift<uint64_t, kLeft>;
}

template <class To, class From, bool kAdd>
void wide_product(Register* r, const Instruction& i, uint32_t mask) {
  To result[kLanes];
  for (int lane = 0; lane < kLanes; ++lane) {
    const To product = To(read<From>(r[i.in[0]], lane)) * To(read<From>(r[i.in[1]], lane));
    if constexpr (kAdd) {
      result[lane] = To(Unsigned<To>(product) + Unsigned<To>(read<To>(r[i.in[2]], lane)));
    } else {
      result[lane] = product;
    }
  }
  write(r[i.out[0]], result, mask);
}

template <bool kAdd>
Instruction::Handler wide_product_of(const Type& type) {
  const bool is_signed = type.kind == 's';
  if (type.bits == 16) return is_signed ? wide_product<int32_t, int16_t, kAdd> : wide_product<uint32_t, uint16_t, kAdd>;
  if (type.bits == 32) return is_signed ? wide_product<int64_t, int32_t, kAdd> : wide_product<uint64_t, uint32_t, kAdd>;
  return nullptr;
}

void look_up(Register* r, const Instruction& i, uint32_t mask) {
  uint32_t result[kLanes];
  const uint32_t table = r[i.in[3]].low[0];
  for (int lane = 0; lane < kLanes; ++lane) {
    const uint32_t a = r[i.in[0]].low[lane], b = r[i.in[1]].low[lane], c = r[i.in[2]].low[lane];
    uint32_t bits = 0;
    for (uint32_t n = 0; n < 8; ++n) {
      const uint32_t chosen = -(table >> n & 1);
      bits |= chosen & (n & 4 ? a : ~a) & (n & 2 ? b : ~b) & (n & 1 ? c : ~c);
    }
    result[lane] = bits;
  }
  write(r[i.out[0]], result, mask);
}

// fma.rm, .rp and .rz.
void directed_fma(Register* r, const Instruction& i, uint32_t mask) {
  std::fesetround(i.mode == 'm' ? FE_DOWNWARD : i.mode == 'p' ? FE_UPWARD : FE_TOWARDZERO);
  if (i.ftz) {
    apply<float, float, Flushed<MultiplyAdd>>(r, i, mask);
  } else {
    apply<float, float, MultiplyAdd>(r, i, mask);
  }
  std::fesetround(FE_TONEAREST);
}

struct Saturate {
  float operator()(float a, float, float) const { return std::isnan(a) ? 0.0f : std::clamp(a, 0.0f, 1.0f); }
};
// The float32 result of another handler, cut to [0, 1].
template <class F>
struct Saturated {
  float operator()(float a, float b, float c) const { return Saturate()(F()(a, b, c), 0, 0); }
};

// --- moves and choices ---------------------------------------------------------------------------

struct First {
  template <class T>
  T operator()(T a, T, T) const {
    return a;
  }
};

void move(Register* r, const Instruction& i, uint32_t mask) {
  const int width = i.type.bits;
  if (i.in.size() == i.out.size()) {
    return width == 64 ? apply<uint64_t, uint64_t, First>(r, i, mask) : apply<uint32_t, uint32_t, First>(r, i, mask);
  }
  const bool packs = i.out.size() == 1;
  const int count = packs ? i.in.size() : i.out.size(), bits = width / count;
  for (int lane = 0; lane < kLanes; ++lane) {
    if (!(mask >> lane & 1)) continue;
    if (packs) {
      uint64_t value = 0;
      for (int n = 0; n < count; ++n) value |= r[i.in[n]].get(lane) << bits * n;
      r[i.out[0]].set(lane, value);
    } else {
      const uint64_t value = r[i.in[0]].get(lane), kept = (uint64_t(1) << bits) - 1;
      for (int n = 0; n < count; ++n) {
        if (i.out[n] >= 0) r[i.out[n]].set(lane, value >> bits * n & kept);
      }
    }
  }
}

void select(Register* r, const Instruction& i, uint32_t mask) {
  uint64_t result[kLanes];
  for (int lane = 0; lane < kLanes; ++lane) {
    const bool first = (r[i.in[2]].low[lane] != 0) != (i.in_not >> 2 & 1);
    result[lane] = r[i.in[first ? 0 : 1]].get(lane);
  }
  if (i.type.bits == 64) {
    write(r[i.out[0]], result, mask);
  } else {
    uint32_t low[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) low[lane] = uint32_t(result[lane]);
    write(r[i.out[0]], low, mask);
  }
}

// f(whether a and b compare so), the comparison chosen outside of the loop over lanes.
template <class F>
void with_comparison(Compare compare, const F& f) {
  auto unordered = [](auto a, auto b) { return a != a || b != b; };
  switch (compare) {
    case Compare::eq:
      return f([](auto a, auto b) { return a == b; });
    case Compare::ne:
      return f([=](auto a, auto b) { return a != b && !unordered(a, b); });
    case Compare::lt:
      return f([](auto a, auto b) { return a < b; });
    case Compare::le:
      return f([](auto a, auto b) { return a <= b; });
    case Compare::gt:
      return f([](auto a, auto b) { return a > b; });
    case Compare::ge:
      return f([](auto a, auto b) { return a >= b; });
    case Compare::equ:
      return f([=](auto a, auto b) { return a == b || unordered(a, b); });
    case Compare::neu:
      return f([](auto a, auto b) { return a != b; });
    case Compare::ltu:
      return f([](auto a, auto b) { return !(a >= b); });
    case Compare::leu:
      return f([](auto a, auto b) { return !(a > b); });
    case Compare::gtu:
      return f([](auto a, auto b) { return !(a <= b); });
    case Compare::geu:
      return f([](auto a, auto b) { return !(a < b); });
    case Compare::num:
      return f([=](auto a, auto b) { return !unordered(a, b); });
    case Compare::nan:
      return f([=](auto a, auto b) { return unordered(a, b); });
  }
}

template <class Read>
void compare_with(Register* r, const Instruction& i, uint32_t mask, const Read& value) {
  uint32_t found[kLanes], other[kLanes];
  with_comparison(i.compare, [&](auto holds) {
    for (int lane = 0; lane < kLanes; ++lane) found[lane] = holds(value(0, lane), value(1, lane));
  });
  for (int lane = 0; lane < kLanes; ++lane) {
    other[lane] = !found[lane];
    if (i.combine == ' ') continue;
    const bool third = (r[i.in[2]].low[lane] != 0) != (i.in_not >> 2 & 1);
    auto join = [&](uint32_t& v) {
      v = i.combine == 'a' ? v && third : i.combine == 'o' ? v || third : (v != 0) != third;
    };
    join(found[lane]);
    join(other[lane]);
  }
  if (i.out[0] >= 0) write(r[i.out[0]], found, mask);
  if (i.out.size() > 1 && i.out[1] >= 0) write(r[i.out[1]], other, mask);
}

template <class T>
void compare(Register* r, const Instruction& i, uint32_t mask) {
  compare_with(r, i, mask, [&](int n, int lane) { return read<T>(r[i.in[n]], lane); });
}
template <bool kBFloat>
void compare_halves(Register* r, const Instruction& i, uint32_t mask) {
  compare_with(r, i, mask, [&](int n, int lane) { return widen(uint16_t(r[i.in[n]].low[lane]), kBFloat); });
}

Instruction::Handler compare_of(const Type& type) {
  if (type.kind == 'h') return type.count == 2 ? nullptr : type.bfloat ? compare_halves<true> : compare_halves<false>;
  if (type.kind == 'f') return type.bits == 32 ? compare<float> : compare<double>;
  const bool is_signed = type.kind == 's';
  if (type.bits == 16) return is_signed ? compare<int16_t> : compare<uint16_t>;
  if (type.bits == 32) return is_signed ? compare<int32_t> : compare<uint32_t>;
  return is_signed ? compare<int64_t> : compare<uint64_t>;
}

void convert_address(Register* r, const Instruction& i, uint32_t mask) {
  const uint64_t window = i.space == Space::shared ? kSharedWindow : i.space == Space::param ? kParamWindow : 0;
  for (int lane = 0; lane < kLanes; ++lane) {
    if (mask >> lane & 1) r[i.out[0]].set(lane, r[i.in[0]].get(lane) + (i.to ? -window : window));
  }
}

// --- conversions ---------------------------------------------------------------------------------

double rounded(double value, char mode) {
  switch (mode) {
    case 'N':
      return std::nearbyint(value);
    case 'Z':
      return std::trunc(value);
    case 'M':
      return std::floor(value);
    case 'P':
      return std::ceil(value);
    default:
      return value;
  }
}

uint64_t cut(uint64_t bits, int width) { return width == 64 ? bits : bits & ((uint64_t(1) << width) - 1); }
int64_t extend(uint64_t bits, int width) { return int64_t(bits << (64 - width)) >> (64 - width); }

uint64_t float_to_integer(double value, const Type& to) {
  if (std::isnan(value)) return 0;
  const bool is_signed = to.kind == 's';
  const double low = is_signed ? -std::ldexp(1.0, to.bits - 1) : 0;
  const double high = std::ldexp(1.0, is_signed ? to.bits - 1 : to.bits);
  if (value >= high) return cut(~uint64_t(0), is_signed ? to.bits - 1 : to.bits);
  value = std::max(value, low);
  return is_signed ? cut(uint64_t(int64_t(value)), to.bits) : uint64_t(value);
}

uint64_t float_to_float(const Instruction& i, double value) {
  if (i.saturate) value = std::isnan(value) ? 0 : std::clamp(value, 0.0, 1.0);
  if (i.type.kind == 'h') return narrow(value, i.type.bfloat);
  return i.type.bits == 32 ? bits_of(float(value)) : bits_of(value);
}

uint64_t convert_one(const Instruction& i, uint64_t bits) {
  const Type &to = i.type, &from = i.from;
  const bool to_float = to.kind == 'f' || to.kind == 'h';
  if (from.kind == 'f' || from.kind == 'h') {
    double value = widen(uint16_t(bits), from.bfloat);
    if (from.kind == 'f') {
      value = from.bits == 32 ? double(std::bit_cast<float>(uint32_t(bits))) : std::bit_cast<double>(bits);
    }
    if (i.ftz && std::fabs(value) < 0x1p-126) value = std::copysign(0.0, value);
    value = rounded(value, i.mode);
    return to_float ? float_to_float(i, value) : float_to_integer(value, to);
  }
  const bool is_signed = from.kind == 's';
  const int64_t integer = is_signed ? extend(bits, from.bits) : int64_t(cut(bits, from.bits));
  if (!to_float) return cut(uint64_t(integer), to.bits);
  if (to.kind == 'f' && to.bits == 32) return bits_of(is_signed ? float(integer) : float(uint64_t(integer)));
  return float_to_float(i, is_signed ? double(integer) : double(uint64_t(integer)));
}

// To the nearest with 10 bits of mantissa, ties away from zero (.rna) or to even; NaN and infinity stay.
uint32_t to_tf32(uint32_t bits, char mode) {
  if (std::isnan(std::bit_cast<float>(bits))) return 0x7fffffff;
  if ((bits & 0x7f800000) == 0x7f800000) return bits;
  return (bits + (mode == 'a' ? 0x1000 : 0xfff + (bits >> 13 & 1))) & 0xffffe000;
}

void convert(Register* r, const Instruction& i, uint32_t mask) {
  for (int lane = 0; lane < kLanes; ++lane) {
    if (!(mask >> lane & 1)) continue;
    const uint64_t a = r[i.in[0]].get(lane);
    uint64_t result = 0;
    if (i.type.kind == 't') {
      result = to_tf32(uint32_t(a), i.mode);
    } else if (i.type.count == 2) {
      auto half = [&](uint32_t bits) { return uint64_t(narrow(std::bit_cast<float>(bits), i.type.bfloat)); };
      result = half(uint32_t(a)) << 16 | half(r[i.in[1]].low[lane]);
    } else {
      result = convert_one(i, i.from.bits == 64 ? a : cut(a, i.from.bits));
    }
    r[i.out[0]].set(lane, result);
  }
}

template <class To, class From>
void convert_plainly(Register* r, const Instruction& i, uint32_t mask) {
  To result[kLanes];
  for (int lane = 0; lane < kLanes; ++lane) result[lane] = To(read<From>(r[i.in[0]], lane));
  write(r[i.out[0]], result, mask);
}
void from_bfloat(Register* r, const Instruction& i, uint32_t mask) {
  uint32_t result[kLanes];
  for (int lane = 0; lane < kLanes; ++lane) result[lane] = r[i.in[0]].low[lane] << 16;
  write(r[i.out[0]], result, mask);
}

Instruction::Handler convert_of(const Instruction& i) {
  const Type &to = i.type, &from = i.from;
  const std::string directions = "mpz";
  if ((to.kind == 'f' || to.kind == 'h') && directions.find(i.mode) != std::string::npos) return nullptr;
  auto is = [](const Type& t, const char* kinds, int bits) {
    return std::string(kinds).find(t.kind) != std::string::npos && t.bits == bits;
  };
  if (is(to, "sub", 64) && is(from, "s", 32)) return convert_plainly<int64_t, int32_t>;
  if (is(to, "sub", 64) && is(from, "ub", 32)) return convert_plainly<uint64_t, uint32_t>;
  if (is(to, "sub", 32) && is(from, "sub", 64)) return convert_plainly<uint32_t, uint64_t>;
  if (is(to, "f", 32) && is(from, "s", 32) && !i.saturate) return convert_plainly<float, int32_t>;
  if (is(to, "f", 32) && from.kind == 'h' && from.bfloat && !i.saturate && i.mode == ' ') return from_bfloat;
  return convert;
}

// --- the table -----------------------------------------------------------------------------------

Instruction::Handler saturated(const Instruction& i) {
  if (i.type.kind != 'f' || i.type.bits != 32 || i.ftz) return nullptr;
  if (i.op == Op::add) return apply<float, float, Saturated<Add>>;
  if (i.op == Op::mul) return apply<float, float, Saturated<Multiply>>;
  if (i.op == Op::fma) return apply<float, float, Saturated<MultiplyAdd>>;
  return nullptr;
}

Instruction::Handler product(const Instruction& i) {
  const bool adds = i.op == Op::mad;
  if (i.mode == 'w') return adds ? wide_product_of<true>(i.type) : wide_product_of<false>(i.type);
  if (i.mode == 'h') return adds ? of_integers<MultiplyHighAdd>(i.type) : of_integers<MultiplyHigh>(i.type);
  return adds ? of_numbers<MultiplyAdd>(i) : of_numbers<Multiply>(i);
}

Instruction::Handler handler_of(const Instruction& i) {
  const bool directed = i.mode == 'm' || i.mode == 'p' || i.mode == 'z';
  if (directed && i.op != Op::cvt) return i.op == Op::fma && i.type.bits == 32 ? directed_fma : nullptr;
  if (i.saturate && i.op != Op::cvt) return saturated(i);
  const bool predicate = i.type.kind == 'p';
  const Type word{'b', predicate ? 32 : i.type.bits};
  switch (i.op) {
    case Op::add:
      return of_numbers<Add>(i);
    case Op::sub:
      return of_numbers<Subtract>(i);
    case Op::mul:
    case Op::mad:
      return product(i);
    case Op::fma:
      return of_floats<MultiplyAdd>(i);
    case Op::div:
      return of_numbers<Divide>(i);
    case Op::rem:
      return of_integers<Remainder>(i.type);
    case Op::min:
      return of_numbers<Minimum>(i);
    case Op::max:
      return of_numbers<Maximum>(i);
    case Op::neg:
      return of_numbers<Negate>(i);
    case Op::abs:
      return of_numbers<Absolute>(i);
    case Op::and_:
      return of_integers<And>(word);
    case Op::or_:
      return of_integers<Or>(word);
    case Op::xor_:
      return of_integers<Xor>(word);
    case Op::not_:
      return predicate ? apply<uint32_t, uint32_t, NotPredicate> : of_integers<Not>(word);
    case Op::shl:
      return shift_of<true>(i.type);
    case Op::shr:
      return shift_of<false>(i.type);
    case Op::bfe:
      return of_integers<ExtractBits>(i.type);
    case Op::lop3:
      return look_up;
    case Op::prmt:
      return apply<uint32_t, uint32_t, Permute>;
    case Op::popc:
      return i.type.bits == 32 ? apply<uint32_t, uint32_t, CountOnes> : apply<uint32_t, uint64_t, CountOnes>;
    case Op::clz:
      return i.type.bits == 32 ? apply<uint32_t, uint32_t, CountZeros> : apply<uint32_t, uint64_t, CountZeros>;
    case Op::ex2:
      return of_floats<PowerOf2>(i);
    case Op::rcp:
      return of_floats<Reciprocal>(i);
    case Op::sqrt:
      return of_floats<SquareRoot>(i);
    case Op::rsqrt:
      return of_floats<ReciprocalRoot>(i);
    case Op::mov:
      return move;
    case Op::selp:
      return select;
    case Op::setp:
      return compare_of(i.type);
    case Op::cvt:
      return convert_of(i);
    case Op::cvta:
      return convert_address;
    default:
      return nullptr;
  }
}

bool needs_handler(Op op) { return op <= Op::rsqrt; }

}  // namespace

void decode(Kernel& kernel, const std::vector<std::string>& lines) {
  share_slots(kernel);
  for (Instruction& i : kernel.code) {
    i.handler = handler_of(i);
    i.kind = uint8_t(class_of(i));
    if (!i.handler && needs_handler(i.op)) {
      throw std::runtime_error("PTX line " + std::to_string(i.line) + ": unknown form of " + lines[size_t(i.line) - 1]);
    }
    i.uniform = i.op == Op::ld && i.space == Space::param && i.in[0] < int(kernel.constants.size());
    const bool memory = i.op == Op::ld || i.op == Op::st;
    const bool may_be_shared = i.space == Space::shared || i.space == Space::generic;
    kernel.narrow_shared |= memory && may_be_shared && i.type.bits < 32;
  }
}

}  // namespace ptx
