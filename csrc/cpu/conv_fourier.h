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
// large leaves rounding errors in all of them. The caller computes such lanes again directly.
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

// Elements of all blocks of sums, and the gradient of group g out of them, as read_weight_grad() has it.
template <class T>
MFEF_INLINE int64_t spectra_grad_elements(const ConvMap<T>& map) {
  return weight_blocks(map, map.groups) * map.k * map.k * kLanes<T>;
}
template <class T, class E>
void read_spectra_grad(const ConvMap<T>& map, const T* sums, int64_t g, int64_t full_k, E* grads,
                       const int64_t stride[4]) {
  constexpr int L = kLanes<T>;
  const int64_t taps = int64_t(map.k) * map.k, in_group = map.in_group(), out_group = map.out_group();
  const int64_t at_once = groups_at_once(map), first = g % at_once * in_group * out_group;
  sums += weight_blocks(map, g - g % at_once) * taps * L;
  grads += g * out_group * stride[0] + (full_k - map.k) / 2 * (stride[2] + stride[3]);
  for (int64_t o = 0; o < out_group; ++o) {
    for (int64_t i = 0; i < in_group; ++i) {
      // In blocks of pairs, or of output channels for each input channel.
      const int64_t pair = first + o * in_group + i;
      const int64_t block = outputs_in_lanes(map) ? o / L * in_group + i : pair / L;
      const T* from = sums + block * taps * L + (outputs_in_lanes(map) ? o : pair) % L;
      E* to = grads + o * stride[0] + i * stride[1];
      for (int ky = 0; ky < map.k; ++ky) {
        for (int kx = 0; kx < map.k; ++kx, from += L) from_compute(*from, to + ky * stride[2] + kx * stride[3]);
      }
    }
  }
}

constexpr int kLaneInputs = kRegisters == 32 ? 8 : 4;  // of a tile with output channels in the lanes

// Elements of scratch of fourier_backward(); of fourier_forward() with weight_grad = false.
template <class T>
MFEF_INLINE int64_t fourier_scratch(const ConvMap<T>& map, int64_t n, bool weight_grad) {
  constexpr int L = kLanes<T>;
  const int64_t spectra = groups_at_once(map) * (map.in_group() + map.out_group()) * spectrum_vectors(n) * L;
  if (!weight_grad) return spectra;
  return spectra + (outputs_in_lanes(map) ? L + kLaneInputs : 1) * 2 * dft_bins(n) * L;
}

// Output channels in the lanes: dy is transposed to [bin][re, im][image][lane], x is read a number at a time.
template <class T>
void weight_spectra_lanes(const ConvMap<T>& map, const DftTable<T>& table, int images, const T* x, const T* dy, T* sums,
                          T* scratch, T* probe) {
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
      auto tile = [&](auto inputs) {
        constexpr int kIn = decltype(inputs)::value;
        for (int64_t b = 0; b < bins; ++b) {
          Vec<T> re[kIn], im[kIn];
          static_for<kIn>([&](auto j) { re[decltype(j)::value] = im[decltype(j)::value] = Vec<T>{}; });
          const T* d = turned + 2 * b * L * L;
          const T* at = x + i * step + 2 * b * L;
          for (int r = 0; r < images; ++r, d += L, ++at) {
            const Vec<T> d_re = load(d), d_im = load(d + L * L);
            static_for<kIn>([&](auto j) {
              constexpr int j_ = decltype(j)::value;
              const Vec<T> x_re = splat(at[j_ * step]), x_im = splat(at[j_ * step + L]);
              re[j_] += d_re * x_re;
              im[j_] += d_re * x_im;
              re[j_] += d_im * x_im;
              im[j_] -= d_im * x_re;
            });
          }
          static_for<kIn>([&](auto j) {
            constexpr int j_ = decltype(j)::value;
            store(products + (j_ * bins + b) * 2 * L, re[j_]);
            store(products + ((j_ * bins + b) * 2 + 1) * L, im[j_]);
          });
        }
        for (int j = 0; j < kIn; ++j, sums += taps * L) {
          table.inverse_kernel(products + j * bins * 2 * L, map.k, scale, sums, probe);
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
                          T* sums, T* scratch, T* probe) {
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
      static_for<L>([&](auto lane) {
        constexpr int l = decltype(lane)::value;
        re[l] = load(dy_at[l] + b) * load(x_at[l] + b) + load(dy_at[l] + b + L) * load(x_at[l] + b + L);
      });
      store(scratch + b, sums_of_lanes<T>(re));
      static_for<L>([&](auto lane) {
        constexpr int l = decltype(lane)::value;
        im[l] = load(dy_at[l] + b) * load(x_at[l] + b + L) - load(dy_at[l] + b + L) * load(x_at[l] + b);
      });
      store(scratch + b + L, sums_of_lanes<T>(im));
    }
    table.inverse_kernel(scratch, map.k, scale, sums, probe);
  }
}

