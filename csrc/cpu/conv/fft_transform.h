// Discrete Fourier transforms of small packed maps, a vector of lanes at a time.
//
// Everything is unrolled for a length known when compiling. A transform of a real vector is split by halves
// (decimation in frequency) down to odd lengths and to the odd frequencies of even ones, which are folded about
// their middle and multiplied with a small matrix of cosines and sines. For the lengths used here, 8 to 20, that is
// within a tenth of the operations of the best known algorithms, and the compiler contracts most of them to FMAs.
//
// The transform of n x n real numbers has n * n independent reals. It is stored as complex bins, re then im,
// each one vector: columns kx = 0 .. n / 2; of the first column, and for even n the last, rows
// ky = 0 .. n / 2, of the others all n. Bins whose imaginary part is zero (one for odd n, four for even n) keep it, so
// that all bins are multiplied alike.
#pragma once

#include "cpu/simd.h"

namespace mfef::cpu::MFEF_ISA {

// The Taylor series at 2 pi j / n, at most an eighth of a turn: of the sine if `odd`, else of the cosine.
constexpr double turn_series(int64_t j, int64_t n, int odd) {
  const double a = 6.283185307179586476925 * double(j) / double(n);
  double term = odd ? a : 1, sum = 0;
  for (int i = 0; i < 12; ++i) {
    sum += term;
    term *= -a * a / double((2 * i + 1 + odd) * (2 * i + 2 + odd));
  }
  return sum;
}
// cos and sin of 2 pi j / n, to double's last place: the angle is brought below an eighth of a turn exactly.
constexpr double sin_turn(int64_t j, int64_t n);
constexpr double cos_turn(int64_t j, int64_t n) {
  j = (j < 0 ? -j : j) % n;
  if (2 * j > n) j = n - j;
  if (4 * j > n) return -cos_turn(n - 2 * j, 2 * n);
  return 8 * j > n ? sin_turn(n - 4 * j, 4 * n) : turn_series(j, n, 0);
}
constexpr double sin_turn(int64_t j, int64_t n) {
  if (j < 0) return -sin_turn(-j, n);
  j %= n;
  if (2 * j > n) return -sin_turn(n - j, n);
  if (4 * j > n) return sin_turn(n - 2 * j, 2 * n);
  return 8 * j > n ? cos_turn(n - 4 * j, 4 * n) : turn_series(j, n, 1);
}

constexpr int kLongestFft = 20;

// Complex bins of the transform of an n x n map.
constexpr int64_t fft_bins(int64_t n) { return n % 2 ? (n * n + 1) / 2 : n * n / 2 + 2; }

// plus[j] = v[j] + v[kCount - j] and minus[j] = v[j] - v[kCount - j] for 0 < j < kCount / 2, of kCount elements of
// which the first kLive are not zero.
template <class T, int kCount, int kLive, int kPairs>
MFEF_INLINE void fold(const Vec<T> (&v)[kCount], Vec<T> (&plus)[kPairs + 1], Vec<T> (&minus)[kPairs + 1]) {
  static_for<kPairs>([&]<int i>() {
    constexpr int j = i + 1;
    if constexpr (kCount - j < kLive) {
      plus[j] = v[j] + v[kCount - j];
      minus[j] = v[j] - v[kCount - j];
    } else if constexpr (j < kLive) {
      plus[j] = minus[j] = v[j];
    }
  });
}

// X[k] = sum_j v[j] exp(-2 pi i j k / kN) for the odd k <= kN / 2, where v[j] stands for x[j] - x[j + kN / 2]: kN is
// even, v has kN / 2 elements, of which the first kLive are not zero. k = kN / 2, odd where kN / 2 is, is real.
template <class T, int kN, int kLive>
MFEF_INLINE void fft_odd(const Vec<T> (&v)[kN / 2], Vec<T> (&re)[kN / 2 + 1], Vec<T> (&im)[kN / 2 + 1]) {
  constexpr int q = kN / 2, kPairs = (q - 1) / 2;
  Vec<T> minus[kPairs + 1], plus[kPairs + 1];
  fold<T, q, kLive, kPairs>(v, plus, minus);
  static_for<q / 2 + q % 2>([&]<int i>() {
    constexpr int k = 2 * i + 1;
    Vec<T> r = v[0], s{};
    static_for<kPairs>([&]<int p>() {
      constexpr int j = p + 1;
      if constexpr (j < kLive) {
        constexpr T c = T(cos_turn(j * k, kN)), d = T(-sin_turn(j * k, kN));
        r += minus[j] * c;
        if constexpr (k < q) s = j == 1 ? plus[j] * d : s + plus[j] * d;
      }
    });
    if constexpr (q % 2 == 0 && q / 2 < kLive) {
      if constexpr (kPairs == 0) {
        s = k % 4 == 1 ? -v[q / 2] : v[q / 2];
      } else {
        s = k % 4 == 1 ? s - v[q / 2] : s + v[q / 2];
      }
    }
    re[k] = r;
    if constexpr (k < q) im[k] = s;
  });
}

// re[k], im[k], k = 0 .. kN / 2, of kN real numbers of which the first kLive are not zero. im[0], and im[kN / 2] of
// an even length, are zero and not written.
template <class T, int kN, int kLive>
MFEF_INLINE void fft(const Vec<T> (&x)[kN], Vec<T> (&re)[kN / 2 + 1], Vec<T> (&im)[kN / 2 + 1]) {
  static_assert(kLive >= 1 && kLive <= kN);
  if constexpr (kN == 1) {
    re[0] = x[0];
  } else if constexpr (kN % 2 == 0) {
    constexpr int q = kN / 2, kHalf = kLive < q ? kLive : q;
    Vec<T> u[q], v[q];
    static_for<q>([&]<int j>() {
      if constexpr (j + q < kLive) {
        u[j] = x[j] + x[j + q];
        v[j] = x[j] - x[j + q];
      } else if constexpr (j < kLive) {
        u[j] = v[j] = x[j];
      }
    });
    Vec<T> even_re[q / 2 + 1], even_im[q / 2 + 1];
    fft<T, q, kHalf>(u, even_re, even_im);
    fft_odd<T, kN, kHalf>(v, re, im);
    static_for<q / 2 + 1>([&]<int k>() {
      re[2 * k] = even_re[k];
      if constexpr (k > 0 && 2 * k < q) im[2 * k] = even_im[k];
    });
  } else {
    constexpr int kPairs = kN / 2;
    Vec<T> plus[kPairs + 1], minus[kPairs + 1];
    fold<T, kN, kLive, kPairs>(x, plus, minus);
    static_for<kPairs + 1>([&]<int k>() {
      Vec<T> r = x[0], s{};
      static_for<kPairs>([&]<int p>() {
        constexpr int j = p + 1;
        if constexpr (j < kLive) {
          if constexpr (k == 0) {
            r += plus[j];
          } else {
            constexpr T c = T(cos_turn(j * k, kN)), d = T(-sin_turn(j * k, kN));
            r += plus[j] * c;
            s = j == 1 ? minus[j] * d : s + minus[j] * d;
          }
        }
      });
      re[k] = r;
      if constexpr (k > 0) im[k] = s;
    });
  }
}

// The odd frequencies' part of the inverse for j < kN / 2; half a turn further on it has the other sign.
template <class T, int kN, int kTwice>
MFEF_INLINE void inverse_fft_odd(const Vec<T> (&re)[kN / 2 + 1], const Vec<T> (&im)[kN / 2 + 1],
                                 Vec<T> (&part)[kN / 2]) {
  constexpr int q = kN / 2, kPairs = (q - 1) / 2;
  static_for<kPairs + 1>([&]<int j>() {
    Vec<T> c{}, s{};
    static_for<q / 2 + q % 2>([&]<int p>() {
      constexpr int k = 2 * p + 1;
      constexpr double f = k < q ? kTwice : 1;
      constexpr T cosine = T(f * cos_turn(j * k, kN)), sine = T(f * sin_turn(j * k, kN));
      c = k == 1 ? re[k] * cosine : c + re[k] * cosine;
      if constexpr (k < q && j > 0) s = k == 1 ? im[k] * sine : s + im[k] * sine;
    });
    if constexpr (j == 0) {
      part[0] = c;
    } else {
      part[j] = c - s;
      part[q - j] = -c - s;
    }
  });
  if constexpr (q % 2 == 0) {
    Vec<T> s{};
    static_for<q / 2>([&]<int p>() {
      constexpr int k = 2 * p + 1;
      constexpr T sine = T(k % 4 == 1 ? -kTwice : kTwice);
      s = k == 1 ? im[k] * sine : s + im[k] * sine;
    });
    part[q / 2] = s;
  }
}

// x[j], j < kLive: re[0] + (-1)^j re[kN / 2] + kTwice * sum over 0 < k < kN / 2 of re[k] cos - im[k] sin. That is kN
// times the inverse of fft() with kTwice = 2, and with 1 where the caller has doubled those k.
template <class T, int kN, int kLive, int kTwice>
MFEF_INLINE void inverse_fft(const Vec<T> (&re)[kN / 2 + 1], const Vec<T> (&im)[kN / 2 + 1], Vec<T> (&x)[kN]) {
  if constexpr (kN == 1) {
    x[0] = re[0];
  } else if constexpr (kN % 2 == 0) {
    constexpr int q = kN / 2;
    Vec<T> even_re[q / 2 + 1], even_im[q / 2 + 1], even[q], odd[q];
    static_for<q / 2 + 1>([&]<int k>() {
      even_re[k] = re[2 * k];
      if constexpr (k > 0 && 2 * k < q) even_im[k] = im[2 * k];
    });
    inverse_fft<T, q, (kLive < q ? kLive : q), kTwice>(even_re, even_im, even);
    inverse_fft_odd<T, kN, kTwice>(re, im, odd);
    static_for<kLive>([&]<int j>() {
      if constexpr (j < q) {
        x[j] = even[j] + odd[j];
      } else {
        x[j] = even[j - q] - odd[j - q];
      }
    });
  } else {
    static_for<kN / 2 + 1>([&]<int j>() {
      Vec<T> c = re[0], s{};
      static_for<kN / 2>([&]<int p>() {
        constexpr int k = p + 1;
        constexpr T cosine = T(kTwice * cos_turn(j * k, kN)), sine = T(kTwice * sin_turn(j * k, kN));
        c += re[k] * cosine;
        if constexpr (j > 0) s = k == 1 ? im[k] * sine : s + im[k] * sine;
      });
      if constexpr (j == 0) {
        x[0] = c;
      } else {
        if constexpr (j < kLive) x[j] = c - s;
        if constexpr (kN - j < kLive) x[kN - j] = c + s;
      }
    });
  }
}

// --- rows and columns of a map --------------------------------------------------------------------
//
// Between the two directions lies half[row][n], the transform of a row as re[0], re[1], im[1], re[2], ...; for even n,
// re[n / 2] is the last.

template <class T, int kN, int kLive>
MFEF_INLINE void fft_row(const T* x, T* half) {
  constexpr int L = kLanes<T>;
  Vec<T> in[kN], re[kN / 2 + 1], im[kN / 2 + 1];
  static_for<kLive>([&]<int i>() { in[i] = load(x + i * L); });
  fft<T, kN, kLive>(in, re, im);
  store(half, re[0]);
  static_for<(kN - 1) / 2>([&]<int i>() {
    constexpr int k = i + 1;
    store(half + (2 * k - 1) * L, re[k]);
    store(half + 2 * k * L, im[k]);
  });
  if constexpr (kN % 2 == 0) store(half + (kN - 1) * L, re[kN / 2]);
}

// Column `at` of half, of which the first kLive rows are not zero.
template <class T, int kN, int kLive>
MFEF_INLINE void fft_column(const T* half, int64_t at, Vec<T> (&re)[kN / 2 + 1], Vec<T> (&im)[kN / 2 + 1]) {
  constexpr int L = kLanes<T>;
  Vec<T> in[kN];
  static_for<kLive>([&]<int i>() { in[i] = load(half + (i * kN + at) * L); });
  fft<T, kN, kLive>(in, re, im);
}

template <class T, int kN, int kLive>
MFEF_INLINE void fft_columns(const T* half, T* bins) {
  constexpr int L = kLanes<T>;
  auto put = [&](int64_t bin, Vec<T> re, Vec<T> im) {
    store(bins + 2 * bin * L, re);
    store(bins + (2 * bin + 1) * L, im);
  };
  // The column of a real row frequency is real.
  auto real_column = [&](int64_t at) {
    Vec<T> re[kN / 2 + 1], im[kN / 2 + 1];
    fft_column<T, kN, kLive>(half, at, re, im);
    put(0, re[0], Vec<T>{});
    static_for<(kN - 1) / 2>([&]<int i>() {
      constexpr int k = i + 1;
      put(k, re[k], im[k]);
    });
    if constexpr (kN % 2 == 0) put(kN / 2, re[kN / 2], Vec<T>{});
    bins += 2 * (kN / 2 + 1) * L;
  };
  real_column(0);
  for (int64_t kx = 1; kx <= (kN - 1) / 2; ++kx) {
    Vec<T> a_re[kN / 2 + 1], a_im[kN / 2 + 1], b_re[kN / 2 + 1], b_im[kN / 2 + 1];
    fft_column<T, kN, kLive>(half, 2 * kx - 1, a_re, a_im);
    fft_column<T, kN, kLive>(half, 2 * kx, b_re, b_im);
    put(0, a_re[0], b_re[0]);
    static_for<(kN - 1) / 2>([&]<int i>() {
      constexpr int k = i + 1;
      put(k, a_re[k] - b_im[k], a_im[k] + b_re[k]);
      put(kN - k, a_re[k] + b_im[k], b_re[k] - a_im[k]);
    });
    if constexpr (kN % 2 == 0) put(kN / 2, a_re[kN / 2], b_re[kN / 2]);
    bins += 2 * kN * L;
  }
  if constexpr (kN % 2 == 0) real_column(kN - 1);
}

// Rows [0, kLive) of half.
template <class T, int kN, int kLive>
MFEF_INLINE void inverse_fft_columns(const T* bins, T* half) {
  constexpr int L = kLanes<T>;
  auto re_of = [&](int64_t bin) { return load(bins + 2 * bin * L); };
  auto im_of = [&](int64_t bin) { return load(bins + (2 * bin + 1) * L); };
  auto put = [&](const Vec<T>(&x)[kN], int64_t at) {
    static_for<kLive>([&]<int i>() { store(half + (i * kN + at) * L, x[i]); });
  };
  auto real_column = [&](int64_t at) {
    Vec<T> re[kN / 2 + 1], im[kN / 2 + 1], x[kN];
    static_for<kN / 2 + 1>([&]<int k>() {
      re[k] = re_of(k);
      if constexpr (k > 0 && 2 * k < kN) im[k] = im_of(k);
    });
    inverse_fft<T, kN, kLive, 2>(re, im, x);
    put(x, at);
    bins += 2 * (kN / 2 + 1) * L;
  };
  real_column(0);
  for (int64_t kx = 1; kx <= (kN - 1) / 2; ++kx) {
    // Real and imaginary part of the column, each the transform of a real one; twice their frequencies.
    Vec<T> re[kN / 2 + 1], im[kN / 2 + 1], x[kN];
    re[0] = re_of(0);
    if constexpr (kN % 2 == 0) re[kN / 2] = re_of(kN / 2);
    static_for<(kN - 1) / 2>([&]<int i>() {
      constexpr int k = i + 1;
      re[k] = re_of(k) + re_of(kN - k);
      im[k] = im_of(k) - im_of(kN - k);
    });
    inverse_fft<T, kN, kLive, 1>(re, im, x);
    put(x, 2 * kx - 1);
    re[0] = im_of(0);
    if constexpr (kN % 2 == 0) re[kN / 2] = im_of(kN / 2);
    static_for<(kN - 1) / 2>([&]<int i>() {
      constexpr int k = i + 1;
      re[k] = im_of(k) + im_of(kN - k);
      im[k] = re_of(kN - k) - re_of(k);
    });
    inverse_fft<T, kN, kLive, 1>(re, im, x);
    put(x, 2 * kx);
    bins += 2 * kN * L;
  }
  if constexpr (kN % 2 == 0) real_column(kN - 1);
}

template <class T, int kN, int kLive>
MFEF_INLINE void inverse_fft_row(const T* half, Vec<T> (&x)[kN]) {
  constexpr int L = kLanes<T>;
  Vec<T> re[kN / 2 + 1], im[kN / 2 + 1];
  re[0] = load(half);
  static_for<(kN - 1) / 2>([&]<int i>() {
    constexpr int k = i + 1;
    re[k] = load(half + (2 * k - 1) * L);
    im[k] = load(half + 2 * k * L);
  });
  if constexpr (kN % 2 == 0) re[kN / 2] = load(half + (kN - 1) * L);
  inverse_fft<T, kN, kLive, 2>(re, im, x);
}

// --- maps and kernels -----------------------------------------------------------------------------
//
// Maps of kSide x kSide pixels are transformed in the corner of an n x n square. Kernels of k x k taps lie around its
// origin, tap (r, r) on it, so that products of transforms need no shift.

template <class T, int kN, int kSide>
MFEF_FLATTEN void fft_map(const T* x, T* bins) {
  constexpr int L = kLanes<T>;
  alignas(64) T half[kSide * kN * L];
  for (int64_t h = 0; h < kSide; ++h) fft_row<T, kN, kSide>(x + h * kSide * L, half + h * kN * L);
  fft_columns<T, kN, kSide>(half, bins);
}

// Adds a bias, one value, unless it is null. y may be `bins`.
template <class T, int kN, int kSide>
MFEF_FLATTEN void inverse_fft_map(const T* bins, const T* bias, T* y) {
  constexpr int L = kLanes<T>;
  alignas(64) T half[kSide * kN * L];
  inverse_fft_columns<T, kN, kSide>(bins, half);
  const Vec<T> shift = splat(bias ? *bias : T(0));
  for (int64_t h = 0; h < kSide; ++h, y += kSide * L) {
    Vec<T> x[kN];
    inverse_fft_row<T, kN, kSide>(half + h * kN * L, x);
    static_for<kSide>([&]<int i>() { store(y + i * L, x[i] + shift); });
  }
}

// taps: [k][k] vectors.
template <class T, int kN>
void fft_kernel(const T* taps, int k, T* bins) {
  constexpr int L = kLanes<T>;
  const int radius = k / 2;
  alignas(64) T half[kN * kN * L], row[kN * L];
  for (int i = 0; i < kN * kN; ++i) store(half + i * L, Vec<T>{});
  for (int j = 0; j < kN; ++j) store(row + j * L, Vec<T>{});
  for (int ky = 0; ky < k; ++ky, taps += k * L) {
    for (int kx = 0; kx < k; ++kx) store(row + (kx - radius + kN) % kN * L, load(taps + kx * L));
    fft_row<T, kN, kN>(row, half + (ky - radius + kN) % kN * kN * L);
  }
  fft_columns<T, kN, kN>(half, bins);
}

// taps += scale * the part of the inverse that a kernel covers.
template <class T, int kN>
void inverse_fft_kernel(const T* bins, int k, T scale, T* taps) {
  constexpr int L = kLanes<T>;
  const int radius = k / 2;
  alignas(64) T half[kN * kN * L], row[kN * L];
  inverse_fft_columns<T, kN, kN>(bins, half);
  for (int ky = 0; ky < k; ++ky, taps += k * L) {
    Vec<T> x[kN];
    inverse_fft_row<T, kN, kN>(half + (ky - radius + kN) % kN * kN * L, x);
    static_for<kN>([&]<int i>() { store(row + i * L, x[i]); });
    for (int kx = 0; kx < k; ++kx) {
      store(taps + kx * L, load(taps + kx * L) + load(row + (kx - radius + kN) % kN * L) * scale);
    }
  }
}

template <class T>
struct FftTable {
  int n;
  void (*map)(const T* x, T* bins);
  void (*inverse_map)(const T* bins, const T* bias, T* y);
  void (*kernel)(const T* taps, int k, T* bins);
  void (*inverse_kernel)(const T* bins, int k, T scale, T* taps);
};

// The transforms for maps of side x side under kernels of k x k, with the smallest length of at least side + k / 2,
// which keeps what wraps around off the map; null where there are none. Compiled in kernels_fft.cpp.
template <class T>
const FftTable<T>* fft_table(int64_t side, int64_t k);

template <class T, int kN, int kSide>
inline constexpr FftTable<T> kFftTable{kN, &fft_map<T, kN, kSide>, &inverse_fft_map<T, kN, kSide>, &fft_kernel<T, kN>,
                                       &inverse_fft_kernel<T, kN>};

}  // namespace mfef::cpu::MFEF_ISA
