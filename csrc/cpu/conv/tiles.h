// The convolution's three inner loops on packed maps: forward, data gradient (the forward loop with
// flipped weights) and weight gradient.
//
// A packed map holds one vector per pixel (lanes are images: "images" plan) or one vector per run of
// neighbouring pixels (lanes are pixels: "pixels" plan). One register tile is kOut output channels by
// kPix vectors; an input vector is loaded once per tap and used for all output channels of the tile,
// a weight is broadcast once per tap and used for all vectors of the tile.
//
//   layout   vector step   tap step   borders
//   kClip    kLanes        kLanes     the tile is a whole row; taps outside it are dropped at compile time
//   kPadded  kLanes        kLanes     rows carry k / 2 zero vectors on both sides
//   kPixels  kLanes        1          rows are joined by k / 2 zeros; the map is one long row
//
// In the images plan, rows of taps outside the map are skipped by the caller ([ky_begin, ky_end)).
// With dot products (bfloat16, where the instruction set has them) a lane of x holds pixels p and p + 1, and two
// neighbouring taps of a row are one instruction.
// Accumulation runs over (input channel, ky, kx) in this order, whatever the tile. A chain of additions
// has at most kChain products, or those of one input channel; longer sums are cut into chains that are
// added up, so that the rounding error grows with the square root of a chain, not of the sum.
#pragma once

#include "cpu/simd.h"