// --- a map ------------------------------------------------------------------------------------------

// Products of a pixel and a tap along one side of a map: those that meet.
MFEF_INLINE int64_t meeting(int64_t side, int64_t k) {
  int64_t count = 0;
  for (int64_t d = -(k / 2); d <= k / 2; ++d) count += most<int64_t>(0, side - (d < 0 ? -d : d));
  return count;
}

// Rounding errors are proportional to what whole spectra hold, direct sums' only to what reaches the maps: where few
// taps miss a large pixel, the rest falls off the edges. Of maps and kernels that are random everywhere, meeting()
// says how much does; twice that keeps the error within the accuracy rule.
constexpr int kMostLost = 2;

// y is right to so many units of rounding of the root mean square of its spectra (of the channel of the group where it
// is largest). Pixels of equal sums were seen to differ by 15 such units, and by 38 in the worst of a million.
constexpr int kSlack = 16;

// Of the output maps of one group: the energy of their spectra and that of the maps.
template <class T>
struct Energies {
  Vec<T> spectra{}, largest{};
  alignas(64) T maps[kLanes<T>] = {};

  void add_spectrum(const T* bins, int64_t n) {
    const int64_t count = 2 * dft_bins(n);
    Vec<T> sums[4] = {};
    auto add = [&](int64_t first, auto vectors) {
      static_for<decltype(vectors)::value>([&](auto i) {
        const Vec<T> v = load(bins + (first + decltype(i)::value) * kLanes<T>);
        sums[decltype(i)::value] += v * v;
      });
    };
    int64_t at = 0;
    for (; at + 4 <= count; at += 4) add(at, Index<4>{});
    if (at < count) add(at, Index<2>{});
    // They are half of a spectrum; the other half is its mirror image.
    const Vec<T> energy = (sums[0] + sums[1] + (sums[2] + sums[3])) * T(2 * n * n);
    spectra += energy;
    largest = energy > largest ? energy : largest;
  }
  Vec<T> slack(int64_t n) const {
    Vec<T> v;
    for (int i = 0; i < kLanes<T>; ++i) v[i] = std::sqrt(largest[i]);
    return v * (kSlack * std::numeric_limits<T>::epsilon() / T(n));
  }
  // The lanes to compute again directly. What is not finite, or whose square is not, is among them.
  IVec<T> lost(const ConvMap<T>& map) const {
    const double kept = double(meeting(map.height, map.k)) / double(map.height * map.k);
    const Vec<T> found = load(maps);
    return ~(spectra * T(kept * kept / kMostLost) <= found) | (found * T(0) != T(0));
  }
};

