// A grouped convolution of one packed map as a product of spectra: forward, data gradient and weight gradient.
//
// Images plan only, on square maps that dft_table() has. Direct sums multiply every tap with every pixel it meets:
// 2704 products for a 9 x 9 kernel on 8 x 8 pixels, for each pair of an input and an output channel. The spectra of
// both on 12 x 12 have 74 complex bins, 296 products; transforms cost once per channel what they would otherwise cost
// once per pair. With X, Y, W, D the spectra of x, y, the weights and dy:
//
//   y:  Y = conj(W) X        dx:  W D        dW:  conj(D) X, summed over images, of which the taps are kept
//
// A spectrum mixes all pixels of a map: one that is not finite reaches every output of its group, and one that is very
// large leaves rounding errors in all of them. find_weak() says which outputs those would spoil, find_rare() which
// gradients of weights; they are summed directly.
#pragma once

#include <cmath>
#include <limits>

#include "conv_map.h"
#include "dft.h"

namespace mfef::cpu::MFEF_ISA {

// A register tile is kOut output channels by kBins bins, at most so many in all: two accumulators each, two vectors
// of x, and weights that are broadcast.
constexpr int kSpectrumTile = kRegisters == 32 ? 8 : 4;
// Input channels of a chain of additions, two products each.
constexpr int64_t kSpectrumChain = kChain / 2;

// From this many output channels of a group on, they are the lanes of the weight gradient's products.
template <class T>
constexpr int64_t kLaneOutputs = kLanes<T> * 3 / 4;

MFEF_INLINE int bins_per_tile(int64_t out_group) {
  return out_group >= kSpectrumTile ? 1 : kSpectrumTile / int(out_group);
}
// As few tiles as fit, as even as possible.
MFEF_INLINE int next_spectrum_out(int64_t remaining) {
  const int64_t tiles = (remaining + kSpectrumTile - 1) / kSpectrumTile;
  return int((remaining + tiles - 1) / tiles);
}

// From channel to channel of spectra, in vectors: room for the last tile's bins, and odd, so that the same bin of
// many channels does not meet in one set of a cache.
MFEF_INLINE int64_t spectrum_vectors(int64_t n) { return round_up(dft_bins(n), kSpectrumTile) * 2 + 1; }

// --- weights ----------------------------------------------------------------------------------------

// Packed spectra of a group's weights: [bins of a tile][output channels of a tile][in][bin][re, im][out].
template <class T>
MFEF_INLINE int64_t packed_spectra_group(const ConvMap<T>& map, int64_t n) {
  return round_up(dft_bins(n), bins_per_tile(map.out_group())) * 2 * map.in_group() * map.out_group();
}

// Packing is divided into blocks of kLanes output channels times some input channels of their group: as many as a
// buffer in the L2 cache has room for, since the spectra of an input channel lie far apart in memory, and those of its
// neighbours beside them.
constexpr int64_t kPackBytes = 96 * 1024;
template <class T>
MFEF_INLINE int64_t pack_inputs(int64_t n) {
  return kPackBytes / (2 * dft_bins(n) * kVectorBytes);
}
template <class T>
MFEF_INLINE int64_t spectrum_blocks(const ConvMap<T>& map, int64_t n) {
  const int64_t inputs = pack_inputs<T>(n);
  return (map.out + kLanes<T> - 1) / kLanes<T> * ((map.in_group() + inputs - 1) / inputs);
}

// Packs blocks [begin, end). Weights, strides and `flipped` as in pack_weights(); the other direction's spectrum is
// the conjugate, which multiply_spectra() takes. Scaled by 1 / n^2, which the inverse transform leaves out.
template <class T, class E>
void pack_spectra(const ConvMap<T>& map, const DftTable<T>& table, bool flipped, const E* weights, int64_t full_k,
                  const int64_t stride[4], T* packed, int64_t begin, int64_t end) {
  constexpr int L = kLanes<T>;
  const int k = map.k, n = table.n;
  const int64_t in_group = map.in_group(), out_group = map.out_group(), bins = dft_bins(n);
  const int64_t group_size = packed_spectra_group(map, n), inputs = pack_inputs<T>(n);
  const int tile_bins = bins_per_tile(out_group);
  const int64_t out_step = stride[flipped ? 1 : 0], in_step = stride[flipped ? 0 : 1];
  const int64_t group_step = stride[0] * (flipped ? in_group : out_group);
  weights += (full_k - k) / 2 * (stride[2] + stride[3]);
  const T scale = T(1.0 / (double(n) * n));
  alignas(64) T taps[kLongestDft * kLongestDft * L];  // no kernel is longer than the spectra
  alignas(64) T spectra[kPackBytes / sizeof(T)];
  const int64_t input_blocks = (in_group + inputs - 1) / inputs;
  for (int64_t block = begin; block < end; ++block) {
    const int64_t first = block / input_blocks * L, i_first = block % input_blocks * inputs;
    const int64_t i_count = least(inputs, in_group - i_first);
    for (int64_t i = 0; i < i_count; ++i) {
      for (int lane = 0; lane < L; ++lane) {
        const int64_t c = least(first + lane, map.out - 1);
        const E* from = weights + c / out_group * group_step + c % out_group * out_step + (i_first + i) * in_step;
        for (int ky = 0; ky < k; ++ky) {
          for (int kx = 0; kx < k; ++kx) {
            taps[(ky * k + kx) * L + lane] = to_compute(from[ky * stride[2] + kx * stride[3]]) * scale;
          }
        }
      }
      table.kernel(taps, k, spectra + i * 2 * bins * L);
    }
    // Runs of lanes whose channels share a tile lie together.
    for (int64_t lane = 0; lane < L && first + lane < map.out;) {
      const int64_t c = first + lane, o = c % out_group;
      int64_t tile = 0;
      int out = next_spectrum_out(out_group);
      while (tile + out <= o) {
        tile += out;
        out = next_spectrum_out(out_group - tile);
      }
      const int64_t run = least(least<int64_t>(L - lane, tile + out - o), map.out - c);
      T* to = packed + c / out_group * group_size + (tile * in_group + i_first * out) * tile_bins * 2 + o - tile;
      const int64_t block_size = in_group * out_group * tile_bins * 2;
      auto copy = [&](auto count) {
        for (int64_t b = 0; b < bins; b += tile_bins, to += block_size) {
          const int64_t parts = 2 * least<int64_t>(tile_bins, bins - b);
          for (int64_t i = 0; i < i_count; ++i) {
            const T* from = spectra + (i * bins + b) * 2 * L + lane;
            T* at = to + i * out * tile_bins * 2;
            for (int64_t j = 0; j < parts; ++j, from += L, at += out) {
              if constexpr (decltype(count)::value > 0) {
                __builtin_memcpy(at, from, decltype(count)::value * sizeof(T));
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

// The spectra of one group's output channels out of those of its input channels.
template <class T, bool kConj>
void multiply_spectra(const ConvMap<T>& map, int64_t n, const T* x, const T* packed, T* y) {
  const int64_t in_group = map.in_group(), out_group = map.out_group(), bins = dft_bins(n);
  const int64_t step = spectrum_vectors(n) * kLanes<T>;
  const int tile_bins = bins_per_tile(out_group);
  const int64_t chains = (in_group + kSpectrumChain - 1) / kSpectrumChain;
  const int64_t chain = (in_group + chains - 1) / chains;
  for (int64_t b = 0; b < bins; b += tile_bins) {
    const T* x_bins = x + 2 * b * kLanes<T>;
    for (int64_t o = 0; o < out_group;) {
      const int out = next_spectrum_out(out_group - o);
      T* y_bins = y + o * step + 2 * b * kLanes<T>;
      for (int64_t i = 0; i < in_group; i += chain) {
        const int64_t channels = least(chain, in_group - i);
        auto tile = [&]<int kOut, int kBins>(Index<kOut>, Index<kBins>) {
          multiply_tile<T, kOut, kBins, kConj>(x_bins + i * step, step, channels, packed, y_bins, step, i > 0);
          packed += channels * kBins * 2 * kOut;
        };
        static_for<kSpectrumTile>([&]<int at>() {
          constexpr int kOut = at + 1;
          if (out != kOut) return;
          if constexpr (kSpectrumTile / kOut > 1) {
            if (tile_bins > 1) return tile(Index<kOut>{}, Index<kSpectrumTile / kOut>{});
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
MFEF_INLINE bool outputs_in_lanes(const ConvMap<T>& map) {
  return map.out_group() >= kLaneOutputs<T>;
}
// Groups whose weights share blocks.
template <class T>
MFEF_INLINE int64_t groups_at_once(const ConvMap<T>& map) {
  const int64_t pairs = map.in_group() * map.out_group();
  if (outputs_in_lanes(map) || pairs >= kLanes<T>) return 1;
  return least(map.groups, (kLanes<T> + pairs - 1) / pairs);
}
// Blocks of `groups` groups.
template <class T>
MFEF_INLINE int64_t weight_blocks(const ConvMap<T>& map, int64_t groups) {
  constexpr int L = kLanes<T>;
  if (outputs_in_lanes(map)) return groups * ((map.out_group() + L - 1) / L) * map.in_group();
  const int64_t at_once = groups_at_once(map), pairs = map.in_group() * map.out_group();
  const int64_t whole = groups / at_once * ((at_once * pairs + L - 1) / L);
  return whole + (groups % at_once * pairs + L - 1) / L;
}

// Elements of all blocks of sums; where tap 0 of a pair of group g is, the others being kLanes apart.
template <class T>
MFEF_INLINE int64_t spectra_grad_elements(const ConvMap<T>& map) {
  return weight_blocks(map, map.groups) * map.k * map.k * kLanes<T>;
}
template <class T>
MFEF_INLINE int64_t spectra_grad_at(const ConvMap<T>& map, int64_t g, int64_t o, int64_t i) {
  constexpr int L = kLanes<T>;
  // In blocks of pairs, or of output channels for each input channel.
  const int64_t in_group = map.in_group(), in_chunk = g % groups_at_once(map);
  const int64_t pair = (in_chunk * map.out_group() + o) * in_group + i;
  const int64_t block = outputs_in_lanes(map) ? o / L * in_group + i : pair / L;
  return (weight_blocks(map, g - in_chunk) + block) * map.k * map.k * L + (outputs_in_lanes(map) ? o : pair) % L;
}
// The gradient of group g out of the sums, as read_weight_grad() has it.
template <class T, class E>
void read_spectra_grad(const ConvMap<T>& map, const T* sums, int64_t g, int64_t full_k, E* grads,
                       const int64_t stride[4]) {
  const int64_t in_group = map.in_group(), out_group = map.out_group();
  grads += g * out_group * stride[0] + (full_k - map.k) / 2 * (stride[2] + stride[3]);
  for (int64_t o = 0; o < out_group; ++o) {
    for (int64_t i = 0; i < in_group; ++i) {
      const T* from = sums + spectra_grad_at(map, g, o, i);
      E* to = grads + o * stride[0] + i * stride[1];
      for (int ky = 0; ky < map.k; ++ky) {
        for (int kx = 0; kx < map.k; ++kx, from += kLanes<T>) from_compute(*from, to + ky * stride[2] + kx * stride[3]);
      }
    }
  }
}

constexpr int kLaneInputs = kRegisters == 32 ? 8 : 4;  // of a tile with output channels in the lanes

// Output channels in the lanes: dy is transposed to [bin][re, im][image][lane], x is read a number at a time.
template <class T>
void weight_spectra_lanes(const ConvMap<T>& map, const DftTable<T>& table, int images, const T* x, const T* dy, T* sums,
                          T* scratch) {
  constexpr int L = kLanes<T>;
  const int64_t bins = dft_bins(table.n), step = spectrum_vectors(table.n) * L;
  const int64_t in_group = map.in_group(), out_group = map.out_group(), taps = int64_t(map.k) * map.k;
  const T scale = T(1.0 / (double(table.n) * table.n));
  T *turned = scratch, *products = scratch + 2 * bins * L * L;
  for (int64_t o = 0; o < out_group; o += L) {
    for (int64_t b = 0; b < 2 * bins; ++b) {
      Vec<T> rows[L];
      for (int r = 0; r < L; ++r) rows[r] = o + r < out_group ? load(dy + (o + r) * step + b * L) : Vec<T>{};
      transpose<T>(rows);
      for (int r = 0; r < L; ++r) store(turned + (b * L + r) * L, rows[r]);
    }
    for (int64_t i = 0; i < in_group;) {
      auto tile = [&]<int kIn>(Index<kIn>) {
        for (int64_t b = 0; b < bins; ++b) {
          Vec<T> re[kIn], im[kIn];
          static_for<kIn>([&]<int j>() { re[j] = im[j] = Vec<T>{}; });
          const T* d = turned + 2 * b * L * L;
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
          table.inverse_kernel(products + j * bins * 2 * L, map.k, scale, sums);
        }
        i += kIn;
      };
      if (in_group - i >= kLaneInputs) {
        tile(Index<kLaneInputs>{});
      } else if (in_group - i >= 4) {
        tile(Index<4>{});
      } else {
        tile(Index<1>{});
      }
    }
  }
}

// Weights in the lanes: kLanes of them at a time, each product summed over the lanes of its images.
template <class T>
void weight_spectra_pairs(const ConvMap<T>& map, const DftTable<T>& table, int64_t groups, const T* x, const T* dy,
                          T* sums, T* scratch) {
  constexpr int L = kLanes<T>;
  const int64_t bins = dft_bins(table.n), step = spectrum_vectors(table.n) * L;
  const int64_t in_group = map.in_group(), out_group = map.out_group(), taps = int64_t(map.k) * map.k;
  const int64_t pairs = groups * in_group * out_group;
  const T scale = T(1.0 / (double(table.n) * table.n));
  for (int64_t first = 0; first < pairs; first += L, sums += taps * L) {
    const T *x_at[L], *dy_at[L];
    for (int lane = 0; lane < L; ++lane) {  // those beyond the last pair are never read
      const int64_t pair = least(first + lane, pairs - 1);
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
    table.inverse_kernel(scratch, map.k, scale, sums);
  }
}

// --- which outputs are right ------------------------------------------------------------------------
//
// Rounding leaves errors of one size all over an output map: of kError eps times
//
//   R = sqrt(sum over input channels i of |w_i|^2 |x_i|^2) / n        |.|: the root of the sum of the squares
//
// at most. A direct sum errs by a multiple of eps times its own S, the sum over its taps of |w| |x|, which is small
// where large pixels, or large weights, are out of reach. So an output may come out of spectra only where S is known to
// be R kError / kAllowed or more. Two sums that are cheap give such a bound. Let the weights of an output channel be
// u b_i v, where u is of the output channel and b_i of the input channel, and `least` the sum of the M smallest |v|.
// However the pixels are spread over the taps of an output, if
//
//   sum over its taps of min(b_i |x|, limit) >= M limit,  then  S >= u limit least
//
// since the sum is least where all that is there lies on the smallest weights. `limit` is made as large as the R of the
// output channel asks for that needs most. Kernels of few taps have a `least` of zero, and come out of direct sums.

// Of maps of one row, one column or one pixel, constant, random or with outliers, no output was ever off by more than
// 4 eps R.
constexpr double kError = 4;
// What an output may be off by, in units of eps S.
constexpr double kAllowed = 256;

template <class T>
MFEF_INLINE Vec<T> absolute(Vec<T> v) {
  return bit_cast<Vec<T>>(bit_cast<IVec<T>>(v) & std::numeric_limits<typename IntOf<T>::type>::max());
}

// M: that of random maps and weights by which the sum above exceeds M limit most often.
template <class T>
MFEF_INLINE T guard_terms(const ConvMap<T>& map, int64_t n) {
  const double taps = double(map.k * map.k), in = double(map.in_group());
  const double share = kError / kAllowed * std::sqrt(in * taps) * double(map.height) / double(n);
  return T(int64_t(std::sqrt(3.2 * share * in * taps)) + 1);
}

// Weights of one group as they lie in memory, in one direction.
template <class E>
struct RawWeights {
  const E* at;
  int64_t out, in, row, column;  // strides

  template <class T>
  RawWeights(const ConvMap<T>& map, bool flipped, const E* weights, int64_t full_k, const int64_t stride[4], int64_t g)
      : at(weights + (full_k - map.k) / 2 * (stride[2] + stride[3]) +
           g * stride[0] * (flipped ? map.in_group() : map.out_group())),
        out(stride[flipped ? 1 : 0]),
        in(stride[flipped ? 0 : 1]),
        row(stride[2]),
        column(stride[3]) {
    if (!flipped) return;
    at += (map.k - 1) * (row + column);
    row = -row;
    column = -column;
  }
};

// What the guard knows of a group's weights, after the spectra of all groups: of each input channel b, and the square
// of |w| / (u least) of the output channel where that is largest; and |w|^2 of each pair, which only this needs.
template <class T>
MFEF_INLINE int64_t guard_group(const ConvMap<T>& map) {
  return map.in_group() * (2 + map.out_group());
}
template <class T, class E>
void weigh_inputs(const ConvMap<T>& map, int64_t n, bool flipped, const E* weights, int64_t full_k,
                  const int64_t stride[4], T* guard, int64_t begin, int64_t end) {
  constexpr int L = kLanes<T>;
  const int64_t in = map.in_group(), out = map.out_group(), taps = int64_t(map.k) * map.k;
  const T terms = guard_terms(map, n);
  alignas(64) T sizes[kLongestDft * kLongestDft + L];  // |w| of the taps of a pair, and what a vector has beyond them
  for (int64_t g = begin; g < end; ++g) {
    const RawWeights<E> raw(map, flipped, weights, full_k, stride, g);
    T *scale = guard + g * guard_group(map), *reach = scale + in, *squares = reach + in;
    const int64_t forward = flipped ? -1 : 1;
    const bool dense = raw.column == forward && raw.row == forward * map.k;
    auto read = [&](int64_t o, int64_t i, T unit) {
      const E* from = raw.at + o * raw.out + i * raw.in;
      T* to = sizes;
      if (dense) {  // in any order
        if (flipped) from -= taps - 1;
        for (; to + L <= sizes + taps; to += L, from += L) store(to, absolute<T>(load_elements(from)) * unit);
        for (; to < sizes + taps; ++to, ++from) *to = std::fabs(to_compute(*from)) * unit;
        return to;
      }
      for (int ky = 0; ky < map.k; ++ky, from += raw.row) {
        for (int kx = 0; kx < map.k; ++kx) {
          *to++ = std::fabs(to_compute(from[kx * raw.column])) * unit;
        }
      }
      return to;
    };
    auto mean_square = [&](int64_t o) {
      T sum = 0;
      for (int64_t i = 0; i < in; ++i) sum += squares[o * in + i];
      return sum / T(in * taps);
    };
    for (int64_t i = 0; i < in; ++i) scale[i] = reach[i] = T(0);
    for (int64_t o = 0; o < out; ++o) {
      for (int64_t i = 0; i < in; ++i) {
        store(read(o, i, T(1)), Vec<T>{});
        Vec<T> sum{}, sum_of_sizes{};
        for (int64_t t = 0; t < taps; t += L) {
          sum += load(sizes + t) * load(sizes + t);
          sum_of_sizes += load(sizes + t);
        }
        // Not zero where the squares vanish.
        const T smallest = sum_of_lanes<T>(sum_of_sizes) == T(0) ? T(0) : std::numeric_limits<T>::min();
        squares[o * in + i] = most(sum_of_lanes<T>(sum), smallest);
      }
      const T u2 = mean_square(o);
      for (int64_t i = 0; i < in && u2 > T(0); ++i) scale[i] += squares[o * in + i] / u2;
    }
    for (int64_t i = 0; i < in; ++i) scale[i] = std::sqrt(scale[i] / T(out * taps));
    for (int64_t o = 0; o < out; ++o) {
      // Of the M smallest those below a bound are added, and the others are no smaller than it. The higher the bound,
      // the larger the sum, as long as no more than M are below. The smallest of random weights lie about 1 / their
      // number apart, and M of them below the first bound.
      constexpr int kBounds = 3;
      const T u2 = mean_square(o);
      T smallest = 0, bound = terms / T(in * taps);
      for (int j = 0; j < kBounds; ++j, bound /= 2) {
        Vec<T> count{}, sum{};
        for (int64_t i = 0; i < in; ++i) {
          if (scale[i] == T(0)) continue;  // all its spectra are zero
          store(read(o, i, T(1) / (std::sqrt(u2) * scale[i])), splat(std::numeric_limits<T>::infinity()));
          for (int64_t t = 0; t < taps; t += L) {
            const Vec<T> v = load(sizes + t);
            const IVec<T> below = v < splat(bound);
            count += below ? splat(T(1)) : Vec<T>{};
            sum += below ? v : Vec<T>{};
          }
        }
        const T below = sum_of_lanes<T>(count);
        if (below > terms) continue;
        smallest = sum_of_lanes<T>(sum) + (terms - below) * bound;
        break;
      }
      const T unit = u2 * smallest * smallest;
      for (int64_t i = 0; i < in; ++i) {
        const T of_pair = squares[o * in + i];
        // What is not finite, or so small that squares vanish, is trusted nowhere.
        const bool known = u2 > std::numeric_limits<T>::min() * T(1e6) && u2 < std::numeric_limits<T>::infinity();
        if (known && of_pair > T(0)) reach[i] = most(reach[i], of_pair / unit);
        if (!known && u2 != T(0)) reach[i] = std::numeric_limits<T>::infinity();
      }
    }
  }
}

// --- a map ------------------------------------------------------------------------------------------

// Products of a pixel and a tap along one side of a map: those that meet.
MFEF_INLINE int64_t meeting(int64_t side, int64_t k) {
  int64_t count = 0;
  for (int64_t d = -(k / 2); d <= k / 2; ++d) count += most<int64_t>(0, side - (d < 0 ? -d : d));
  return count;
}

constexpr int64_t kMostSide = 16;  // of a map that has spectra

// Where some outputs have so much less than they need, the maximum of their map must not be taken with the slack of
// spectra: all of it is summed directly.
template <class T>
constexpr T kSevere = 4;

// v[j] = the sum of v[i], |i - j| <= radius, for a line of `side` vectors, `step` elements apart. Nothing is
// subtracted: a small sum beside large values stays right.
template <class T>
MFEF_INLINE void sum_windows(T* v, int64_t side, int64_t step, int64_t radius) {
  Vec<T> line[kMostSide], before[kMostSide], after[kMostSide];
  for (int64_t i = 0; i < side; ++i) {
    line[i] = load(v + i * step);
    before[i] = i ? before[i - 1] + line[i] : line[i];
  }
  for (int64_t i = side - 1; i >= 0; --i) after[i] = i < side - 1 ? after[i + 1] + line[i] : line[i];
  for (int64_t i = 0; i < side; ++i) {
    const int64_t first = i - radius, last = i + radius;
    Vec<T> sum;
    if (first <= 0) {
      sum = before[least(last, side - 1)];
    } else if (last >= side - 1) {
      sum = after[first];
    } else {
      sum = line[first];
      for (int64_t j = first + 1; j <= last; ++j) sum += line[j];
    }
    store(v + i * step, sum);
  }
}

// The least sum over any of some squares of radius + 1 pixels a side, of which each window has one.
template <class T>
MFEF_INLINE Vec<T> fewest_in_squares(const ConvMap<T>& map, const T* sums) {
  const int64_t side = map.height, square = map.k / 2 + 1, last = side - square;
  Vec<T> fewest = splat(std::numeric_limits<T>::infinity());
  auto next = [&](int64_t at) { return at < last ? least(at + square, last) : side; };
  for (int64_t top = 0; top < side; top = next(top)) {
    Vec<T> columns[kMostSide];
    for (int64_t w = 0; w < side; ++w) {
      columns[w] = load(sums + (top * side + w) * kLanes<T>);
      for (int64_t h = 1; h < square; ++h) columns[w] += load(sums + ((top + h) * side + w) * kLanes<T>);
    }
    for (int64_t left = 0; left < side; left = next(left)) {
      Vec<T> sum = columns[left];
      for (int64_t w = 1; w < square; ++w) sum += columns[left + w];
      fewest = sum < fewest ? sum : fewest;
    }
  }
  return fewest;
}

// Outputs of one group that may not come out of spectra, the same for all its output channels.
template <class T>
struct Weak {
  alignas(64) IVec<T> lanes[kMostSide * kMostSide];  // of each pixel
  bool vacant[kMostSide * kMostSide];                // nothing but zeros meets a tap in those lanes
  IVec<T> whole;                                     // lanes of which all pixels are weak
  bool any, all;                                     // any output, all of them
};

// The sum of f of each pixel of one channel, in four chains.
template <class T, class F>
MFEF_INLINE Vec<T> sum_over_pixels(const T* x, int64_t pixels, const F& f) {
  constexpr int L = kLanes<T>;
  Vec<T> sum[4] = {};
  int64_t p = 0;
  for (; p + 4 <= pixels; p += 4) {
    static_for<4>([&]<int j>() { sum[j] += f(load(x + (p + j) * L)); });
  }
  for (; p < pixels; ++p) sum[0] += f(load(x + p * L));
  return sum[0] + sum[1] + (sum[2] + sum[3]);
}
template <class T>
MFEF_INLINE Vec<T> sum_of_squares(const T* x, int64_t pixels) {
  return sum_over_pixels(x, pixels, [](Vec<T> v) { return v * v; });
}
template <class T>
MFEF_INLINE Vec<T> sum_of_sizes(const T* x, int64_t pixels) {
  return sum_over_pixels(x, pixels, [](Vec<T> v) { return absolute<T>(v); });
}

// x: the channels of the group.
template <class T>
void find_weak(const ConvMap<T>& map, int64_t n, const T* x, const T* guard, Weak<T>& weak) {
  constexpr int L = kLanes<T>;
  const int64_t in = map.in_group(), pixels = map.height * map.width;
  const T *scale = guard, *reach = guard + in;
  const Vec<T> infinity = splat(std::numeric_limits<T>::infinity());
  Vec<T> square{};
  for (int64_t i = 0; i < in; ++i) {
    square += sum_of_squares(x + i * map.channel, pixels) * splat(reach[i]);
  }
  Vec<T> limit;
  for (int lane = 0; lane < L; ++lane) limit[lane] = std::sqrt(square[lane]);
  limit *= splat(T(kError / kAllowed / double(n)));
  // What is not finite, or so small that its square vanishes, is trusted nowhere; but a map of zeros is.
  const IVec<T> known = (square > splat(std::numeric_limits<T>::min() * T(1e6))) & (square < infinity);
  limit = known ? limit : infinity;
  alignas(64) T sums[kMostSide * kMostSide * L];
  auto add = [&]<int kCount>(int64_t i, Index<kCount>) {
    Vec<T> factor[kCount], clip[kCount];
    static_for<kCount>([&]<int j>() {
      factor[j] = splat(scale[i + j]);
      clip[j] = limit / factor[j];
    });
    for (int64_t p = 0; p < pixels; ++p) {
      Vec<T> sum = i ? load(sums + p * L) : Vec<T>{};
      static_for<kCount>([&]<int j>() {
        const Vec<T> size = absolute<T>(load(x + (i + j) * map.channel + p * L));
        sum += (size < clip[j] ? size : clip[j]) * factor[j];
      });
      store(sums + p * L, sum);
    }
  };
  int64_t i = 0;
  for (; i + 4 <= in; i += 4) add(i, Index<4>{});
  for (; i + 2 <= in; i += 2) add(i, Index<2>{});
  if (i < in) add(i, Index<1>{});
  IVec<T> blank{};
  if (any_lane<T>(~known)) {
    Vec<T> total{};
    for (int64_t p = 0; p < pixels; ++p) total += load(sums + p * L);
    blank = total == Vec<T>{};
  }
  const Vec<T> wanted = limit * splat(guard_terms(map, n));
  const IVec<T> passed = blank | (known & (fewest_in_squares(map, sums) >= wanted));
  weak.any = weak.all = false;
  weak.whole = IVec<T>{};
  if (!any_lane<T>(~passed)) return;
  for (int64_t h = 0; h < map.height; ++h) sum_windows(sums + h * map.width * L, map.width, L, map.k / 2);
  for (int64_t w = 0; w < map.width; ++w) sum_windows(sums + w * L, map.height, map.width * L, map.k / 2);
  weak.whole = ~known;
  for (int64_t p = 0; p < pixels; ++p) {
    const Vec<T> sum = load(sums + p * L);
    weak.lanes[p] = ~(sum >= wanted) & ~passed;
    weak.whole |= weak.lanes[p] & (sum != Vec<T>{}) & (sum * splat(kSevere<T>) < wanted);
  }
  weak.whole &= ~blank;
  weak.any = weak.all = !any_lane<T>(~(weak.whole | blank));
  weak.whole |= weak.all ? blank : IVec<T>{};
  for (int64_t p = 0; p < pixels; ++p) {
    weak.lanes[p] |= weak.whole;
    const bool some = any_lane<T>(weak.lanes[p]);
    weak.any |= some;
    weak.vacant[p] = some && !any_lane<T>(weak.lanes[p] & (load(sums + p * L) != Vec<T>{}));
  }
}

// The weak outputs of group g by direct sums, an input channel at a time; y: the channels of the group, y_step apart.
// Several output channels share a load of x.
template <class T, class E>
void direct_sums(const ConvMap<T>& map, const Weak<T>& weak, const T* x, const RawWeights<E>& raw, const T* bias, T* y,
                 int64_t y_step) {
  constexpr int L = kLanes<T>;
  const int radius = map.k / 2;
  auto pixel = [&]<int kCount>(int64_t h, int64_t w, int64_t o, Index<kCount>) {
    const int64_t ky_begin = most<int64_t>(0, radius - h), ky_end = least<int64_t>(map.k, map.height + radius - h);
    const int64_t kx_begin = most<int64_t>(0, radius - w), kx_end = least<int64_t>(map.k, map.width + radius - w);
    const int64_t p = h * map.width + w;
    Vec<T> sum[kCount] = {};
    for (int64_t i = 0; i < map.in_group() && !weak.vacant[p]; ++i) {
      Vec<T> part[kCount] = {};
      for (int64_t ky = ky_begin; ky < ky_end; ++ky) {
        const T* row = x + i * map.channel + ((h + ky - radius) * map.width + w - radius) * L;
        const E* from = raw.at + o * raw.out + i * raw.in + ky * raw.row;
        for (int64_t kx = kx_begin; kx < kx_end; ++kx) {
          const Vec<T> v = load(row + kx * L);
          static_for<kCount>(
              [&]<int r>() { part[r] += v * splat(T(to_compute(from[r * raw.out + kx * raw.column]))); });
        }
      }
      static_for<kCount>([&]<int r>() { sum[r] += part[r]; });
    }
    static_for<kCount>([&]<int r>() {
      if (bias) sum[r] += splat(bias[o + r]);
      T* to = y + (o + r) * y_step + p * L;
      store(to, weak.lanes[p] ? sum[r] : load(to));
    });
  };
  constexpr int kMany = kRegisters == 32 ? 8 : 4;
  for (int64_t h = 0; h < map.height; ++h) {
    for (int64_t w = 0; w < map.width; ++w) {
      if (!any_lane<T>(weak.lanes[h * map.width + w])) continue;
      int64_t o = 0;
      for (; o + kMany <= map.out_group(); o += kMany) pixel(h, w, o, Index<kMany>{});
      for (; o < map.out_group(); ++o) pixel(h, w, o, Index<1>{});
    }
  }
}

// y is right to so many units of rounding of the root mean square of its spectra (of the channel of the group where it
// is largest). Pixels of equal sums were seen to differ by 15 such units, and by 38 in the worst of a million.
constexpr int kSlack = 16;

// The root mean square of the output maps of a group: of the one where it is largest.
template <class T>
Vec<T> largest_spectrum(int64_t channels, int64_t n, const T* spectra) {
  const int64_t count = 2 * dft_bins(n);
  Vec<T> largest{};
  for (int64_t c = 0; c < channels; ++c, spectra += spectrum_vectors(n) * kLanes<T>) {
    Vec<T> sums[2] = {};
    for (int64_t at = 0; at < count; at += 2) {
      static_for<2>([&]<int i>() {
        const Vec<T> v = load(spectra + (at + i) * kLanes<T>);
        sums[i] += v * v;
      });
    }
    const Vec<T> sum = sums[0] + sums[1];
    largest = sum > largest ? sum : largest;
  }
  for (int i = 0; i < kLanes<T>; ++i) largest[i] = std::sqrt(2 * largest[i]);  // bins are half of a spectrum
  return largest;
}

// One group of fourier_map(). x, y, packed, guard, bias and slack: what belongs to the group. x_spectra: those of x, to
// be written unless they are `known`.
template <class T, bool kBackward, class E>
void fourier_group(const ConvMap<T>& map, const DftTable<T>& table, const T* x, bool known, T* x_spectra,
                   const T* packed, const T* guard, const RawWeights<E>& raw, const T* bias, bool accumulate, T* y,
                   T* slack, T* spectra) {
  const int64_t in_group = map.in_group(), out_group = map.out_group();
  const int64_t step = spectrum_vectors(table.n) * kLanes<T>;
  Weak<T> weak;
  find_weak(map, table.n, x, guard, weak);
  Vec<T> gap{};
  // What is added to y takes the place of its spectra first.
  T* to = accumulate ? spectra : y;
  const int64_t to_step = accumulate ? step : map.out_channel;
  if (!weak.all) {
    for (int64_t i = 0; i < in_group && !known; ++i) table.map(x + i * map.channel, x_spectra + i * step);
    multiply_spectra<T, !kBackward>(map, table.n, x_spectra, packed, spectra);
    if (slack) {
      gap = largest_spectrum(out_group, table.n, spectra) * splat(kSlack * std::numeric_limits<T>::epsilon());
      gap = weak.whole ? Vec<T>{} : gap;  // direct sums that are equal are equal
    }
    for (int64_t o = 0; o < out_group; ++o) {
      table.inverse_map(spectra + o * step, bias ? bias + o : nullptr, to + o * to_step);
    }
  }
  if (weak.any) direct_sums(map, weak, x, raw, bias, to, to_step);
  for (int64_t o = 0; o < out_group; ++o) {
    if (slack) store(slack + o * kLanes<T>, gap);
    if (!accumulate) continue;
    T* sum = y + o * map.out_channel;
    for (int64_t p = 0; p < map.height * map.width; ++p) {
      const int64_t at = p * kLanes<T>;
      store(sum + at, load(sum + at) + load(to + o * to_step + at));
    }
  }
}

// y = conv(x), or y += conv(x), both [channel][pixel][lane] without borders; kBackward: of a data gradient, whose map
// this is. x and y are not the same. slack: to what each output channel is right; null where nobody asks.
template <class T, bool kBackward, class E>
void fourier_map(const ConvMap<T>& map, const DftTable<T>& table, const T* x, const T* packed, const E* weights,
                 int64_t full_k, const int64_t stride[4], const T* bias, bool accumulate, T* y, T* slack, T* scratch) {
  const int64_t in_group = map.in_group(), out_group = map.out_group();
  const int64_t step = spectrum_vectors(table.n) * kLanes<T>, group_size = packed_spectra_group(map, table.n);
  const T* guard = packed + map.groups * group_size;
  for (int64_t g = 0; g < map.groups; ++g) {
    fourier_group<T, kBackward>(map, table, x + g * in_group * map.channel, false, scratch, packed + g * group_size,
                                guard + g * guard_group(map), RawWeights<E>(map, kBackward, weights, full_k, stride, g),
                                bias ? bias + g * out_group : nullptr, accumulate, y + g * out_group * map.out_channel,
                                slack ? slack + g * out_group * kLanes<T> : nullptr, scratch + in_group * step);
  }
}

// --- which gradients of weights are right ------------------------------------------------------------
//
// Here S is the sum of |dy| |x| over the pairs of pixels that a tap joins, in all images of a block, and spectra leave
// errors of kError eps / n times the sum over images of |x| |dy| at most, |.| over all pixels of an image. Both factors
// are data, and S has to be bounded for every pair of channels before anything is multiplied.
//
// Gradients of some images are much larger than those of others. Let g be the size of dy of an image, all channels
// together, and h = g / the largest g: what follows is said of dy / g, and all sums over images are weighted with h.
//
// For each tap there is a square of w = side - k / 2 pixels a side, which it moves from one of the corners of dy to one
// of (k / 2 + 1)^2 places of x. Let the sum of min(|x|, t) over that square in x be C t or more wherever it lies, and
// at most N_j pixels of dy be below level d_j in any corner. In however unfortunate places those are,
//
//   S >= t sum over j of (d_j - d_(j-1)) max(0, C - N_j)
//
// With levels that are multiples of the root mean square of dy, of its own channel, one set of N_j serves all output
// channels of a group, and by the Cauchy-Schwarz inequality their magnitudes cancel. Input channels are *rare* where
// the sum is not enough.

constexpr double kGradAllowed = 128;
constexpr int kLevels = 3;
constexpr double kLevel[kLevels + 1] = {0, 0.02, 0.1, 0.4};
// One of them alone, with the pixels below it in all columns rather than in a corner, shows of nearly all channels that
// they are not rare. All are counted where it does not.
constexpr double kOneLevel = kLevel[2];

// Of the output channels of a group.
template <class T>
struct Levels {
  Vec<T> weight;        // h
  T images;             // the sum of h
  T missing_of_one;     // of kOneLevel, N_j or more
  T missing[kLevels];   // N_j
  bool all;             // whether they are there
  T smallest, largest;  // |dy| of the channels that are not zero
  bool known;           // all that is there is finite, and so are its squares
};

// N_j of all levels; unit: what level 1 is in each image, for each output channel.
template <class T>
void count_missing(const ConvMap<T>& map, const T* dy, const T* unit, Levels<T>& levels) {
  constexpr int L = kLanes<T>;
  const int64_t side = map.height, radius = map.k / 2, window = side - radius;
  // A corner is two of three parts of a side, or one.
  const int64_t cut[4] = {0, least(window, radius), most(window, radius), side};
  const bool overlap = radius < window;
  for (int64_t o = 0; o < map.out_group(); ++o, dy += map.out_channel) {
    Vec<T> level[kLevels];
    static_for<kLevels>([&]<int j>() { level[j] = load(unit + o * L) * splat(T(kLevel[j + 1])); });
    IVec<T> part[3][3][kLevels];
    for (int a = 0; a < 3; ++a) {
      for (int b = 0; b < 3; ++b) {
        IVec<T> count[kLevels] = {};
        for (int64_t h = cut[a]; h < cut[a + 1]; ++h) {
          for (int64_t w = cut[b]; w < cut[b + 1]; ++w) {
            const Vec<T> v = absolute<T>(load(dy + (h * side + w) * L));
            static_for<kLevels>([&]<int j>() { count[j] += v < level[j]; });
          }
        }
        static_for<kLevels>([&]<int j>() { part[a][b][j] = count[j]; });
      }
    }
    constexpr int kLevelss = 4 * kLevels;
    alignas(64) T counts[kLevelss + L];
    for (int first = 0; first < kLevelss; first += L) {
      Vec<T> rows[L] = {};
      for (int r = 0; r < L && first + r < kLevelss; ++r) {
        const int corner = (first + r) / kLevels, j = (first + r) % kLevels, a = corner / 2 * 2, b = corner % 2 * 2;
        IVec<T> count = part[a][b][j];
        if (overlap) count += part[1][b][j] + part[a][1][j] + part[1][1][j];
        rows[r] = __builtin_convertvector(-count, Vec<T>) * levels.weight;  // lanes of a comparison are -1
      }
      store(counts + first, sums_of_lanes<T>(rows));
    }
    for (int r = 0; r < kLevelss; ++r) {
      levels.missing[r % kLevels] = most(levels.missing[r % kLevels], counts[r]);
    }
  }
  levels.all = true;
}

// Pixels of one channel that are below a level, negative.
template <class T>
MFEF_INLINE IVec<T> count_below(const T* x, int64_t pixels, Vec<T> level) {
  constexpr int L = kLanes<T>;
  IVec<T> count[2] = {};
  int64_t p = 0;
  for (; p + 2 <= pixels; p += 2) {
    static_for<2>([&]<int j>() { count[j] += absolute<T>(load(x + (p + j) * L)) < level; });
  }
  if (p < pixels) count[0] += absolute<T>(load(x + p * L)) < level;
  return count[0] + count[1];
}

// unit: room for a vector for each output channel; see above.
template <class T>
void find_levels(const ConvMap<T>& map, const T* dy, T* unit, Levels<T>& levels) {
  constexpr int L = kLanes<T>;
  const int64_t side = map.height, radius = map.k / 2, window = side - radius, pixels = side * side;
  const int64_t cut[4] = {0, least(window, radius), most(window, radius), side};  // as above
  const T smallest = std::numeric_limits<T>::min() * T(1e6), infinity = std::numeric_limits<T>::infinity();
  levels = Levels<T>{};
  levels.smallest = infinity;
  levels.known = true;
  Vec<T> size{};
  for (int64_t o = 0; o < map.out_group(); ++o) {
    const Vec<T> sum = sum_of_squares(dy + o * map.out_channel, pixels);
    store(unit + o * L, sum);
    size += sum;
  }
  const IVec<T> there = (size > splat(smallest)) & (size < splat(infinity));
  if (any_lane<T>(~there)) {
    Vec<T> sum{};
    for (int64_t o = 0; o < map.out_group(); ++o) sum += sum_of_sizes(dy + o * map.out_channel, pixels);
    levels.known = !any_lane<T>(~there & ~(sum == Vec<T>{}));
    if (!levels.known) return;
  }
  T largest = 0;
  for (int lane = 0; lane < L; ++lane) {
    size[lane] = there[lane] ? std::sqrt(size[lane]) : T(0);
    largest = most(largest, T(size[lane]));
  }
  if (largest == T(0)) return;
  levels.weight = size / splat(largest);
  levels.images = sum_of_lanes<T>(levels.weight);
  const Vec<T> inverse = there ? T(1) / (there ? size : splat(T(1))) : Vec<T>{};
  for (int64_t o = 0; o < map.out_group(); ++o) {
    const Vec<T> square = load(unit + o * L);
    const T sum = sum_of_lanes<T>(square);
    if (!(sum > smallest)) {
      store(unit + o * L, Vec<T>{});  // nothing is below it
      // Zeros, or nothing that is known.
      levels.known = !any_lane<T>(~(sum_of_sizes(dy + o * map.out_channel, pixels) == Vec<T>{}));
      if (!levels.known) return;
      continue;
    }
    levels.smallest = least(levels.smallest, T(std::sqrt(sum)));
    levels.largest = most(levels.largest, T(std::sqrt(sum)));
    // The root mean square of dy / g; a multiple of g is what a pixel is compared with.
    const T mean = std::sqrt(sum_of_lanes<T>(square * inverse) / largest / (T(pixels) * levels.images));
    store(unit + o * L, size * splat(mean));
    const Vec<T> level = load(unit + o * L) * splat(T(kOneLevel));
    IVec<T> rows[3];
    for (int i = 0; i < 3; ++i) {
      rows[i] = count_below(dy + o * map.out_channel + cut[i] * side * L, (cut[i + 1] - cut[i]) * side, level);
    }
    if (radius >= window) rows[1] = IVec<T>{};  // in neither
    for (int i = 0; i < 3; i += 2) {
      const Vec<T> count = __builtin_convertvector(-(rows[i] + rows[1]), Vec<T>);  // lanes of a comparison are -1
      levels.missing_of_one = most(levels.missing_of_one, sum_of_lanes<T>(count * levels.weight));
    }
  }
}

// Whether input channel x is rare; dy and unit: those of the levels.
template <class T>
bool is_rare(const ConvMap<T>& map, int64_t n, const T* x, const T* dy, const T* unit, Levels<T>& levels) {
  constexpr int L = kLanes<T>;
  const int64_t side = map.height, radius = map.k / 2, window = side - radius, pixels = side * side;
  const Vec<T> squares = sum_of_squares(x, pixels), sizes = sum_of_sizes(x, pixels);
  if (sum_of_lanes<T>(sizes) == T(0)) return false;
  const T smallest = std::numeric_limits<T>::min() * T(1e6), infinity = std::numeric_limits<T>::infinity();
  const T of_all = sum_of_lanes<T>(squares);
  if (!(of_all > smallest && of_all < infinity)) return true;
  if (levels.largest == T(0)) return false;  // dy is zero
  // Products of all with all must stay within the range, too.
  const T product = std::sqrt(of_all) * levels.smallest;
  if (!(product > smallest && std::sqrt(of_all) * levels.largest * T(1e6) < infinity)) return true;
  const T square = sum_of_lanes<T>(squares * levels.weight), sum = sum_of_lanes<T>(sizes * levels.weight);
  if (!(square > smallest)) return true;
  const T limit = square / sum;  // the usual size of what is not zero
  constexpr int64_t kParts = (kMostSide + L - 1) / L;
  alignas(64) T at[(kMostSide * kMostSide / L + 2) * L], line[(2 * kParts + 1) * L];
  auto sums_of_images = [&](int64_t p, auto whole) {
    Vec<T> rows[L];
    static_for<L>([&]<int r>() {
      if (!decltype(whole)::value && p + r >= pixels) {
        rows[r] = Vec<T>{};
      } else {
        const Vec<T> v = absolute<T>(load(x + (p + r) * L));
        rows[r] = (v < splat(limit) ? v : splat(limit)) * levels.weight;
      }
    });
    store(at + p, sums_of_lanes<T>(rows));
  };
  int64_t p = 0;
  for (; p + L <= pixels; p += L) sums_of_images(p, std::true_type{});
  if (p < pixels) sums_of_images(p, std::false_type{});
  store(at + round_up(pixels, L), Vec<T>{});
  // Sums over the rows of a window, a vector being a part of a row, then over its columns, a vector being windows.
  Vec<T> columns[kParts] = {}, fewest[kParts];
  for (auto& f : fewest) f = splat(infinity);
  for (int64_t c = kParts; c <= 2 * kParts; ++c) store(line + c * L, Vec<T>{});
  const int64_t parts = (side + L - 1) / L;
  for (int64_t h = 0; h < side; ++h) {
    for (int64_t c = 0; c < parts; ++c) {
      columns[c] += load(at + h * side + c * L);
      if (h >= window) columns[c] -= load(at + (h - window) * side + c * L);
      store(line + c * L, columns[c]);
    }
    if (h < window - 1) continue;
    for (int64_t c = 0; c * L <= radius; ++c) {
      Vec<T> sum{};
      for (int64_t w = 0; w < window; ++w) sum += load(line + c * L + w);
      fewest[c] = sum < fewest[c] ? sum : fewest[c];
    }
  }
  T fewest_of_all = infinity;
  for (int64_t w = 0; w <= radius; ++w) fewest_of_all = least(fewest_of_all, T(fewest[w / L][w % L]));
  const T pairs = fewest_of_all / limit - T(0.01);  // what is added and subtracted leaves errors
  const T needed = std::sqrt(square * T(pixels) * levels.images) * T(kError / kGradAllowed) / T(n);
  if (T(kOneLevel) * (pairs - levels.missing_of_one) * limit >= needed) return false;
  if (!levels.all) count_missing(map, dy, unit, levels);
  T found = 0;
  for (int j = 0; j < kLevels; ++j) {
    found += T(kLevel[j + 1] - kLevel[j]) * most(T(0), pairs - levels.missing[j]);
  }
  return !(found * limit >= needed);
}

// Elements of scratch of fourier_gradients(); of fourier_map() where weights have none.
template <class T>
MFEF_INLINE int64_t fourier_scratch(const ConvMap<T>& map, int64_t n, bool weights) {
  constexpr int L = kLanes<T>;
  const int64_t channels = map.in_group() + map.out_group(), step = spectrum_vectors(n) * L;
  if (!weights) return channels * step;
  const int64_t rest = (outputs_in_lanes(map) ? L + kLaneInputs : 1) * 2 * dft_bins(n) * L;
  return groups_at_once(map) * channels * step + most(rest, weight_grad_scratch<T>(map.k)) +
         round_up(map.in_group(), L) + map.out_group() * L;
}

// sums += the gradient of the weights of group g, whose x and dy these are, for the input channels that are rare, by
// direct sums. padded_x, padded_dy: room for a group with borders.
template <class T>
void direct_weight_grad(const ConvMap<T>& map, int64_t g, const T* x, const T* dy, const T* rare, T* padded_x,
                        T* padded_dy, T* sums, T* scratch) {
  constexpr int L = kLanes<T>;
  const int64_t in_group = map.in_group(), out_group = map.out_group(), taps = int64_t(map.k) * map.k;
  const ConvMap<T> one = images_map<T>(in_group, out_group, 1, map.k, map.height, map.width);
  int64_t dy_step = map.out_channel, dy_gap = 0;
  if (one.bordered()) {
    pad_images(one, in_group, x, padded_x);
    pad_images(one, out_group, dy, padded_dy);
    x = padded_x;
    dy = padded_dy + one.lead;
    dy_step = one.channel;
    dy_gap = one.pitch - one.width;
  }
  weight_grad_tiles<T>(
      one, x, dy, dy_step, scratch, dy_gap, [&](int64_t i) { return rare[i] != T(0); },
      [&](int64_t o, int out, int64_t i, int64_t t, Vec<T> sum) {
        for (int r = 0; r < L && t + r < out * taps; ++r) {
          sums[spectra_grad_at(map, g, o + (t + r) / taps, i) + (t + r) % taps * L] += sum[r];
        }
      });
}

// The gradients of a branch whose forward is `map` and whose data gradient is `back`: sums += that of the weights, and
// if `packed`, dx = that of x, in the place of x.
template <class T, class E>
void fourier_gradients(const ConvMap<T>& map, const ConvMap<T>& back, const DftTable<T>& table, int images, T* x,
                       const T* dy, T* sums, const T* packed, const E* weights, int64_t full_k, const int64_t stride[4],
                       T* padded_x, T* padded_dy, T* scratch) {
  constexpr int L = kLanes<T>;
  const int64_t step = spectrum_vectors(table.n) * L, at_once = groups_at_once(map);
  const int64_t in_group = map.in_group(), out_group = map.out_group(), taps = int64_t(map.k) * map.k;
  const int64_t group_size = packed_spectra_group(back, table.n);
  T* dy_spectra = scratch + at_once * in_group * step;
  T* rare = dy_spectra + at_once * out_group * step;
  T* unit = rare + round_up(in_group, L);
  T* rest = unit + out_group * L;
  for (int64_t first = 0; first < map.groups; first += at_once) {
    const int64_t groups = least(at_once, map.groups - first);
    bool apart[L], any = false;  // groups that are all rare
    for (int64_t r = 0; r < groups; ++r) {
      const T *x_group = x + (first + r) * in_group * map.channel,
              *dy_group = dy + (first + r) * out_group * map.out_channel;
      T *x_to = scratch + r * in_group * step, *dy_to = dy_spectra + r * out_group * step;
      Levels<T> levels;
      find_levels(map, dy_group, unit, levels);
      int64_t count = 0;
      for (int64_t i = 0; i < in_group; ++i) {
        const bool is = !levels.known || is_rare(map, table.n, x_group + i * map.channel, dy_group, unit, levels);
        rare[i] = is ? T(1) : T(0);
        count += is;
      }
      apart[r] = 2 * count > in_group;
      any |= !apart[r];
      // What is summed directly is zero here: so it stays apart whatever it holds.
      for (int64_t i = 0; i < in_group; ++i) {
        if (apart[r]) rare[i] = T(1);
        if (rare[i] == T(0)) {
          table.map(x_group + i * map.channel, x_to + i * step);
        } else {
          for (int64_t at = 0; at < step; at += L) store(x_to + i * step + at, Vec<T>{});
        }
      }
      for (int64_t o = 0; o < out_group; ++o) {
        if (!apart[r]) {
          table.map(dy_group + o * map.out_channel, dy_to + o * step);
        } else {
          for (int64_t at = 0; at < step; at += L) store(dy_to + o * step + at, Vec<T>{});
        }
      }
      if (count) direct_weight_grad(map, first + r, x_group, dy_group, rare, padded_x, padded_dy, sums, rest);
    }
    T* to = sums + weight_blocks(map, first) * taps * L;
    if (any && outputs_in_lanes(map)) {
      weight_spectra_lanes(map, table, images, scratch, dy_spectra, to, rest);
    } else if (any) {
      weight_spectra_pairs(map, table, groups, scratch, dy_spectra, to, rest);
    }
    for (int64_t r = 0; r < groups && packed; ++r) {
      const int64_t g = first + r;
      fourier_group<T, true>(back, table, dy + g * out_group * map.out_channel, !apart[r],
                             dy_spectra + r * out_group * step, packed + g * group_size,
                             packed + map.groups * group_size + g * guard_group(back),
                             RawWeights<E>(back, true, weights, full_k, stride, g), nullptr, false,
                             x + g * in_group * map.channel, nullptr, scratch + r * in_group * step);
    }
  }
}

// What the planner takes for the cycles of a block of images, fitted to the times of 94 branches on each instruction
// set (docs/decisions/fft-convolution.md): of a transform, for each bin; of a product of a pair's spectra, the weights'
// transform included, and of the weight gradient's, with weights in the lanes, for each bin; of turning dy, for each
// bin; of a direct product; of a sum over the lanes.
#if defined(MFEF_ISA_avx512) || defined(MFEF_ISA_avx512_bf16)
constexpr double kTransformCost = 16, kMultiplyCost = 4.2, kPairCost = 5;
#elif defined(MFEF_ISA_avx2)
constexpr double kTransformCost = 12, kMultiplyCost = 2.8, kPairCost = 3;
#else
constexpr double kTransformCost = 4.5, kMultiplyCost = 3, kPairCost = 6;
#endif
constexpr double kTurnCost = 6, kDirectCost = 0.575, kLaneSumCost = 1.4;

// Real products of all pairs of channels.
template <class T>
MFEF_INLINE double direct_products(const BlockArgs& a, const Branch& b) {
  const double pairs = double(b.out) * double(b.in / b.groups), line = double(meeting(a.height, b.k));
  const bool clips = images_map<T>(b.in, b.out, b.groups, b.k, a.height, a.width).layout == kClip;
  return pairs * line * (clips ? line : double(a.height) * double(b.k));
}

// Side of the spectra of a branch, 0 for a direct convolution: whichever should take fewer cycles, in either direction.
// Not by the number of images: alone or among others, an image has the same result.
template <class T>
MFEF_INLINE int choose_spectrum(const BlockArgs& a, const Branch& b) {
  if (a.plan != Plan::kImages || a.convolution == Convolution::kDirect || a.height != a.width || a.height < 1) return 0;
  const DftTable<T>* table = dft_table<T>(a.height, b.k);
  if (!table) return 0;
  if (a.convolution == Convolution::kFourier) return table->n;
  const double pairs = double(b.out) * double(b.in / b.groups), bins = double(dft_bins(table->n));
  const double fourier = double(b.in + b.out) * bins * kTransformCost + pairs * bins * kMultiplyCost;
  return fourier < direct_products<T>(a, b) * kDirectCost ? table->n : 0;
}

// Whether the weight gradient goes by the spectra that the data gradient has; those of dy are there.
template <class T>
MFEF_INLINE bool choose_spectral_weights(const BlockArgs& a, const Branch& b) {
  if (a.convolution == Convolution::kFourier) return true;
  const double pairs = double(b.out) * double(b.in / b.groups), bins = double(dft_bins(b.spectrum));
  const double transform = bins * kTransformCost, inverse = pairs / kLanes<T> * transform;
  double fourier = double(b.in) * transform;
  if (outputs_in_lanes(spectra_map<T>(b.in, b.out, b.groups, b.k, a.height, a.width))) {
    const double used = double(b.out / b.groups) / double(round_up(b.out / b.groups, kLanes<T>));
    fourier += (pairs * bins * kMultiplyCost + inverse) / used + double(b.out) * bins * kTurnCost;
  } else {
    fourier += pairs * bins * kPairCost + inverse;
  }
  return fourier < direct_products<T>(a, b) * kDirectCost + pairs * double(b.k * b.k) * kLaneSumCost;
}

}  // namespace mfef::cpu::MFEF_ISA
