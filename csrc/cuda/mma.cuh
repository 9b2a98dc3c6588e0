// Products of matrices by tensor cores: C += A B with C 16 x 8 in float32, and A 16 x K, B K x 8 in bfloat16, float16
// or TF32, a warp at a time.
//
// Everything is counted in words of 32 bits, which are two neighbours along K, or one in TF32: then all types have the
// same places. A product takes kWords words along K, 8 (K = 16, in TF32 8) or 4 (K = 8, in TF32 4). Its
// operands are cut into matrices of 8 rows x 4 words, the same for both: rows are those of A, and the columns of B. A
// lane has the word (lane / 4, lane % 4) of each, matrix m in register m:
//
//     A: matrix m has rows [8 (m % 2), + 8), words [4 (m / 2), + 4)     B: words [4 m, + 4)
//     C: value i is at row lane / 4 + 8 (i / 2), column 2 (lane % 4) + i % 2
//
// So what lies in shared memory as [row][word], with a row 4 words more than a multiple of 8, is read without
// conflicts, by words or by load_matrices.
#pragma once

#include <type_traits>

#include "device.cuh"

namespace mfef::cuda {

// float32 with 10 bits of mantissa, as an operand only.
struct Tf32 {};

template <class T>
constexpr int kPerWord = sizeof(T) == 2 ? 2 : 1;

// What is in memory of an operand T.
template <class T>
using Stored = std::conditional_t<std::is_same_v<T, Tf32>, float, T>;

// f(T()) with the operand that tensor cores take for elements.
template <class F>
MFEF_DEVICE void with_operand(Element element, const F& f) {
  with_element(element, [&](auto zero) {
    if constexpr (std::is_same_v<decltype(zero), float>) {
      f(Tf32());
    } else {
      f(zero);
    }
  });
}

struct Place {
  int row, column;  // in an operand: the column is a word
};
MFEF_HD Place place_in_a(int lane, int reg) { return {lane / 4 + reg % 2 * 8, lane % 4 + reg / 2 * 4}; }
MFEF_HD Place place_in_b(int lane, int reg) { return {lane / 4, lane % 4 + reg * 4}; }
MFEF_HD Place place_in_c(int lane, int i) { return {lane / 4 + i / 2 * 8, lane % 4 * 2 + i % 2}; }

// The words of a lane, and its part of C.
template <int kCount>
struct Fragment {
  uint32_t word[kCount];
};
template <int kWords>
using FragmentA = Fragment<kWords / 2>;
template <int kWords>
using FragmentB = Fragment<kWords / 4>;
struct Accumulator {
  float value[4];

  MFEF_DEVICE void add(const Accumulator& other) {
    MFEF_UNROLL
    for (int i = 0; i < 4; ++i) value[i] += other.value[i];
  }
};

// Products that one sum takes before it is added to another where there are many. Tensor cores do not round, they cut
// towards zero: a long chain would end too near it, by half a last place per product of matrices.
constexpr int kMatrixChain = 128;

// --- operands -----------------------------------------------------------------------------------

// To the nearest with 10 bits of mantissa, ties away from zero; NaN and infinity stay.
MFEF_DEVICE uint32_t tf32_word(float value) {
  uint32_t word;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(word) : "f"(value));
  return word;
}

// A word of kPerWord values, the first in its low bits; a float as it is.
template <class T>
MFEF_DEVICE uint32_t word_of(const float (&value)[kPerWord<T>]) {
  if constexpr (std::is_same_v<T, Tf32>) {
    return tf32_word(value[0]);
  } else if constexpr (kPerWord<T> == 1) {
    return __float_as_uint(value[0]);
  } else {
    return uint32_t(T(value[0]).x) | uint32_t(T(value[1]).x) << 16;
  }
}

// ldmatrix: a lane gives the address of row lane % 8 of matrix lane / 8.
#define MFEF_LDMATRIX(SHAPE, FORMAT, ADDRESS, ...) \
  asm volatile("ldmatrix.sync.aligned.m8n8." SHAPE ".shared.b16 " FORMAT ";" : __VA_ARGS__ : "r"(ADDRESS) : "memory")