namespace mfef::cpu::MFEF_ISA {

enum Layout { kClip = 0, kPadded = 1, kPixels = 2, kFft = 3 };
constexpr int kLayouts = 3;  // those that have tiles; kFft has no borders and is read by transforms

constexpr int64_t kChain = 100;  // 4 channels of 5 x 5, 2 of 7 x 7, 1 of 9 x 9
// The same limit for the weight gradient, whose sums go over pixels: a map of 8 x 8. It holds per lane, since the lanes
// of a block that has fewer images than lanes do not shorten any chain.
constexpr int64_t kGradChain = 64;

// Kernel sizes that are compiled as constants; every other odd size runs with the loop count as a
// variable (entry 0).
constexpr int kKernelSizes[] = {0, 1, 3, 5, 7, 9};
constexpr int kKernelSizeCount = 6;
template <class T>
constexpr bool is_compiled_size(int64_t k) {
  // float64 is for gradient checks: one constant size keeps every layout covered.
  return sizeof(T) == 8 ? k == 3 : k == 1 || k == 3 || k == 5 || k == 7 || k == 9;
}
template <class T>
constexpr int kernel_size_index(int64_t k) {
  return is_compiled_size<T>(k) ? int(k + 1) / 2 : 0;
}

// Whether there are tiles of dot products.
template <class T>
constexpr bool has_dot_tiles(int64_t k) {
  return kDotProducts && sizeof(T) == sizeof(float) && is_compiled_size<T>(k) && k > 1;
}

// Tile widths in vectors, and output channels per tile.
constexpr int kPixCounts[] = {1, 2, 4, 7, 8};
constexpr int kPixCount = 5;
constexpr int kOutCounts[] = {1, 2, 3, 4, 8};
constexpr int kOutCount = 5;

// A tile is legal if its accumulators, its weights and one input vector fit into the registers.
constexpr bool tile_fits(int out, int pix) { return out * pix + out + 1 <= kRegisters; }

template <class T>
struct ConvTile {
  const T* x;  // kClip: pixel (0, 0) of the row that tap row 0 meets, else the tile's first tap
  int64_t x_channel, x_row;
  int64_t channels;
  int k, ky_begin, ky_end;
  const T* weights;  // [channel][ky][kx][out]
  T* y;
  int64_t y_channel;
  bool accumulate;  // add to y
  const T* bias;    // one value per output channel, added last, or null
};

template <class T>
using ConvTileFn = void (*)(const ConvTile<T>&);

// Stores the sums of a tile.
template <class T, int kOut, int kPix>
MFEF_INLINE void store_tile(const ConvTile<T>& a, const Vec<T> (&acc)[kOut][kPix]) {
  static_for<kOut>([&]<int o>() {
    static_for<kPix>([&]<int p>() {
      T* y = a.y + o * a.y_channel + p * kLanes<T>;
      Vec<T> sum = a.accumulate ? load(y) + acc[o][p] : acc[o][p];
      store(y, a.bias ? sum + splat(a.bias[o]) : sum);
    });
  });
}

template <class T, int kK, int kOut, int kPix, int kLayout>
void conv_tile(const ConvTile<T>& a) {
  constexpr int64_t kStep = kLanes<T>;
  constexpr int64_t kTap = kLayout == kPixels ? 1 : kLanes<T>;
  constexpr int kRadius = kK / 2;
  Vec<T> acc[kOut][kPix];
  static_for<kOut>([&]<int o>() { static_for<kPix>([&]<int p>() { acc[o][p] = Vec<T>{}; }); });
  const int k = kK ? kK : a.k;
  const T* channel = a.x;
  const T* weights = a.weights;
  for (int64_t c = 0; c < a.channels; ++c) {
    const T* row = channel + a.ky_begin * a.x_row;
    const T* w = weights + int64_t(a.ky_begin) * k * kOut;
    for (int ky = a.ky_begin; ky < a.ky_end; ++ky) {
      auto tap = [&]<int kTapX>(const T* xs, const T* ws, Index<kTapX>) {  // kTapX: kx - radius when clipping, else 0
        Vec<T> weight[kOut];
        static_for<kOut>([&]<int o>() { weight[o] = splat(ws[o]); });
        static_for<kPix>([&]<int p>() {
          if constexpr (kLayout != kClip || (p + kTapX >= 0 && p + kTapX < kPix)) {
            Vec<T> v = load(xs + p * kStep);
            static_for<kOut>([&]<int o>() { acc[o][p] += weight[o] * v; });
          }
        });
      };
      if constexpr (kK > 0) {
        static_for<kK>([&]<int kx>() {
          constexpr int kShift = kLayout == kClip ? kx - kRadius : 0;
          if constexpr (kLayout != kClip || (kShift > -kPix && kShift < kPix)) {
            tap(row + (kLayout == kClip ? kShift : kx) * kTap, w + kx * kOut, Index<kShift>{});
          }
        });
      } else {
        for (int kx = 0; kx < k; ++kx) tap(row + kx * kTap, w + kx * kOut, Index<0>{});
      }
      row += a.x_row;
      w += int64_t(k) * kOut;
    }
    channel += a.x_channel;
    weights += int64_t(k) * k * kOut;
  }
  store_tile<T, kOut, kPix>(a, acc);
}

#if defined(MFEF_ISA_avx512_bf16)
// conv_tile() with dot products, for kClip and kPadded. A lane of x holds a pixel and the next one of its row
// (pair_pixels()); a row of weights is the k taps as float, then taps 2 j and 2 j + 1 as pairs. The last tap, and a tap
// whose partner is clipped, are multiplied as float, so that only products of a tap and a pixel that meet enter a sum.
template <int kK, int kOut, int kPix, int kLayout>
void conv_dot_tile(const ConvTile<float>& a) {
  static_assert(kK > 1 && kLayout != kPixels);
  constexpr int64_t kStep = kLanes<float>;
  constexpr int kLeft = kLayout == kClip ? kK / 2 : 0;  // from a.x to the row's first tap
  constexpr int64_t kRow = int64_t(kK + kK / 2) * kOut;
  Vec<float> acc[kOut][kPix];
  static_for<kOut>([&]<int o>() { static_for<kPix>([&]<int p>() { acc[o][p] = Vec<float>{}; }); });
  const float* channel = a.x;
  const float* weights = a.weights;
  for (int64_t c = 0; c < a.channels; ++c) {
    const float* row = channel + a.ky_begin * a.x_row;
    const float* w = weights + a.ky_begin * kRow;
    for (int ky = a.ky_begin; ky < a.ky_end; ++ky) {
      // Hides from the compiler that every pair reads the same row: it would keep vectors of the row in registers from
      // one pair to the next and spill accumulators.
      auto apart = [](const float* x) {
        __asm__ volatile("" : "+r"(x));
        return x;
      };
      // Tap kTap alone, at pixels [kBegin, kEnd).
      auto tap = [&]<int kTap, int kBegin, int kEnd>(Index<kTap>, Index<kBegin>, Index<kEnd>) {
        if constexpr (kBegin < kEnd) {
          Vec<float> weight[kOut];
          static_for<kOut>([&]<int o>() { weight[o] = splat(w[kTap * kOut + o]); });
          static_for<kEnd - kBegin>([&]<int i>() {
            constexpr int p_ = kBegin + i;
            const Vec<float> v = first_of_lanes(load(row + (p_ + kTap - kLeft) * kStep));
            static_for<kOut>([&]<int o>() { acc[o][p_] += weight[o] * v; });
          });
        }
      };
      static_for<kK / 2>([&]<int kPair>() {
        constexpr int kTap = 2 * kPair;
        // Pixels where both taps meet the row. When clipping, the second does from kBegin - 1 on, the first until kEnd.
        constexpr int kBegin = kLayout == kClip ? max(0, kLeft - kTap) : 0;
        constexpr int kEnd = kLayout == kClip ? min(kPix, kPix - 1 + kLeft - kTap) : kPix;
        if constexpr (kBegin < kEnd) {
          Vec<float> weight[kOut];
          static_for<kOut>([&]<int o>() { weight[o] = splat(w[(kK + kPair) * kOut + o]); });
          const float* x = apart(row);
          static_for<kEnd - kBegin>([&]<int i>() {
            constexpr int p_ = kBegin + i;
            const Vec<float> v = load(x + (p_ + kTap - kLeft) * kStep);
            static_for<kOut>([&]<int o>() { acc[o][p_] = add_dot_products(acc[o][p_], weight[o], v); });
          });
        }
        if constexpr (kLayout == kClip) {
          constexpr int kFirst = kPix - 1 + kLeft - kTap, kSecond = kLeft - kTap - 1;
          if constexpr (kFirst >= 0 && kFirst < kPix) tap(Index<kTap>{}, Index<kFirst>{}, Index<kFirst + 1>{});
          if constexpr (kSecond >= 0 && kSecond < kPix) tap(Index<kTap + 1>{}, Index<kSecond>{}, Index<kSecond + 1>{});
        }
      });
      tap(Index<kK - 1>{}, Index<0>{}, Index<max(0, kPix - (kLayout == kClip ? kK / 2 : 0))>{});
      row += a.x_row;
      w += kRow;
    }
    channel += a.x_channel;
    weights += kK * kRow;
  }
  store_tile<float, kOut, kPix>(a, acc);
}
#endif

// One tile of the weight gradient: kOut output channels, one input channel, one ky, all kx; the
// accumulators stay in registers over the whole map and are written out as vectors, whose lanes the
// caller adds up.
template <class T>
struct WeightGradTile {
  const T* x;  // as in ConvTile, at the first row
  int64_t x_row;
  const T* dy;  // first output channel at the first row
  int64_t dy_row, dy_channel;
  int64_t rows, width;  // width in vectors
  int k;
  T* sums;          // [out][k * k] vectors, at this ky; kClip leaves out taps that never meet the row
  bool accumulate;  // add to sums
};

template <class T>
using WeightGradTileFn = void (*)(const WeightGradTile<T>&);

// Output channels per tile of the weight gradient for a kernel size (0: any size, one tap at a time).
constexpr bool weight_grad_fits(int out, int k) {
  const int taps = k ? k : 1;
  return out == 1 || out * taps + taps + 1 <= kRegisters;
}

template <class T, int kK, int kOut, int kPix, int kLayout>
void weight_grad_tile(const WeightGradTile<T>& a) {
  constexpr int64_t kStep = kLanes<T>;
  constexpr int64_t kTap = kLayout == kPixels ? 1 : kLanes<T>;
  constexpr int kTaps = kK ? kK : 1;
  constexpr int kRadius = kK / 2;
  const int k = kK ? kK : a.k;
  for (int kx0 = 0; kx0 < k; kx0 += kTaps) {
    Vec<T> acc[kOut][kTaps];
    static_for<kOut>([&]<int o>() { static_for<kTaps>([&]<int x>() { acc[o][x] = Vec<T>{}; }); });
    const T* x_row = a.x + kx0 * kTap;
    const T* dy_row = a.dy;
    for (int64_t h = 0; h < a.rows; ++h) {
      if constexpr (kLayout == kClip) {
        static_for<kPix>([&]<int p>() {
          Vec<T> dy[kOut];
          static_for<kOut>([&]<int o>() { dy[o] = load(dy_row + o * a.dy_channel + p * kStep); });
          static_for<kTaps>([&]<int kx>() {
            constexpr int kAt = p + kx - kRadius;
            if constexpr (kAt >= 0 && kAt < kPix) {
              Vec<T> v = load(x_row + kAt * kStep);
              static_for<kOut>([&]<int o>() { acc[o][kx] += dy[o] * v; });
            }
          });
        });
      } else {
        for (int64_t p = 0; p < a.width; ++p) {
          Vec<T> v[kTaps];
          static_for<kTaps>([&]<int kx>() { v[kx] = load(x_row + p * kStep + kx * kTap); });
          static_for<kOut>([&]<int o>() {
            Vec<T> dy = load(dy_row + o * a.dy_channel + p * kStep);
            static_for<kTaps>([&]<int x>() { acc[o][x] += dy * v[x]; });
          });
        }
      }
      x_row += a.x_row;
      dy_row += a.dy_row;
    }
    static_for<kOut>([&]<int o>() {
      static_for<kTaps>([&]<int kx>() {
        if constexpr (kLayout == kClip && (kx - kRadius >= kPix || kRadius - kx >= kPix)) return;
        T* sum = a.sums + (int64_t(o) * k * k + kx0 + kx) * kStep;
        store(sum, a.accumulate ? load(sum) + acc[o][kx] : acc[o][kx]);
      });
    });
  }
}

// The instantiated tiles, indexed by position in the lists above; null where a tile does not fit into the registers or
// is not needed: clipping needs a constant kernel size, and only it has weight gradients of several widths.
template <class T>
struct ConvTable {
  template <class Fn>
  using Tiles = Fn[kLayouts][kKernelSizeCount][kOutCount][kPixCount];
  Tiles<ConvTileFn<T>> conv, conv_dot;
  Tiles<WeightGradTileFn<T>> weight_grad;
};

template <class T>
const ConvTable<T>& conv_table();

template <class T, int kLayout, int kSize, int kO, int kP>
constexpr void add_tiles(ConvTable<T>& table) {
  constexpr int kK = kKernelSizes[kSize], kOut = kOutCounts[kO], kPix = kPixCounts[kP];
  if constexpr ((kK == 0 && kLayout != kClip) || is_compiled_size<T>(kK)) {
    if constexpr (tile_fits(kOut, kPix)) {
      table.conv[kLayout][kSize][kO][kP] = &conv_tile<T, kK, kOut, kPix, kLayout>;
#if defined(MFEF_ISA_avx512_bf16)
      if constexpr (kLayout != kPixels && has_dot_tiles<T>(kK)) {
        table.conv_dot[kLayout][kSize][kO][kP] = &conv_dot_tile<kK, kOut, kPix, kLayout>;
      }
#endif
    }
    if constexpr (weight_grad_fits(kOut, kK) && (kLayout == kClip || kPix == 1)) {
      table.weight_grad[kLayout][kSize][kO][kP] = &weight_grad_tile<T, kK, kOut, kPix, kLayout>;
    }
  }
}

template <class T>
constexpr ConvTable<T> make_conv_table() {
  ConvTable<T> table{};
  static_for<kLayouts>([&]<int l>() {
    static_for<kKernelSizeCount>([&]<int k>() {
      static_for<kOutCount>([&]<int o>() { static_for<kPixCount>([&]<int p>() { add_tiles<T, l, k, o, p>(table); }); });
    });
  });
  return table;
}

}  // namespace mfef::cpu::MFEF_ISA
