// Products of transforms: weights transformed and packed, multiplied with the transforms of maps, and the weight
// gradient.
//
// With X, Y, W, D the transforms of x, y, the weights and dy:
//
//   y:  Y = conj(W) X        dx:  W D        dW:  conj(D) X, summed over images, of which the taps are kept
#pragma once

#include "cpu/conv/fft_transform.h"
#include "cpu/conv/weight_gradient.h"

namespace mfef::cpu::MFEF_ISA {

// A register tile is kOut output channels by kBins bins, at most so many in all: two accumulators each, two vectors
// of x, and weights that are broadcast.
constexpr int kFftTile = kRegisters == 32 ? 8 : 4;
// Input channels of a chain of additions, two products each.
constexpr int64_t kFftChain = kChain / 2;

// Groups of at least this many output channels have them in the lanes of the weight gradient's products.
template <class T>
constexpr int64_t kLaneOutputs = kLanes<T> * 3 / 4;

MFEF_INLINE int bins_per_tile(int64_t out_group) { return out_group >= kFftTile ? 1 : kFftTile / int(out_group); }
// Output channels of the next tile: as few tiles as fit, as even as possible.
MFEF_INLINE int next_fft_out(int64_t remaining) { return int(divide_up(remaining, divide_up(remaining, kFftTile))); }

// Vectors from channel to channel of transforms. They hold the last tile's bins, and their number is odd, so that the
// same bin of many channels does not fall into one set of a cache.
MFEF_INLINE int64_t fft_vectors(int64_t n) { return round_up(fft_bins(n), kFftTile) * 2 + 1; }

// --- weights ----------------------------------------------------------------------------------------

// Elements of a group's packed weights: [bins of a tile][output channels of a tile][in][bin][re, im][out].
template <class T>
MFEF_INLINE int64_t packed_fft_group(const ConvShape<T>& shape, int64_t n) {
  return round_up(fft_bins(n), bins_per_tile(shape.out_group())) * 2 * shape.in_group() * shape.out_group();
}

// Packing is divided into blocks of kLanes output channels times some input channels of their group: as many as a
// buffer in the L2 cache holds, since the transforms of an input channel lie far apart in memory, and beside them those
// of its neighbours.
constexpr int64_t kPackBytes = 96 * 1024;
template <class T>
MFEF_INLINE int64_t pack_inputs(int64_t n) {
  return kPackBytes / (2 * fft_bins(n) * kVectorBytes);
}
template <class T>
MFEF_INLINE int64_t packed_fft_blocks(const ConvShape<T>& shape, int64_t n) {
  return divide_up(shape.out, kLanes<T>) * divide_up(shape.in_group(), pack_inputs<T>(n));
}

// Copies the transforms of one block, [input channel][bin][re, im][lane], to their tiles: of output channels from
// `first` on, in the lanes, and of input channels [i_first, i_first + i_count).
template <class T>
void copy_fft_weights(const ConvShape<T>& shape, int64_t n, const T* transforms, int64_t first, int64_t i_first,
                      int64_t i_count, T* packed) {
  constexpr int L = kLanes<T>;
  const int64_t in_group = shape.in_group(), out_group = shape.out_group(), bins = fft_bins(n);
  const int tile_bins = bins_per_tile(out_group);
  const int64_t block_size = in_group * out_group * tile_bins * 2;
  // Runs of lanes whose channels share a tile lie together.
  for (int64_t lane = 0; lane < L && first + lane < shape.out;) {
    const int64_t c = first + lane, o = c % out_group;
    int64_t tile = 0;
    int out = next_fft_out(out_group);
    while (tile + out <= o) {
      tile += out;
      out = next_fft_out(out_group - tile);
    }
    const int64_t run = min(min<int64_t>(L - lane, tile + out - o), shape.out - c);
    T* to = packed + c / out_group * packed_fft_group(shape, n) + (tile * in_group + i_first * out) * tile_bins * 2 +
            o - tile;
    auto copy = [&]<int kCount>(Index<kCount>) {
      for (int64_t b = 0; b < bins; b += tile_bins, to += block_size) {
        const int64_t parts = 2 * min<int64_t>(tile_bins, bins - b);
        for (int64_t i = 0; i < i_count; ++i) {
          const T* from = transforms + (i * bins + b) * 2 * L + lane;
          T* at = to + i * out * tile_bins * 2;
          for (int64_t j = 0; j < parts; ++j, from += L, at += out) {
            if constexpr (kCount > 0) {
              __builtin_memcpy(at, from, kCount * sizeof(T));
            } else {
              for (int64_t r = 0; r < run; ++r) at[r] = from[r];
            }
          }
        }
      }
    };
    if (run == 8) {
      copy(Index<8>{});
    } else if (run == 4) {
      copy(Index<4>{});
    } else {
      copy(Index<0>{});
    }
    lane += run;
  }
}

// Packs blocks [begin, end). The taps are those of the forward in both directions, since reversed taps have the
// conjugate transform, which multiply_bins() takes. Scaled by 1 / n^2, which the inverse transform leaves out.
template <class T, class E>
void pack_fft_weights(const ConvShape<T>& shape, const FftTable<T>& table, bool flipped, WeightView<const E> view,
                      T* packed, int64_t begin, int64_t end) {
  constexpr int L = kLanes<T>;
  const int k = shape.k, n = table.n;
  const int64_t out_group = shape.out_group(), inputs = pack_inputs<T>(n);
  const int64_t input_blocks = divide_up(shape.in_group(), inputs);
  const T scale = T(1.0 / (double(n) * n));
  if (flipped) view.reverse(k);
  alignas(64) T taps[kLongestFft * kLongestFft * L];  // no kernel is longer than the transforms
  alignas(64) T transforms[kPackBytes / sizeof(T)];
  for (int64_t block = begin; block < end; ++block) {
    const int64_t first = block / input_blocks * L, i_first = block % input_blocks * inputs;
    const int64_t i_count = min(inputs, shape.in_group() - i_first);
    for (int64_t i = 0; i < i_count; ++i) {
      for (int lane = 0; lane < L; ++lane) {
        const int64_t c = min(first + lane, shape.out - 1);
        const E* from = view.at(c / out_group, c % out_group, i_first + i);
        for (int ky = 0; ky < k; ++ky) {
          for (int kx = 0; kx < k; ++kx) {
            taps[(ky * k + kx) * L + lane] = to_compute(from[ky * view.row + kx * view.column]) * scale;
          }
        }
      }
      table.kernel(taps, k, transforms + i * 2 * fft_bins(n) * L);
    }
    copy_fft_weights(shape, n, transforms, first, i_first, i_count, packed);
  }
}

// --- products ---------------------------------------------------------------------------------------

// One tile: kOut output channels of kBins bins, over some input channels. kConj: conj(w) x, else w x.
template <class T, int kOut, int kBins, bool kConj>
void multiply_tile(const T* x, int64_t x_step, int64_t channels, const T* weights, T* y, int64_t y_step,
                   bool accumulate) {
  constexpr int L = kLanes<T>;
  Vec<T> re[kBins][kOut], im[kBins][kOut];
  static_for<kBins>([&]<int b>() { static_for<kOut>([&]<int o>() { re[b][o] = im[b][o] = Vec<T>{}; }); });
  for (int64_t i = 0; i < channels; ++i, x += x_step, weights += kBins * 2 * kOut) {
    __builtin_prefetch(weights + 16 * kBins * 2 * kOut);
    static_for<kBins>([&]<int b>() {
      const Vec<T> x_re = load(x + 2 * b * L), x_im = load(x + (2 * b + 1) * L);
      const T* w = weights + b * 2 * kOut;
      static_for<kOut>([&]<int o>() {
        const Vec<T> w_re = splat(w[o]), w_im = splat(w[kOut + o]);
        re[b][o] += w_re * x_re;
        im[b][o] += w_re * x_im;
        if constexpr (kConj) {
          re[b][o] += w_im * x_im;
          im[b][o] -= w_im * x_re;
        } else {
          re[b][o] -= w_im * x_im;
          im[b][o] += w_im * x_re;
        }
      });
    });
  }
  static_for<kOut>([&]<int o>() {
    static_for<kBins>([&]<int b>() {
      T* to = y + o * y_step + 2 * b * L;
      store(to, accumulate ? load(to) + re[b][o] : re[b][o]);
      store(to + L, accumulate ? load(to + L) + im[b][o] : im[b][o]);
    });
  });
}

// The transforms of one group's output channels out of those of its input channels.
template <class T, bool kConj>
void multiply_bins(const ConvShape<T>& shape, int64_t n, const T* x, const T* packed, T* y) {
  const int64_t in_group = shape.in_group(), out_group = shape.out_group(), bins = fft_bins(n);
  const int64_t step = fft_vectors(n) * kLanes<T>;
  const int tile_bins = bins_per_tile(out_group);
  const int64_t chain = divide_up(in_group, divide_up(in_group, kFftChain));
  for (int64_t b = 0; b < bins; b += tile_bins) {
    const T* x_bins = x + 2 * b * kLanes<T>;
    for (int64_t o = 0; o < out_group;) {
      const int out = next_fft_out(out_group - o);
      T* y_bins = y + o * step + 2 * b * kLanes<T>;
      for (int64_t i = 0; i < in_group; i += chain) {
        const int64_t channels = min(chain, in_group - i);
        auto tile = [&]<int kOut, int kBins>(Index<kOut>, Index<kBins>) {
          multiply_tile<T, kOut, kBins, kConj>(x_bins + i * step, step, channels, packed, y_bins, step, i > 0);
          packed += channels * kBins * 2 * kOut;
        };
        static_for<kFftTile>([&]<int at>() {
          constexpr int kOut = at + 1;
          if (out != kOut) return;
          if constexpr (kFftTile / kOut > 1) {
            if (tile_bins > 1) return tile(Index<kOut>{}, Index<kFftTile / kOut>{});
          }
          tile(Index<kOut>{}, Index<1>{});
        });
      }
      o += out;
    }
  }
}

// --- weight gradient --------------------------------------------------------------------------------
//
// The products of a block of images are summed over its lanes, brought back to taps and added to the sums, a vector
// of weights at a time: `kLanes` output channels of an input channel, or `kLanes` weights in their order (output
// channel, input channel) where groups are narrow. The sums are [block][k][k][lane].

template <class T>
MFEF_INLINE bool outputs_in_lanes(const ConvShape<T>& shape) {
  return shape.out_group() >= kLaneOutputs<T>;
}
// Groups whose weights share blocks.
template <class T>
MFEF_INLINE int64_t groups_at_once(const ConvShape<T>& shape) {
  const int64_t pairs = shape.in_group() * shape.out_group();
  if (outputs_in_lanes(shape) || pairs >= kLanes<T>) return 1;
  return min(shape.groups, divide_up(kLanes<T>, pairs));
}
// Blocks of `groups` groups.
template <class T>
MFEF_INLINE int64_t weight_blocks(const ConvShape<T>& shape, int64_t groups) {
  constexpr int L = kLanes<T>;
  if (outputs_in_lanes(shape)) return groups * divide_up(shape.out_group(), L) * shape.in_group();
  const int64_t at_once = groups_at_once(shape), pairs = shape.in_group() * shape.out_group();
  const int64_t whole = groups / at_once * divide_up(at_once * pairs, L);
  return whole + divide_up(groups % at_once * pairs, L);
}

// Elements of all blocks of sums.
template <class T>
MFEF_INLINE int64_t fft_grad_elements(const ConvShape<T>& shape) {
  return weight_blocks(shape, shape.groups) * shape.k * shape.k * kLanes<T>;
}
// Where tap 0 of a pair of channels of group g is; its other taps follow kLanes elements apart.
template <class T>
MFEF_INLINE int64_t fft_grad_at(const ConvShape<T>& shape, int64_t g, int64_t o, int64_t i) {
  constexpr int L = kLanes<T>;
  // In blocks of pairs, or of output channels for each input channel.
  const int64_t in_group = shape.in_group(), in_chunk = g % groups_at_once(shape);
  const int64_t pair = (in_chunk * shape.out_group() + o) * in_group + i;
  const int64_t block = outputs_in_lanes(shape) ? o / L * in_group + i : pair / L;
  return (weight_blocks(shape, g - in_chunk) + block) * shape.k * shape.k * L +
         (outputs_in_lanes(shape) ? o : pair) % L;
}
// As read_weight_grad().
template <class T, class E>
void read_fft_grad(const ConvShape<T>& shape, const T* sums, int64_t g, const WeightView<E>& grads) {
  for (int64_t o = 0; o < shape.out_group(); ++o) {
    for (int64_t i = 0; i < shape.in_group(); ++i) {
      write_taps(sums + fft_grad_at(shape, g, o, i), kLanes<T>, shape.k, grads, grads.at(g, o, i));
    }
  }
}

constexpr int kLaneInputs = kRegisters == 32 ? 8 : 4;  // of a tile with output channels in the lanes

// Output channels in the lanes: dy is transposed to [bin][re, im][image][lane], x is read a number at a time.
template <class T>
void fft_grad_by_outputs(const ConvShape<T>& shape, const FftTable<T>& table, int images, const T* x, const T* dy,
                         T* sums, T* scratch) {
  constexpr int L = kLanes<T>;
  const int64_t bins = fft_bins(table.n), step = fft_vectors(table.n) * L;
  const int64_t in_group = shape.in_group(), out_group = shape.out_group(), taps = shape.taps();
  const T scale = T(1.0 / (double(table.n) * table.n));
  T *transposed = scratch, *products = scratch + 2 * bins * L * L;
  for (int64_t o = 0; o < out_group; o += L) {
    for (int64_t b = 0; b < 2 * bins; ++b) {
      Vec<T> rows[L];
      for (int r = 0; r < L; ++r) rows[r] = o + r < out_group ? load(dy + (o + r) * step + b * L) : Vec<T>{};
      transpose<T>(rows);
      for (int r = 0; r < L; ++r) store(transposed + (b * L + r) * L, rows[r]);
    }
    auto tile = [&]<int kIn>(int64_t i, Index<kIn>) {
      for (int64_t b = 0; b < bins; ++b) {
        Vec<T> re[kIn] = {}, im[kIn] = {};
        const T* d = transposed + 2 * b * L * L;
        const T* at = x + i * step + 2 * b * L;
        for (int r = 0; r < images; ++r, d += L, ++at) {
          const Vec<T> d_re = load(d), d_im = load(d + L * L);
          static_for<kIn>([&]<int j>() {
            const Vec<T> x_re = splat(at[j * step]), x_im = splat(at[j * step + L]);
            re[j] += d_re * x_re;
            im[j] += d_re * x_im;
            re[j] += d_im * x_im;
            im[j] -= d_im * x_re;
          });
        }
        static_for<kIn>([&]<int j>() {
          store(products + (j * bins + b) * 2 * L, re[j]);
          store(products + ((j * bins + b) * 2 + 1) * L, im[j]);
        });
      }
      for (int j = 0; j < kIn; ++j, sums += taps * L) {
        table.inverse_kernel(products + j * bins * 2 * L, shape.k, scale, sums);
      }
    };
    int64_t i = 0;
    for (; i + kLaneInputs <= in_group; i += kLaneInputs) tile(i, Index<kLaneInputs>{});
    in_fours(i, in_group, tile);
  }
}

// Weights in the lanes: kLanes of them at a time, each product summed over the lanes of its images.
template <class T>
void fft_grad_by_pairs(const ConvShape<T>& shape, const FftTable<T>& table, int64_t groups, const T* x, const T* dy,
                       T* sums, T* scratch) {
  constexpr int L = kLanes<T>;
  const int64_t bins = fft_bins(table.n), step = fft_vectors(table.n) * L;
  const int64_t in_group = shape.in_group(), out_group = shape.out_group(), taps = shape.taps();
  const int64_t pairs = groups * in_group * out_group;
  const T scale = T(1.0 / (double(table.n) * table.n));
  for (int64_t first = 0; first < pairs; first += L, sums += taps * L) {
    const T *x_at[L], *dy_at[L];
    for (int lane = 0; lane < L; ++lane) {  // those beyond the last pair are never read
      const int64_t pair = min(first + lane, pairs - 1);
      x_at[lane] = x + (pair / (in_group * out_group) * in_group + pair % in_group) * step;
      dy_at[lane] = dy + pair / in_group * step;
    }
    for (int64_t b = 0; b < 2 * bins * L; b += 2 * L) {
      Vec<T> re[L], im[L];
      static_for<L>([&]<int l>() {
        re[l] = load(dy_at[l] + b) * load(x_at[l] + b) + load(dy_at[l] + b + L) * load(x_at[l] + b + L);
      });
      store(scratch + b, sums_of_lanes<T>(re));
      static_for<L>([&]<int l>() {
        im[l] = load(dy_at[l] + b) * load(x_at[l] + b + L) - load(dy_at[l] + b + L) * load(x_at[l] + b);
      });
      store(scratch + b + L, sums_of_lanes<T>(im));
    }
    table.inverse_kernel(scratch, shape.k, scale, sums);
  }
}

}  // namespace mfef::cpu::MFEF_ISA