template <int kCount, bool kTransposed>
MFEF_DEVICE void load_matrix_rows(uint32_t (&word)[kCount], const uint32_t* row) {
  const auto at = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  if constexpr (kCount == 1) {
    MFEF_LDMATRIX("x1", "{%0}, [%1]", at, "=r"(word[0]));
  } else if constexpr (kCount == 2 && !kTransposed) {
    MFEF_LDMATRIX("x2", "{%0, %1}, [%2]", at, "=r"(word[0]), "=r"(word[1]));
  } else if constexpr (kCount == 2) {
    MFEF_LDMATRIX("x2.trans", "{%0, %1}, [%2]", at, "=r"(word[0]), "=r"(word[1]));
  } else if constexpr (!kTransposed) {
    MFEF_LDMATRIX("x4", "{%0, %1, %2, %3}, [%4]", at, "=r"(word[0]), "=r"(word[1]), "=r"(word[2]), "=r"(word[3]));
  } else {
    MFEF_LDMATRIX("x4.trans", "{%0, %1, %2, %3}, [%4]", at, "=r"(word[0]), "=r"(word[1]), "=r"(word[2]), "=r"(word[3]));
  }
}
#undef MFEF_LDMATRIX

// Matrices to the registers of the warp: row r of matrix m is the 4 words from row(m, r) on, aligned to 16 bytes.
// to(thread) is the fragment of a lane.
template <int kCount, class To, class Row>
MFEF_DEVICE void load_matrices(const Warp& warp, const To& to, const Row& row) {
  static_assert(kCount == 1 || kCount == 2 || kCount == 4);
  warp.lanes([&](int thread) {
    Fragment<kCount>& f = to(thread);
    const int lane = thread % kWarp;
    load_matrix_rows<kCount, false>(f.word, row(lane / 8 % kCount, lane % 8));
  });
}

// The same of 16-bit elements with rows and columns exchanged: row r of matrix m is 8 elements from row(m, r) on, and
// the operand's row c is their elements c. So what lies in shared memory as [k][row] is read too.
template <int kCount, class To, class Row>
MFEF_DEVICE void load_transposed(const Warp& warp, const To& to, const Row& row) {
  static_assert(kCount == 2 || kCount == 4);
  warp.lanes([&](int thread) {
    Fragment<kCount>& f = to(thread);
    const int lane = thread % kWarp;
    load_matrix_rows<kCount, true>(f.word, row(lane / 8 % kCount, lane % 8));
  });
}

// --- products -----------------------------------------------------------------------------------

#define MFEF_MMA(SHAPE)                                                                                     \
  asm volatile("mma.sync.aligned." SHAPE " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                             \
               : "r"(a.word[0]), "r"(a.word[1]), "r"(a.word[2]), "r"(a.word[3]), "r"(b.word[0]), "r"(b.word[1]))
#define MFEF_HALF_MMA(SHAPE)                                                                    \
  asm volatile("mma.sync.aligned." SHAPE " {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};" \
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                 \
               : "r"(a.word[0]), "r"(a.word[1]), "r"(b.word[0]))

template <class T, int kWords>
MFEF_DEVICE void multiply_add_of_lane(float (&c)[4], const FragmentA<kWords>& a, const FragmentB<kWords>& b) {
  if constexpr (std::is_same_v<T, Tf32> && kWords == 8) {
    MFEF_MMA("m16n8k8.row.col.f32.tf32.tf32.f32");
  } else if constexpr (std::is_same_v<T, Tf32>) {
    MFEF_HALF_MMA("m16n8k4.row.col.f32.tf32.tf32.f32");
  } else if constexpr (std::is_same_v<T, c10::BFloat16> && kWords == 8) {
    MFEF_MMA("m16n8k16.row.col.f32.bf16.bf16.f32");
  } else if constexpr (std::is_same_v<T, c10::BFloat16>) {
    MFEF_HALF_MMA("m16n8k8.row.col.f32.bf16.bf16.f32");
  } else if constexpr (kWords == 8) {
    MFEF_MMA("m16n8k16.row.col.f32.f16.f16.f32");
  } else {
    MFEF_HALF_MMA("m16n8k8.row.col.f32.f16.f16.f32");
  }
}
#undef MFEF_MMA
#undef MFEF_HALF_MMA

// C += A B. c(thread), a(thread) and b(thread) are the Accumulator and the fragments of a lane.
template <class T, int kWords, class C, class A, class B>
MFEF_DEVICE void multiply_add(const Warp& warp, const C& c, const A& a, const B& b) {
  static_assert(kWords == 8 || kWords == 4);
  warp.lanes([&](int thread) { multiply_add_of_lane<T, kWords>(c(thread).value, a(thread), b(thread)); });
}

}  // namespace mfef::cuda