// y = conv(x), both [channel][pixel][lane] without borders. Returns the lanes of y that are lost. slack: to
// what each output channel is right; null where nobody asks.
template <class T>
IVec<T> fourier_forward(const ConvMap<T>& map, const DftTable<T>& table, const T* x, const T* packed, const T* bias,
                        T* y, T* slack, T* scratch) {
  const int64_t in_group = map.in_group(), out_group = map.out_group();
  const int64_t step = spectrum_vectors(table.n) * kLanes<T>, group_size = packed_spectra_group(map, table.n);
  T* y_spectra = scratch + in_group * step;
  IVec<T> lost{};
  for (int64_t g = 0; g < map.groups; ++g) {
    for (int64_t i = 0; i < in_group; ++i) table.map(x + (g * in_group + i) * map.channel, scratch + i * step);
    multiply_spectra<T, true>(map, table.n, scratch, packed + g * group_size, y_spectra);
    Energies<T> energies;
    for (int64_t o = 0; o < out_group; ++o) {
      const int64_t c = g * out_group + o;
      energies.add_spectrum(y_spectra + o * step, table.n);
      table.inverse_map(y_spectra + o * step, y + c * map.out_channel,
                        {false, bias ? bias + c : nullptr, energies.maps});
    }
    lost |= energies.lost(map);
    for (int64_t o = 0; slack && o < out_group; ++o) {
      store(slack + (g * out_group + o) * kLanes<T>, energies.slack(table.n));
    }
  }
  for (int64_t o = 0; slack && any_lane<T>(lost) && o < map.out; ++o) {  // direct sums that are equal are equal
    store(slack + o * kLanes<T>, lost ? Vec<T>{} : load(slack + o * kLanes<T>));
  }
  return lost;
}

// The taps of a kernel are what is left of products of whole maps, whose rounding errors are proportional to
// `energy`, the root of the sum over the images of |x|^2 |dy|^2 (of the channels where they are largest). Where that
// is so many times the largest gradient, nearly all that was multiplied lies too far apart to meet under the kernel;
// direct sums never form those products. Random maps stay below 4; 8 keeps the error within the accuracy rule.
constexpr int kDoubt = 8;

// Of a block of images, the largest sum of squares over the pixels of a channel, lane by lane.
template <class T>
MFEF_INLINE Vec<T> largest_energy(const ConvMap<T>& map, const T* x, int64_t channels, int64_t step) {
  Vec<T> most_energy{};
  for (int64_t c = 0; c < channels; ++c, x += step) {
    Vec<T> sum{};
    for (int64_t p = 0; p < map.height * map.width; ++p) sum += load(x + p * kLanes<T>) * load(x + p * kLanes<T>);
    most_energy = sum > most_energy ? sum : most_energy;
  }
  return most_energy;
}

