// A grouped convolution of one packed map as a product of spectra: forward and data gradient.
//
// Images plan only, on square maps that dft_table() has. Direct sums multiply every tap with every pixel it meets:
// 2704 products for a 9 x 9 kernel on 8 x 8 pixels, for each pair of an input and an output channel. The spectra of
// both on 12 x 12 have 74 complex bins, 296 products; transforms cost once per channel what they would otherwise cost
// once per pair. With X, Y, W, D the spectra of x, y, the weights and dy:
//
//   y:  Y = conj(W) X        dx:  W D
//
// A spectrum mixes all pixels of a map: one that is not finite reaches every output of its group, and one that is very
// large leaves rounding errors in all of them. find_weak() says which outputs those would spoil; they are summed
// directly. Gradients of weights always are: no bound of the kind can be had for them at a price worth paying
// (docs/kernels.md).
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
  static_for<kBins>([&](auto b) {
    static_for<kOut>([&](auto o) {
      re[decltype(b)::value][decltype(o)::value] = im[decltype(b)::value][decltype(o)::value] = Vec<T>{};
    });
  });
  for (int64_t i = 0; i < channels; ++i, x += x_step, weights += kBins * 2 * kOut) {
    __builtin_prefetch(weights + 16 * kBins * 2 * kOut);
    static_for<kBins>([&](auto b) {
      constexpr int b_ = decltype(b)::value;
      const Vec<T> x_re = load(x + 2 * b_ * L), x_im = load(x + (2 * b_ + 1) * L);
      const T* w = weights + b_ * 2 * kOut;
      static_for<kOut>([&](auto o) {
        constexpr int o_ = decltype(o)::value;
        const Vec<T> w_re = splat(w[o_]), w_im = splat(w[kOut + o_]);
        re[b_][o_] += w_re * x_re;
        im[b_][o_] += w_re * x_im;
        if constexpr (kConj) {
          re[b_][o_] += w_im * x_im;
          im[b_][o_] -= w_im * x_re;
        } else {
          re[b_][o_] -= w_im * x_im;
          im[b_][o_] += w_im * x_re;
        }
      });
    });
  }
  static_for<kOut>([&](auto o) {
    static_for<kBins>([&](auto b) {
      constexpr int o_ = decltype(o)::value, b_ = decltype(b)::value;
      T* to = y + o_ * y_step + 2 * b_ * L;
      store(to, accumulate ? load(to) + re[b_][o_] : re[b_][o_]);
      store(to + L, accumulate ? load(to + L) + im[b_][o_] : im[b_][o_]);
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
        auto tile = [&](auto out_count, auto bin_count) {
          constexpr int kOut = decltype(out_count)::value, kBins = decltype(bin_count)::value;
          multiply_tile<T, kOut, kBins, kConj>(x_bins + i * step, step, channels, packed, y_bins, step, i > 0);
          packed += channels * kBins * 2 * kOut;
        };
        static_for<kSpectrumTile>([&](auto at) {
          constexpr int kOut = decltype(at)::value + 1;
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
    auto read = [&](int64_t o, int64_t i, T unit) {
      const E* from = raw.at + o * raw.out + i * raw.in;
      T* to = sizes;
      for (int ky = 0; ky < map.k; ++ky, from += raw.row) {
        for (int kx = 0; kx < map.k; ++kx) {
          const T w = to_compute(from[kx * raw.column]);
          *to++ = (w < T(0) ? -w : w) * unit;
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
      // Of the M smallest those below a bound are added, and the others are no smaller than it. The smallest of random
      // weights lie about 1 / their number apart; where there are more of them, a lower bound serves.
      constexpr int kBounds = 3;
      const T u2 = mean_square(o);
      Vec<T> count[kBounds] = {}, sum[kBounds] = {};
      for (int64_t i = 0; i < in; ++i) {
        if (scale[i] == T(0)) continue;  // all its spectra are zero
        store(read(o, i, T(1) / (std::sqrt(u2) * scale[i])), splat(std::numeric_limits<T>::infinity()));
        for (int64_t t = 0; t < taps; t += L) {
          const Vec<T> v = load(sizes + t);
          static_for<kBounds>([&](auto j) {
            constexpr int j_ = decltype(j)::value;
            const IVec<T> below = v < splat(terms / T(in * taps << j_));
            count[j_] += below ? splat(T(1)) : Vec<T>{};
            sum[j_] += below ? v : Vec<T>{};
          });
        }
      }
      T smallest = 0;
      static_for<kBounds>([&](auto j) {
        constexpr int j_ = decltype(j)::value;
        const T below = sum_of_lanes<T>(count[j_]), rest = (terms - below) * (terms / T(in * taps << j_));
        if (below <= terms) smallest = most(smallest, sum_of_lanes<T>(sum[j_]) + rest);
      });
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

template <class T>
MFEF_INLINE Vec<T> absolute(Vec<T> v) {
  return v < Vec<T>{} ? -v : v;
}

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

// Outputs of one group that may not come out of spectra, the same for all its output channels.
template <class T>
struct Weak {
  alignas(64) IVec<T> lanes[kMostSide * kMostSide];  // of each pixel
  bool vacant[kMostSide * kMostSide];                // nothing but zeros meets a tap in those lanes
  IVec<T> whole;                                     // lanes of which all pixels are weak
  bool any, all;                                     // any output, all of them
};

// x: the channels of the group.
template <class T>
void find_weak(const ConvMap<T>& map, int64_t n, const T* x, const T* guard, Weak<T>& weak) {
  constexpr int L = kLanes<T>;
  const int64_t in = map.in_group(), pixels = map.height * map.width;
  const T *scale = guard, *reach = guard + in;
  const Vec<T> infinity = splat(std::numeric_limits<T>::infinity());
  Vec<T> square{};
  for (int64_t i = 0; i < in; ++i) {
    Vec<T> sum[4] = {};
    const T* at = x + i * map.channel;
    int64_t p = 0;
    for (; p + 4 <= pixels; p += 4) {
      static_for<4>([&](auto j) {
        const Vec<T> v = load(at + (p + decltype(j)::value) * L);
        sum[decltype(j)::value] += v * v;
      });
    }
    for (; p < pixels; ++p) sum[0] += load(at + p * L) * load(at + p * L);
    square += (sum[0] + sum[1] + (sum[2] + sum[3])) * splat(reach[i]);
  }
  Vec<T> limit;
  for (int lane = 0; lane < L; ++lane) limit[lane] = std::sqrt(square[lane]);
  limit *= splat(T(kError / kAllowed / double(n)));
  // What is not finite, or so small that its square vanishes, is trusted nowhere; but a map of zeros is.
  const IVec<T> known = (square > splat(std::numeric_limits<T>::min() * T(1e6))) & (square < infinity);
  limit = known ? limit : infinity;
  alignas(64) T sums[kMostSide * kMostSide * L];
  auto add = [&](int64_t i, auto count) {
    constexpr int kCount = decltype(count)::value;
    Vec<T> factor[kCount];
    static_for<kCount>([&](auto j) { factor[decltype(j)::value] = splat(scale[i + decltype(j)::value]); });
    for (int64_t p = 0; p < pixels; ++p) {
      Vec<T> sum = i ? load(sums + p * L) : Vec<T>{};
      static_for<kCount>([&](auto j) {
        constexpr int j_ = decltype(j)::value;
        const Vec<T> size = absolute<T>(load(x + (i + j_) * map.channel + p * L)) * factor[j_];
        sum += size < limit ? size : limit;
      });
      store(sums + p * L, sum);
    }
  };
  int64_t i = 0;
  for (; i + 4 <= in; i += 4) add(i, Index<4>{});
  for (; i < in; ++i) add(i, Index<1>{});
  IVec<T> blank{};
  if (any_lane<T>(~known)) {
    Vec<T> total{};
    for (int64_t p = 0; p < pixels; ++p) total += load(sums + p * L);
    blank = total == Vec<T>{};
  }
  for (int64_t h = 0; h < map.height; ++h) sum_windows(sums + h * map.width * L, map.width, L, map.k / 2);
  for (int64_t w = 0; w < map.width; ++w) sum_windows(sums + w * L, map.height, map.width * L, map.k / 2);
  const Vec<T> wanted = limit * splat(guard_terms(map, n));
  weak.whole = ~known;
  for (int64_t p = 0; p < pixels; ++p) {
    const Vec<T> sum = load(sums + p * L);
    weak.lanes[p] = ~(sum >= wanted) & ~blank;
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
  auto pixel = [&](int64_t h, int64_t w, int64_t o, auto count) {
    constexpr int kCount = decltype(count)::value;
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
          static_for<kCount>([&](auto r) {
            constexpr int r_ = decltype(r)::value;
            part[r_] += v * splat(T(to_compute(from[r_ * raw.out + kx * raw.column])));
          });
        }
      }
      static_for<kCount>([&](auto r) { sum[decltype(r)::value] += part[decltype(r)::value]; });
    }
    static_for<kCount>([&](auto r) {
      constexpr int r_ = decltype(r)::value;
      if (bias) sum[r_] += splat(bias[o + r_]);
      T* to = y + (o + r_) * y_step + p * L;
      store(to, weak.lanes[p] ? sum[r_] : load(to));
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
      static_for<2>([&](auto i) {
        const Vec<T> v = load(spectra + (at + decltype(i)::value) * kLanes<T>);
        sums[decltype(i)::value] += v * v;
      });
    }
    const Vec<T> sum = sums[0] + sums[1];
    largest = sum > largest ? sum : largest;
  }
  for (int i = 0; i < kLanes<T>; ++i) largest[i] = std::sqrt(2 * largest[i]);  // bins are half of a spectrum
  return largest;
}

// Elements of scratch.
template <class T>
MFEF_INLINE int64_t fourier_scratch(const ConvMap<T>& map, int64_t n) {
  return (map.in_group() + map.out_group()) * spectrum_vectors(n) * kLanes<T>;
}

// y = conv(x), or y += conv(x), both [channel][pixel][lane] without borders; kBackward: of a data gradient, whose map
// this is. x and y are not the same. slack: to what each output channel is right; null where nobody asks.
template <class T, bool kBackward, class E>
void fourier_map(const ConvMap<T>& map, const DftTable<T>& table, const T* x, const T* packed, const E* weights,
                 int64_t full_k, const int64_t stride[4], const T* bias, bool accumulate, T* y, T* slack, T* scratch) {
  const int64_t in_group = map.in_group(), out_group = map.out_group();
  const int64_t step = spectrum_vectors(table.n) * kLanes<T>, group_size = packed_spectra_group(map, table.n);
  const T* guard = packed + map.groups * group_size;
  T* spectra = scratch + in_group * step;
  Weak<T> weak;
  for (int64_t g = 0; g < map.groups; ++g, x += in_group * map.channel, y += out_group * map.out_channel) {
    find_weak(map, table.n, x, guard + g * guard_group(map), weak);
    Vec<T> gap{};
    // What is added to y takes the place of its spectra first.
    T* to = accumulate ? spectra : y;
    const int64_t to_step = accumulate ? step : map.out_channel;
    const T* of_group = bias ? bias + g * out_group : nullptr;
    if (!weak.all) {
      for (int64_t i = 0; i < in_group; ++i) table.map(x + i * map.channel, scratch + i * step);
      multiply_spectra<T, !kBackward>(map, table.n, scratch, packed + g * group_size, spectra);
      if (slack) {
        gap = largest_spectrum(out_group, table.n, spectra) * splat(kSlack * std::numeric_limits<T>::epsilon());
        gap = weak.whole ? Vec<T>{} : gap;  // direct sums that are equal are equal
      }
      for (int64_t o = 0; o < out_group; ++o) {
        table.inverse_map(spectra + o * step, of_group ? of_group + o : nullptr, to + o * to_step);
      }
    }
    if (weak.any) {
      direct_sums(map, weak, x, RawWeights<E>(map, kBackward, weights, full_k, stride, g), of_group, to, to_step);
    }
    for (int64_t o = 0; o < out_group; ++o) {
      if (slack) store(slack + (g * out_group + o) * kLanes<T>, gap);
      if (!accumulate) continue;
      T* sum = y + o * map.out_channel;
      for (int64_t p = 0; p < map.height * map.width; ++p) {
        const int64_t at = p * kLanes<T>;
        store(sum + at, load(sum + at) + load(to + o * to_step + at));
      }
    }
  }
}

// What the planner takes for the cycles of a block of images, fitted to the times of 94 branches on each instruction
// set (docs/kernels.md): of a transform, for each bin; of a product of a pair's spectra, the weights' transform
// included, for each bin; of a direct product.
#if defined(MFEF_ISA_avx512) || defined(MFEF_ISA_avx512_bf16)
constexpr double kTransformCost = 16, kMultiplyCost = 4.2;
#elif defined(MFEF_ISA_avx2)
constexpr double kTransformCost = 12, kMultiplyCost = 2.8;
#else
constexpr double kTransformCost = 4.5, kMultiplyCost = 3;
#endif
constexpr double kDirectCost = 0.575;

// Side of the spectra of a branch, 0 for a direct convolution: whichever should take fewer cycles, in either direction.
// Not by the number of images: alone or among others, an image has the same result.
template <class T>
MFEF_INLINE int choose_spectrum(const BlockArgs& a, const Branch& b) {
  if (a.plan != Plan::kImages || a.convolution == Convolution::kDirect || a.height != a.width || a.height < 1) return 0;
  const DftTable<T>* table = dft_table<T>(a.height, b.k);
  if (!table) return 0;
  if (a.convolution == Convolution::kFourier) return table->n;
  const double pairs = double(b.out) * double(b.in / b.groups), side = double(a.height);
  const double bins = double(dft_bins(table->n)), line = double(meeting(a.height, b.k));
  const bool clips = images_map<T>(b.in, b.out, b.groups, b.k, a.height, a.width).layout == kClip;
  const double products = line * (clips ? line : side * double(b.k));
  const double fourier = double(b.in + b.out) * bins * kTransformCost + pairs * bins * kMultiplyCost;
  return fourier < pairs * products * kDirectCost ? table->n : 0;
}

}  // namespace mfef::cpu::MFEF_ISA
