// SIMD vectors of one instruction set, through the compiler's vector extensions.
//
// Everything in this file, and in every header that includes it, lives in a namespace named after
// the instruction set (MFEF_ISA), because the same source is compiled once per instruction set into
// one library: a function shared by name between two of them would be merged by the linker, and an
// old processor would run into a new instruction. For the same reason nothing of the standard library is
// used that could become a shared function: std::numeric_limits gives constants, std::sqrt is a built-in.
#pragma once

#include <cstdint>
#include <limits>
#include <utility>
#if defined(MFEF_ISA_avx512_bf16)
#include <immintrin.h>
#endif

#define MFEF_INLINE inline __attribute__((always_inline))
// For functions in which static_for() unrolls much: the compiler leaves lambdas of large functions as calls, and
// vectors then go through memory.
#define MFEF_FLATTEN __attribute__((flatten))

namespace mfef::cpu::MFEF_ISA {

#if defined(MFEF_ISA_avx512) || defined(MFEF_ISA_avx512_bf16)
constexpr int kVectorBytes = 64;
constexpr int kRegisters = 32;
#elif defined(MFEF_ISA_avx2)
constexpr int kVectorBytes = 32;
constexpr int kRegisters = 16;
#else
constexpr int kVectorBytes = 16;
constexpr int kRegisters = 16;
#endif

// The integer that has the width of T, for lane masks and indices.
template <class T>
struct IntOf;
template <>
struct IntOf<float> {
  using type = int32_t;
};
template <>
struct IntOf<double> {
  using type = int64_t;
};

template <class T>
struct VecOf {
  typedef T type __attribute__((vector_size(kVectorBytes)));
};
template <class T>
using Vec = typename VecOf<T>::type;
template <class T>
using IVec = typename VecOf<typename IntOf<T>::type>::type;

// Lanes of a vector of T. The lanes are images in one plan and pixels in the other.
template <class T>
constexpr int kLanes = kVectorBytes / int(sizeof(T));

template <class A>
MFEF_INLINE constexpr A min(A a, A b) {
  return b < a ? b : a;
}
template <class A>
MFEF_INLINE constexpr A max(A a, A b) {
  return a < b ? b : a;
}

// Calls f<0>(), ..., f<N - 1>(): a loop whose counter is a constant in every iteration, so that arrays indexed by it
// stay in registers.
template <int N, int I = 0, class F>
MFEF_INLINE constexpr void static_for(const F& f) {
  if constexpr (I < N) {
    f.template operator()<I>();
    static_for<N, I + 1>(f);
  }
}
// An argument that is a constant.
template <int I>
struct Index {
  static constexpr int value = I;
};
// Calls f(i, Index<4>{}) for every four of [begin, end), f(i, Index<1>{}) for the rest.
template <class F>
MFEF_INLINE void in_fours(int64_t begin, int64_t end, const F& f) {
  for (; begin + 4 <= end; begin += 4) f(begin, Index<4>{});
  for (; begin < end; ++begin) f(begin, Index<1>{});
}

template <class T>
MFEF_INLINE Vec<T> load(const T* p) {
  Vec<T> v;
  __builtin_memcpy(&v, p, sizeof(v));
  return v;
}
template <class T>
MFEF_INLINE void store(T* p, Vec<T> v) {
  __builtin_memcpy(p, &v, sizeof(v));
}
template <class T>
MFEF_INLINE Vec<T> splat(T a) {
  return a - Vec<T>{};  // a - 0 is a, also for -0, so the compiler broadcasts and subtracts nothing
}
template <class T>
MFEF_INLINE IVec<T> isplat(int64_t a) {
  return IVec<T>{} + typename IntOf<T>::type(a);
}
template <class To, class From>
MFEF_INLINE To bit_cast(From v) {
  static_assert(sizeof(To) == sizeof(From));
  To r;
  __builtin_memcpy(&r, &v, sizeof(r));
  return r;
}

// bfloat16 in memory; arithmetic is in float.
struct BFloat16 {
  uint16_t bits;
};

// Loads of the element type E into lanes of the compute type T, and back with rounding to nearest.
template <class T>
MFEF_INLINE Vec<T> load_elements(const T* p) {
  return load(p);
}
template <class T>
MFEF_INLINE void store_elements(T* p, Vec<T> v) {
  store(p, v);
}
MFEF_INLINE float to_compute(BFloat16 e) { return bit_cast<float>(uint32_t(e.bits) << 16); }
MFEF_INLINE float to_compute(float e) { return e; }
MFEF_INLINE double to_compute(double e) { return e; }
MFEF_INLINE void from_compute(float v, float* e) { *e = v; }
MFEF_INLINE void from_compute(double v, double* e) { *e = v; }
MFEF_INLINE void from_compute(float v, BFloat16* e) {
  uint32_t u = bit_cast<uint32_t>(v);
  // NaN is not rounded, which could carry its mantissa into infinity.
  e->bits = v != v ? uint16_t((u >> 16) | 0x40) : uint16_t((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}

// Two bfloat16 in one lane.
MFEF_INLINE float pair_of(BFloat16 first, BFloat16 second) {
  return bit_cast<float>(uint32_t(first.bits) | uint32_t(second.bits) << 16);
}

typedef uint16_t HalfVec __attribute__((vector_size(kVectorBytes / 2)));
typedef uint32_t WordVec __attribute__((vector_size(kVectorBytes)));

// The upper half of each lane is the nearest bfloat16.
MFEF_INLINE WordVec rounded(Vec<float> v) {
  WordVec u = bit_cast<WordVec>(v);
  // NaN is not rounded, which could carry its mantissa into infinity, but made quiet.
  return v != v ? u | 0x400000 : u + 0x7fff + ((u >> 16) & 1);
}

MFEF_INLINE Vec<float> load_elements(const BFloat16* p) {
  HalfVec h;
  __builtin_memcpy(&h, p, sizeof(h));
  return bit_cast<Vec<float>>(__builtin_convertvector(h, WordVec) << 16);
}
MFEF_INLINE void store_elements(BFloat16* p, Vec<float> v) {
#if defined(MFEF_ISA_avx512_bf16)
  const __m256bh h = _mm512_cvtneps_pbh(bit_cast<__m512>(v));
#else
  const HalfVec h = __builtin_convertvector(rounded(v) >> 16, HalfVec);
#endif
  __builtin_memcpy(p, &h, sizeof(h));
}

// Elements of E that fit into a lane: two of bfloat16, so that a transposition of them takes half of the shuffles.
template <class E, class T>
constexpr int kPerLane = int(sizeof(T) / sizeof(E));
// A vector of lanes with kPer elements each: unconverted if there are two, else converted to the compute type.
template <int kPer, class T, class E>
MFEF_INLINE Vec<T> load_lanes(const E* p) {
  if constexpr (kPer == 1) {
    return load_elements(p);
  } else {
    return load(reinterpret_cast<const T*>(p));
  }
}
template <int kPer, class T, class E>
MFEF_INLINE void store_lanes(E* p, Vec<T> v) {
  if constexpr (kPer == 1) {
    store_elements(p, v);
  } else {
    store(reinterpret_cast<T*>(p), v);
  }
}
// The first bfloat16 of every lane.
MFEF_INLINE Vec<float> first_of_lanes(Vec<float> lanes) { return bit_cast<Vec<float>>(bit_cast<WordVec>(lanes) << 16); }
// The elements of every lane, in the order of memory, as vectors of the compute type; and the reverse.
template <class T, int kPer>
MFEF_INLINE void split_lanes(Vec<T> lanes, Vec<T> (&elements)[kPer]) {
  if constexpr (kPer == 1) {
    elements[0] = lanes;
  } else {
    static_assert(kPer == kPerLane<BFloat16, T>);
    const WordVec u = bit_cast<WordVec>(lanes);
    elements[0] = first_of_lanes(lanes);
    elements[1] = bit_cast<Vec<T>>(u & 0xffff0000u);
  }
}
template <class T, int kPer>
MFEF_INLINE Vec<T> join_lanes(const Vec<T> (&elements)[kPer]) {
  if constexpr (kPer == 1) {
    return elements[0];
  } else {
    static_assert(kPer == kPerLane<BFloat16, T>);
#if defined(MFEF_ISA_avx512_bf16)
    // The instruction leaves one vector in each half; pairs are what a transposition wants.
    typedef uint16_t Halves __attribute__((vector_size(kVectorBytes)));
    constexpr Halves kPairs = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                               8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    const __m512bh both = _mm512_cvtne2ps_pbh(bit_cast<__m512>(elements[1]), bit_cast<__m512>(elements[0]));
    return bit_cast<Vec<T>>(_mm512_permutexvar_epi16(bit_cast<__m512i>(kPairs), bit_cast<__m512i>(both)));
#else
    return bit_cast<Vec<T>>((rounded(elements[0]) >> 16) | (rounded(elements[1]) & 0xffff0000u));
#endif
  }
}

// Dot products: two products of bfloat16 in the time of one FMA.
#if defined(MFEF_ISA_avx512_bf16)
constexpr bool kDotProducts = true;
// sum + the products of the two elements of every lane. Denormal numbers count as zero.
MFEF_INLINE Vec<float> add_dot_products(Vec<float> sum, Vec<float> a, Vec<float> b) {
  // The intrinsic has operands of a type of its own, and the compiler spills accumulators between the types.
  __asm__("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
  return sum;
}
#else
constexpr bool kDotProducts = false;
#endif

constexpr double inverse_factorial(int n) {
  double product = 1;
  for (int i = 2; i <= n; ++i) product *= i;
  return 1 / product;
}

// e^x for each lane, within 2 ulp: 2^n by the exponent's bits, e^r by its Taylor series on
// |r| <= ln(2) / 2, whose remainder is below half an ulp at the degrees used. Overflow and underflow
// are clamped to the last exponents that are normal numbers; NaN stays NaN.
template <class T>
MFEF_INLINE Vec<T> exp(Vec<T> x) {
  constexpr bool kFloat = sizeof(T) == 4;
  const T highest = kFloat ? T(88.0) : T(709.0), lowest = kFloat ? T(-87.0) : T(-708.0);
  const T magic = kFloat ? T(12582912.0) : T(6755399441055744.0);  // 1.5 * 2^(mantissa bits)
  x = x > highest ? splat<T>(highest) : x;
  x = x < lowest ? splat<T>(lowest) : x;
  Vec<T> shifted = x * T(1.4426950408889634074) + magic;  // integer part in the low bits
  Vec<T> n = shifted - magic;
  const T ln2_high = kFloat ? T(0.693145751953125) : T(6.93147180369123816490e-01);
  const T ln2_low = kFloat ? T(1.42860682030941723212e-06) : T(1.90821492927058770002e-10);
  Vec<T> r = (x - n * ln2_high) - n * ln2_low;
  constexpr int kDegree = kFloat ? 7 : 13;
  Vec<T> sum = splat<T>(T(inverse_factorial(kDegree)));
  static_for<kDegree>([&]<int i>() {
    constexpr T kCoefficient = T(inverse_factorial(kDegree - 1 - i));
    sum = sum * r + kCoefficient;
  });
  return bit_cast<Vec<T>>(bit_cast<IVec<T>>(sum) + (bit_cast<IVec<T>>(shifted) << (kFloat ? 23 : 52)));
}

template <class T>
MFEF_INLINE Vec<T> sigmoid(Vec<T> x) {
  Vec<T> s = T(1) / (T(1) + exp<T>(-x));
  // exp() is clamped, and below that the true value is not a normal number.
  return x < (sizeof(T) == 4 ? T(-87.0) : T(-708.0)) ? Vec<T>{} : s;
}

// 0, 1, ..., kLanes - 1 as a list of constants.
template <class T>
using LaneList = std::make_integer_sequence<int, kLanes<T>>;

// Blocks of S lanes change places between a and b: one step of a transposition.
template <class T, int S, int... J>
MFEF_INLINE void exchange_blocks(Vec<T>& a, Vec<T>& b, std::integer_sequence<int, J...>) {
  Vec<T> low = __builtin_shufflevector(a, b, ((J & S) == 0 ? J : kLanes<T> + J - S)...);
  Vec<T> high = __builtin_shufflevector(a, b, ((J & S) == 0 ? J + S : kLanes<T> + J)...);
  a = low;
  b = high;
}

// Transposes a square of kLanes x kLanes elements held in registers: at each step blocks of S x S
// change places across the diagonal.
template <class T, int S = 1>
MFEF_INLINE void transpose(Vec<T> (&rows)[kLanes<T>]) {
  if constexpr (S < kLanes<T>) {
    static_for<kLanes<T>>([&]<int kRow>() {
      if constexpr ((kRow & S) == 0) {
        exchange_blocks<T, S>(rows[kRow], rows[kRow + S], LaneList<T>{});
      }
    });
    transpose<T, S * 2>(rows);
  }
}

// Of every two neighbouring blocks of S lanes, the first becomes the sum of both blocks of a, the second that of b. One
// of the two operands is a blend, which runs on any port; an exchange would take two shuffles.
template <class T, int S, int... J>
MFEF_INLINE Vec<T> add_blocks(Vec<T> a, Vec<T> b, std::integer_sequence<int, J...>) {
  Vec<T> own = __builtin_shufflevector(a, b, ((J & S) == 0 ? J : kLanes<T> + J)...);
  Vec<T> other = __builtin_shufflevector(a, b, ((J & S) == 0 ? J + S : kLanes<T> + J - S)...);
  return own + other;
}

// Element i of the result is the sum of the lanes of rows[i], added pairwise: a fixed order with
// log2(kLanes) rounding steps. It takes half of a transposition's shuffles, since every step halves the rows.
template <class T, int S = 1>
MFEF_INLINE Vec<T> sums_of_lanes(Vec<T> (&rows)[kLanes<T>]) {
  if constexpr (S < kLanes<T>) {
    static_for<kLanes<T>>([&]<int kRow>() {
      if constexpr (kRow % (2 * S) == 0) {
        rows[kRow] = add_blocks<T, S>(rows[kRow], rows[kRow + S], LaneList<T>{});
      }
    });
    return sums_of_lanes<T, S * 2>(rows);
  } else {
    return rows[0];
  }
}

template <class T>
MFEF_INLINE Vec<T> absolute(Vec<T> v) {
  return bit_cast<Vec<T>>(bit_cast<IVec<T>>(v) & std::numeric_limits<typename IntOf<T>::type>::max());
}

// Whether a comparison holds in any lane.
template <class T>
MFEF_INLINE bool any_lane(IVec<T> lanes) {
  bool any = false;
  for (int i = 0; i < kLanes<T>; ++i) any |= lanes[i] != 0;
  return any;
}

template <class T>
MFEF_INLINE T sum_of_lanes(Vec<T> v) {
  T lane[kLanes<T>];
  store(lane, v);
  for (int width = kLanes<T> / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) lane[i] += lane[i + width];
  }
  return lane[0];
}

}  // namespace mfef::cpu::MFEF_ISA