// The gradients of a branch whose forward is `map`, of those that are asked for: sums += that of the weights, if
// `sums`, and energy += its square; dx = that of x, or dx += it, if `packed`. dx may be x. Returns whether anything is
// lost.
template <class T>
bool fourier_backward(const ConvMap<T>& map, const DftTable<T>& table, int images, const T* x, const T* dy,
                      const T* packed, bool accumulate, T* dx, T* sums, T* energy, T* scratch) {
  const int64_t step = spectrum_vectors(table.n) * kLanes<T>, at_once = groups_at_once(map);
  const int64_t taps = int64_t(map.k) * map.k;
  ConvMap<T> back = map;
  back.in = map.out;
  back.out = map.in;
  const int64_t group_size = packed_spectra_group(back, table.n);
  T* dy_spectra = scratch + at_once * map.in_group() * step;
  T* rest = dy_spectra + at_once * map.out_group() * step;
  T most_energy = 0, probe[kLanes<T>] = {};
  IVec<T> lost{};
  for (int64_t g = 0; g < map.groups; g += at_once) {
    const int64_t groups = least(at_once, map.groups - g);
    const int64_t in = groups * map.in_group(), out = groups * map.out_group();
    const int64_t first_in = g * map.in_group(), first_out = g * map.out_group();
    for (int64_t o = 0; o < out; ++o) table.map(dy + (first_out + o) * map.out_channel, dy_spectra + o * step);
    if (sums) {
      const Vec<T> energies = largest_energy(map, x + first_in * map.channel, in, map.channel) *
                              largest_energy(map, dy + first_out * map.out_channel, out, map.out_channel);
      most_energy = most(most_energy, sum_of_lanes<T>(energies));
      for (int64_t i = 0; i < in; ++i) table.map(x + (first_in + i) * map.channel, scratch + i * step);
      if (outputs_in_lanes(map)) {
        weight_spectra_lanes(map, table, images, scratch, dy_spectra, sums, rest, probe);
      } else {
        weight_spectra_pairs(map, table, groups, scratch, dy_spectra, sums, rest, probe);
      }
      sums += weight_blocks(map, groups) * taps * kLanes<T>;
    }
    if (!packed) continue;
    for (int64_t r = 0; r < groups; ++r) {
      multiply_spectra<T, false>(back, table.n, dy_spectra + r * map.out_group() * step, packed + (g + r) * group_size,
                                 scratch + r * map.in_group() * step);
      Energies<T> energies;
      for (int64_t i = r * map.in_group(); i < (r + 1) * map.in_group(); ++i) {
        energies.add_spectrum(scratch + i * step, table.n);
        table.inverse_map(scratch + i * step, dx + (first_in + i) * map.channel, {accumulate, nullptr, energies.maps});
      }
      lost |= energies.lost(map);
    }
  }
  if (sums) *energy += most_energy;
  return any_lane<T>(lost | (load(probe) != load(probe)));
}

// Whether the weights' gradient of a branch, out of its sums, may be off by more than it should.
template <class T>
bool is_doubtful(const ConvMap<T>& map, const T* sums, T energy) {
  Vec<T> largest{};
  for (int64_t i = 0; i < spectra_grad_elements(map); i += kLanes<T>) {
    const Vec<T> v = load(sums + i), size = v < T(0) ? -v : v;
    largest = size > largest ? size : largest;
  }
  T of_all = 0;
  for (int i = 0; i < kLanes<T>; ++i) of_all = most(of_all, T(largest[i]));
  // Divided, lest the square overflow; an energy that did so is doubtful too.
  return energy != T(0) && !(energy / of_all / T(kDoubt * kDoubt) <= of_all);
}

// What the planner takes for the cycles of a block of images, fitted to the times of 94 branches on each instruction
// set (docs/kernels.md): of a transform, for each bin; of a product of a pair's spectra, the weights' transform
// included, and of the weight gradient's, with weights in the lanes, for each bin; of turning dy, for each bin; of a
// direct product; of a sum over the lanes.
#if defined(MFEF_ISA_avx512) || defined(MFEF_ISA_avx512_bf16)
constexpr double kTransformCost = 16, kMultiplyCost = 4.2, kPairCost = 5;
#elif defined(MFEF_ISA_avx2)
constexpr double kTransformCost = 12, kMultiplyCost = 2.8, kPairCost = 3;
#else
constexpr double kTransformCost = 4.5, kMultiplyCost = 3, kPairCost = 6;
#endif
constexpr double kTurnCost = 6, kDirectCost = 0.575, kLaneSumCost = 1.4;

// Side of the spectra of a branch in one direction, 0 for a direct convolution: whichever should take fewer cycles.
// Not by the number of images: alone or among others, an image has the same result.
template <class T>
MFEF_INLINE int choose_spectrum(const BlockArgs& a, const Branch& b, bool backward) {
  if (a.plan != Plan::kImages || a.convolution == Convolution::kDirect || a.height != a.width || a.height < 1) return 0;
  const DftTable<T>* table = dft_table<T>(a.height, b.k);
  if (!table) return 0;
  if (a.convolution == Convolution::kFourier) return table->n;
  const double pairs = double(b.out) * double(b.in / b.groups), side = double(a.height),
               bins = double(dft_bins(table->n));
  const double line = double(meeting(a.height, b.k));
  const bool clips = images_map<T>(b.in, b.out, b.groups, b.k, a.height, a.width).layout == kClip;
  const double products = line * (clips ? line : side * double(b.k));
  const double transform = bins * kTransformCost, multiply = pairs * bins * kMultiplyCost;
  double direct = pairs * products * kDirectCost;
  double fourier = double(b.in + b.out) * transform + multiply;
  if (backward) {
    direct = 2 * direct + pairs * double(b.k * b.k) * kLaneSumCost;
    fourier += double(b.in) * transform;
    const double inverse = pairs / kLanes<T> * transform;
    if (outputs_in_lanes(spectra_map<T>(b.in, b.out, b.groups, b.k, a.height, a.width))) {
      const double used = double(b.out / b.groups) / double(round_up(b.out / b.groups, kLanes<T>));
      fourier += (multiply + inverse) / used + double(b.out) * bins * kTurnCost;
    } else {
      fourier += pairs * bins * kPairCost + inverse;
    }
  }
  return fourier < direct ? table->n : 0;
}

// The lanes of y = conv(x) that the spectra lost, by direct sums, an input channel at a time. Weights are read as they
// are; several output channels share a load of x.
template <class T, class E>
void direct_lanes(const ConvMap<T>& map, const T* x, const E* weights, int64_t full_k, const int64_t stride[4],
                  const T* bias, IVec<T> lanes, T* y) {
  constexpr int L = kLanes<T>;
  const int radius = map.k / 2;
  weights += (full_k - map.k) / 2 * (stride[2] + stride[3]);
  auto block = [&](int64_t o, auto count) {
    constexpr int kCount = decltype(count)::value;
    const T* group = x + o / map.out_group() * map.in_group() * map.channel;
    for (int64_t h = 0; h < map.height; ++h) {
      const int64_t ky_begin = most<int64_t>(0, radius - h), ky_end = least<int64_t>(map.k, map.height + radius - h);
      for (int64_t w = 0; w < map.width; ++w) {
        const int64_t kx_begin = most<int64_t>(0, radius - w), kx_end = least<int64_t>(map.k, map.width + radius - w);
        Vec<T> sum[kCount] = {};
        for (int64_t i = 0; i < map.in_group(); ++i) {
          Vec<T> part[kCount] = {};
          for (int64_t ky = ky_begin; ky < ky_end; ++ky) {
            const T* row = group + i * map.channel + ((h + ky - radius) * map.width + w - radius) * L;
            const E* from = weights + o * stride[0] + i * stride[1] + ky * stride[2];
            for (int64_t kx = kx_begin; kx < kx_end; ++kx) {
              const Vec<T> v = load(row + kx * L);
              static_for<kCount>([&](auto r) {
                constexpr int r_ = decltype(r)::value;
                part[r_] += v * splat(to_compute(from[r_ * stride[0] + kx * stride[3]]));
              });
            }
          }
          static_for<kCount>([&](auto r) { sum[decltype(r)::value] += part[decltype(r)::value]; });
        }
        static_for<kCount>([&](auto r) {
          constexpr int r_ = decltype(r)::value;
          if (bias) sum[r_] += splat(bias[o + r_]);
          T* to = y + (o + r_) * map.out_channel + (h * map.width + w) * L;
          store(to, lanes ? sum[r_] : load(to));
        });
      }
    }
  };
  constexpr int kMany = kRegisters == 32 ? 8 : 4;
  for (int64_t o = 0; o < map.out;) {
    const int64_t of_group = map.out_group() - o % map.out_group();
    if (of_group >= kMany) {
      block(o, Index<kMany>{});
      o += kMany;
    } else {
      block(o, Index<1>{});
      o += 1;
    }
  }
}

}  // namespace mfef::cpu::MFEF_ISA
