// A grouped convolution of one packed map, built from the register tiles of conv.h: which tiles, in
// which order, on which layout; and the repacking of weights that goes with them.
#pragma once

#include "block.h"
#include "conv.h"

namespace mfef::cpu::MFEF_ISA {

MFEF_INLINE int64_t round_up(int64_t a, int64_t b) { return (a + b - 1) / b * b; }

MFEF_INLINE int out_index(int out) { return out == 8 ? 4 : out - 1; }
MFEF_INLINE int pix_index(int pix) { return pix == 8 ? 4 : pix == 7 ? 3 : pix == 4 ? 2 : pix - 1; }

// The next tile's output channels: as few tiles as fit, as even as possible (16 = 3 + 3 + 3 + 3 + 2 + 2,
// not 3 x 5 + 1: a tile of one channel is load-bound).
MFEF_INLINE int next_out(int64_t remaining, int pix) {
  int limit = 1;
  for (int i = 0; i < kOutCount; ++i) {
    if (tile_fits(kOutCounts[i], pix)) limit = kOutCounts[i];
  }
  const int64_t tiles = (remaining + limit - 1) / limit;
  const int64_t even = (remaining + tiles - 1) / tiles;
  return even > 4 ? (even >= 8 ? 8 : 4) : int(even);
}

// The next tile's width in vectors, at most `limit`.
MFEF_INLINE int next_pix(int64_t remaining, int limit) {
  if (limit >= 8 && remaining % 8 == 0) return 8;
  if (limit >= 7 && remaining % 7 == 0) return 7;
  if (limit >= 8 && remaining > 8) return 8;
  if (limit >= 7 && remaining >= 7) return 7;
  return remaining >= 4 && limit >= 4 ? 4 : remaining >= 2 && limit >= 2 ? 2 : 1;
}

// Vectors from channel to channel of a map in the images plan. Not a multiple of 8: the channels of an 8 x 8
// map would be 4 KiB apart, which is one and the same set of the L1 cache for the same pixel of them all.
MFEF_INLINE int64_t channel_vectors(int64_t pixels) { return pixels % 8 == 0 ? pixels + 1 : pixels; }

// A convolution's sizes and the layout of its packed maps (lengths and offsets in elements of T).
template <class T>
struct ConvMap {
  int64_t in, out, groups, height, width;
  int k;
  ConvLayout layout;
  int64_t pitch;        // from row to row of the padded input: in vectors (images), elements (pixels)
  int64_t lead;         // zeros before the first pixel
  int64_t channel;      // length of one padded input channel
  int64_t vectors;      // kPixels: vectors of one output channel
  int64_t out_channel;  // length of one output channel
  int main_pix;         // widest tile
  bool dot;             // by dot products: x paired (pair_pixels()), and weights packed as such tiles read them

  int64_t in_group() const { return in / groups; }
  int64_t out_group() const { return out / groups; }
  int64_t weight_row() const { return dot ? k + k / 2 : k; }  // of one row of taps and one output channel
  int64_t weight_count() const { return out * in_group() * k * weight_row(); }
  bool bordered() const { return layout == kPadded; }
};

template <class T>
MFEF_INLINE ConvMap<T> images_map(int64_t in, int64_t out, int64_t groups, int64_t k, int64_t height, int64_t width) {
  ConvMap<T> m{};
  m.in = in;
  m.out = out;
  m.groups = groups;
  m.k = int(k);
  m.height = height;
  m.width = width;
  const bool clip = is_compiled_size<T>(k) && (width == 1 || width == 2 || width == 4 || width == 7 || width == 8);
  m.layout = clip ? kClip : kPadded;
  m.pitch = clip ? width : width + 2 * (k / 2);
  m.lead = clip ? 0 : (k / 2) * kLanes<T>;
  m.channel = channel_vectors(height * m.pitch) * kLanes<T>;
  m.out_channel = channel_vectors(height * width) * kLanes<T>;
  m.main_pix = clip ? int(width) : next_pix(width, kRegisters == 32 ? 8 : 4);
  return m;
}

// For conv_fourier.h: no borders.
template <class T>
MFEF_INLINE ConvMap<T> spectra_map(int64_t in, int64_t out, int64_t groups, int64_t k, int64_t height, int64_t width) {
  ConvMap<T> m{};
  m.in = in;
  m.out = out;
  m.groups = groups;
  m.k = int(k);
  m.height = height;
  m.width = width;
  m.layout = kSpectra;
  m.pitch = width;
  m.channel = m.out_channel = channel_vectors(height * width) * kLanes<T>;
  return m;
}

template <class T>
MFEF_INLINE ConvMap<T> pixels_map(int64_t in, int64_t out, int64_t groups, int64_t k, int64_t height, int64_t width) {
  ConvMap<T> m{};
  m.in = in;
  m.out = out;
  m.groups = groups;
  m.k = int(k);
  m.height = height;
  m.width = width;
  m.layout = kPixels;
  const int64_t radius = k / 2;
  m.pitch = width + radius;  // the zeros after a row are also those before the next
  m.lead = radius * m.pitch + radius;
  m.vectors = (height * m.pitch + kLanes<T> - 1) / kLanes<T>;
  m.out_channel = m.vectors * kLanes<T>;
  m.channel = round_up(m.lead + m.out_channel + m.lead, kLanes<T>);
  m.main_pix = kRegisters == 32 && m.vectors >= 8 ? 8 : m.vectors >= 4 ? 4 : m.vectors >= 2 ? 2 : 1;
  return m;
}

// Tiles of a group's weights follow each other, each [in][ky][kx][tile]; groups follow each other.
template <class T>
MFEF_INLINE int64_t tiles_per_group(const ConvMap<T>& map) {
  int64_t tiles = 0;
  for (int64_t o = 0; o < map.out_group(); ++tiles) o += next_out(map.out_group() - o, map.main_pix);
  return tiles;
}

// Packs tiles [begin, end). The weights in memory are (out, in / groups, full_k, full_k) with these strides, of
// which the map wants the inner k x k. flipped: the weights of the data gradient, which maps `map.in` channels
// of dy to `map.out` of dx; the weights in memory are then (map.in, map.out / groups, full_k, full_k).
template <class T, class E>
void pack_weights(const ConvMap<T>& map, bool flipped, const E* weights, int64_t full_k, const int64_t stride[4],
                  T* packed, int64_t begin, int64_t end) {
  const int64_t in_group = map.in_group(), out_group = map.out_group(), taps = int64_t(map.k) * map.weight_row();
  const int64_t tiles = tiles_per_group(map);
  // Steps in memory from one channel of the tile, one input channel, one tap to the next.
  const int64_t out_step = stride[flipped ? 1 : 0], in_step = stride[flipped ? 0 : 1];
  const int64_t ky_step = flipped ? -stride[2] : stride[2], kx_step = flipped ? -stride[3] : stride[3];
  const int64_t first_tap = (full_k - map.k) / 2 + (flipped ? map.k - 1 : 0);
  weights += first_tap * (stride[2] + stride[3]);
  auto pack = [&]<int kOut>(const E* from, T* to, Index<kOut>) {
    for (int64_t i = 0; i < in_group; ++i, from += in_step) {
      for (int ky = 0; ky < map.k; ++ky) {
        const E* at = from + ky * ky_step;
        for (int kx = 0; kx < map.k; ++kx, at += kx_step, to += kOut) {
          static_for<kOut>([&]<int j>() { to[j] = to_compute(at[j * out_step]); });
        }
        if constexpr (kPerLane<E, T> == 2) {
          const E* pair = from + ky * ky_step;
          for (int j = 0; map.dot && j < map.k / 2; ++j, pair += 2 * kx_step, to += kOut) {
            static_for<kOut>([&]<int o>() {
              const E* first = pair + o * out_step;
              to[o] = pair_of(first[0], first[kx_step]);
            });
          }
        }
      }
    }
  };
  for (int64_t g = begin / tiles; g < map.groups && g * tiles < end; ++g) {
    int64_t tile = g * tiles;
    for (int64_t o = 0; o < out_group; ++tile) {
      const int out = next_out(out_group - o, map.main_pix);
      if (tile >= begin && tile < end) {
        const E* from = weights + g * stride[0] * (flipped ? in_group : out_group) + o * out_step;
        T* to = packed + (g * out_group + o) * in_group * taps;
        static_for<kOutCount>([&]<int i>() {
          constexpr int kOut = kOutCounts[i];
          if (out == kOut) pack(from, to, Index<kOut>{});
        });
      }
      o += out;
    }
  }
}
// All tiles, of contiguous weights.
template <class T>
void pack_weights(const ConvMap<T>& map, bool flipped, const T* weights, T* packed) {
  const int64_t taps = int64_t(map.k) * map.k;
  const int64_t stride[4] = {(flipped ? map.out_group() : map.in_group()) * taps, taps, map.k, 1};
  pack_weights(map, flipped, weights, map.k, stride, packed, 0, map.groups * tiles_per_group(map));
}

// y = conv(x): x padded as the map says, y [out][out_channel] without borders.
template <class T>
void conv_map(const ConvMap<T>& map, const T* x, const T* packed, const T* bias, bool accumulate, T* y) {
  constexpr int L = kLanes<T>;
  const ConvTable<T>& table = conv_table<T>();
  const int ki = kernel_size_index<T>(map.k);
  const auto& tiles = (map.dot ? table.conv_dot : table.conv)[map.layout][ki];
  const int radius = map.k / 2;
  const int64_t in_group = map.in_group(), out_group = map.out_group();
  const int64_t tile_weights = in_group * map.k * map.weight_row();  // per output channel
  const bool pixels = map.layout == kPixels;
  const int64_t rows = pixels ? 1 : map.height;
  const int64_t width = pixels ? map.vectors : map.width;

  ConvTile<T> tile;
  tile.x_channel = map.channel;
  tile.x_row = pixels ? map.pitch : map.pitch * L;
  tile.k = map.k;
  tile.ky_begin = 0;
  tile.ky_end = map.k;
  tile.y_channel = map.out_channel;
  const int64_t taps = int64_t(map.k) * map.k;
  const int64_t longest = most<int64_t>(1, kChain / taps);  // input channels of a chain
  const int64_t chains = (in_group + longest - 1) / longest;
  const int64_t chain = (in_group + chains - 1) / chains;

  auto run_row = [&](int64_t g, int64_t h, int64_t o, int out, const T* weights) {
    const T* group = x + g * in_group * map.channel;
    if (!pixels) {
      tile.ky_begin = int(most<int64_t>(0, radius - h));
      tile.ky_end = int(least<int64_t>(map.k, map.height + radius - h));
      group += (h - radius) * tile.x_row;  // rows outside the map are never read
    }
    T* row = y + (g * out_group + o) * map.out_channel + (pixels ? 0 : h * map.width * L);
    for (int64_t w = 0; w < width;) {
      const int pix = map.layout == kClip ? int(width) : next_pix(width - w, map.main_pix);
      tile.y = row + w * L;
      for (int64_t i = 0; i < in_group; i += chain) {
        tile.x = group + i * map.channel + w * L;
        tile.channels = least(chain, in_group - i);
        tile.weights = weights + i * map.k * map.weight_row() * out;
        const bool last = i + chain >= in_group;
        tile.bias = bias && last ? bias + g * out_group + o : nullptr;
        tile.accumulate = accumulate || i > 0;
        tiles[out_index(out)][pix_index(pix)](tile);
      }
      w += pix;
    }
  };
  // Rows outside, tiles inside, while the group's weights stay in the L1 cache: the rows of x that the
  // taps meet are then reused by every tile from L2. Else tiles outside: their weights are reused.
  const bool rows_outside = out_group * tile_weights * int64_t(sizeof(T)) <= 24 * 1024;
  for (int64_t g = 0; g < map.groups; ++g) {
    const T* weights = packed + g * out_group * tile_weights;
    for (int64_t outer = 0; outer < (rows_outside ? rows : 1); ++outer) {
      for (int64_t o = 0; o < out_group;) {
        const int out = next_out(out_group - o, map.main_pix);
        if (rows_outside) {
          run_row(g, outer, o, out, weights + o * tile_weights);
        } else {
          for (int64_t h = 0; h < rows; ++h) run_row(g, h, o, out, weights + o * tile_weights);
        }
        o += out;
      }
    }
  }
}

// Elements of scratch that weight_grad_map needs: the sums of the widest tile.
template <class T>
MFEF_INLINE int64_t weight_grad_scratch(int k) {
  return (int64_t(kOutCounts[kOutCount - 1]) * k * k + kLanes<T>)*kLanes<T>;
}

// Bytes of dy, of all output channels of a tile, that stay in the L1 cache beside x and the sums.
constexpr int64_t kBandBytes = 32 * 1024;

// Output channels of the weight gradient's next tile.
template <class T>
MFEF_INLINE int next_grad_out(const ConvMap<T>& map, int64_t remaining) {
  const int ki = kernel_size_index<T>(map.k);
  int out = 1;
  for (int i = 0; i < kOutCount; ++i) {
    if (kOutCounts[i] <= remaining && weight_grad_fits(kOutCounts[i], kKernelSizes[ki])) out = kOutCounts[i];
  }
  return out;
}

// The weights' gradient of this map, for the input channels that are wanted(channel): calls add(o, out, i, t, sums)
// with elements [t, t + kLanes) of the gradient [out of the tile][ky][kx] of `out` output channels from o on and input
// channel i of a group. Groups, tiles and input channels follow each other. dy has rows of `width` vectors, `dy_gap`
// vectors apart (images), or the padded layout of the map, borders zero (pixels).
template <class T, class Wanted, class Add>
MFEF_INLINE void weight_grad_tiles(const ConvMap<T>& map, const T* x, const T* dy, int64_t dy_channel, T* scratch,
                                   int64_t dy_gap, const Wanted& wanted, const Add& add) {
  constexpr int L = kLanes<T>;
  const ConvTable<T>& table = conv_table<T>();
  const int ki = kernel_size_index<T>(map.k);
  const int radius = map.k / 2;
  const int64_t taps = int64_t(map.k) * map.k;
  const int64_t in_group = map.in_group(), out_group = map.out_group();
  const bool pixels = map.layout == kPixels;
  const int pi = map.layout == kClip ? pix_index(int(map.width)) : 0;

  // Rows of taps that meet the map at all; the tiles leave out the others and, when clipping, columns.
  const int ky_begin = int(most<int64_t>(0, radius - (map.height - 1)));
  const int ky_end = int(least<int64_t>(map.k, radius + map.height));
  if (radius >= least(map.height, map.width)) {
    for (int64_t i = 0; i < weight_grad_scratch<T>(map.k); i += L) store(scratch + i, Vec<T>{});
  }

  WeightGradTile<T> tile;
  tile.k = map.k;
  tile.x_row = pixels ? map.pitch : map.pitch * L;
  tile.dy_row = (map.width + dy_gap) * L;
  tile.dy_channel = dy_channel;
  for (int64_t g = 0; g < map.groups; ++g) {
    for (int64_t o = 0; o < out_group;) {
      const int out = next_grad_out(map, out_group - o);
      const auto run_tile = table.weight_grad[map.layout][ki][out_index(out)][pi];
      const T* dy_tile = dy + (g * out_group + o) * dy_channel;
      // Rows (images) or vectors (pixels) of dy at a time: no more than a chain, and what the L1 cache keeps for
      // all ky.
      const int64_t vectors = most<int64_t>(1, least<int64_t>(kGradChain, kBandBytes / (out * L * int64_t(sizeof(T)))));
      const int64_t band = pixels ? vectors : most<int64_t>(1, vectors / map.width);
      for (int64_t i = 0; i < in_group; ++i) {
        if (!wanted(g * in_group + i)) continue;
        const T* channel = x + (g * in_group + i) * map.channel;
        // A band of rows of dy, for all ky; the first to reach a ky starts its sums.
        auto run = [&](int ky, const T* x_at, const T* dy_at, int64_t rows, int64_t width, bool first) {
          tile.sums = scratch + int64_t(ky) * map.k * L;
          tile.x = x_at;
          tile.dy = dy_at;
          tile.rows = rows;
          tile.width = width;
          tile.accumulate = !first;
          run_tile(tile);
        };
        if (pixels) {
          for (int64_t p = 0; p < map.vectors; p += band) {
            for (int ky = 0; ky < map.k; ++ky) {
              run(ky, channel + ky * map.pitch + p * L, dy_tile + p * L, 1, least(band, map.vectors - p), p == 0);
            }
          }
        } else {
          // A row longer than a chain has the padded layout, where any part of a row is one of its own.
          const int64_t part = map.layout == kClip ? map.width : kGradChain;
          for (int64_t top = 0; top < map.height; top += band) {
            for (int ky = ky_begin; ky < ky_end; ++ky) {
              const int64_t first = most<int64_t>(0, radius - ky);
              const int64_t begin = most(top, first);
              const int64_t end = least(least(top + band, map.height), map.height + radius - ky);
              if (begin >= end) continue;
              const T* x_row = channel + (begin + ky - radius) * tile.x_row;
              for (int64_t w = 0; w < map.width; w += part) {
                run(ky, x_row + w * L, dy_tile + begin * tile.dy_row + w * L, end - begin, least(part, map.width - w),
                    begin == first && w == 0);
              }
            }
          }
        }
        // Sums of lanes, kLanes of them at a time; those beyond the last tap are never read.
        for (int64_t t = 0; t < out * taps; t += L) {
          Vec<T> lanes[L];
          static_for<L>([&]<int r>() { lanes[r] = load(scratch + (t + r) * L); });
          add(o, out, i, t, sums_of_lanes<T>(lanes));
        }
      }
      o += out;
    }
  }
}

// sums += all of it, in the order in which it is computed, [group][tile][in][out of the tile][ky][kx], every (tile, in)
// rounded up to whole vectors: so that sums over lanes are added where they arise, a vector at a time.
// read_weight_grad() puts them in order.
template <class T>
void weight_grad_map(const ConvMap<T>& map, const T* x, const T* dy, int64_t dy_channel, T* sums, T* scratch,
                     int64_t dy_gap = 0) {
  weight_grad_tiles<T>(
      map, x, dy, dy_channel, scratch, dy_gap, [](int64_t) { return true; },
      [&](int64_t, int, int64_t, int64_t, Vec<T> sum) {
        store(sums, load(sums) + sum);
        sums += kLanes<T>;
      });
}

// --- weight gradient with output channels in the lanes -------------------------------------------
//
// On a map of a few pixels the sums over lanes cost more than the products before them. There the weight
// gradient is a matrix product for each tap, sum over (image, pixel) of dy (out) x x (in), with output
// channels in the lanes and nothing to add up afterwards. It runs when all units are done: tasks share the
// weights between them, not the images, so that every sum has one place.

// Whether it is used: one chain of additions must hold all pixels of a block of images, and one or two
// input channels leave too few independent sums.
template <class T>
MFEF_INLINE bool weight_grad_by_channels(const ConvMap<T>& map) {
  return map.layout != kPixels && map.in_group() >= 4 && map.height * map.width * kLanes<T> <= kChain;
}

// Turns dy [channel][pixel][image] into [image][pixel][channel], with kLanes channels to spare.
template <class T>
MFEF_INLINE int64_t channel_row(int64_t channels) {
  return round_up(channels, kLanes<T>) + kLanes<T>;
}
template <class T>
void channels_to_lanes(const T* dy, int64_t channels, int64_t pixels, int64_t dy_channel, T* to) {
  constexpr int L = kLanes<T>;
  const int64_t row = channel_row<T>(channels);
  for (int64_t p = 0; p < pixels; ++p) {
    for (int64_t c = 0; c < row; c += L) {
      Vec<T> lanes[L];
      for (int r = 0; r < L; ++r) lanes[r] = c + r < channels ? load(dy + (c + r) * dy_channel + p * L) : Vec<T>{};
      transpose<T>(lanes);
      for (int r = 0; r < L; ++r) store(to + (r * pixels + p) * row + c, lanes[r]);
    }
  }
}

// A task: one group, up to kTaskVectors vectors of output channels, up to kTaskIn input channels.
constexpr int kTaskVectors = kRegisters == 32 ? 2 : 1;
constexpr int64_t kTaskIn = 32;
template <class T>
MFEF_INLINE int64_t channel_blocks_out(const ConvMap<T>& map) {
  return (map.out_group() + kTaskVectors * kLanes<T> - 1) / (kTaskVectors * kLanes<T>);
}
template <class T>
MFEF_INLINE int64_t channel_blocks_in(const ConvMap<T>& map) {
  return (map.in_group() + kTaskIn - 1) / kTaskIn;
}

// sums, [group][kLanes output channels][in][ky][kx][lane]: the part of one task. x: [unit][channel], padded as
// the map says; dy from channels_to_lanes.
template <class T>
void weight_grad_channels(const ConvMap<T>& map, int64_t task, int64_t images, const T* x, const T* dy, T* sums) {
  constexpr int L = kLanes<T>;
  const int radius = map.k / 2;
  const int64_t taps = int64_t(map.k) * map.k, pixels = map.height * map.width;
  const int64_t in_group = map.in_group(), out_group = map.out_group(), dy_row = channel_row<T>(map.out);
  const int64_t blocks_in = channel_blocks_in(map), blocks_out = channel_blocks_out(map);
  const int64_t g = task / (blocks_out * blocks_in);
  const int64_t o = task / blocks_in % blocks_out * kTaskVectors * L;
  const int64_t in_begin = task % blocks_in * kTaskIn, in_end = least(in_begin + kTaskIn, in_group);
  sums += (g * round_up(out_group, L) + o) * in_group * taps;

  // One tap and kCount input channels, summed over one block of images.
  auto block = [&]<int kVecs, int kCount>(const T* x_first, const T* dy_first, int64_t count_images, int ky, int kx,
                                          T* to, bool first, Index<kVecs>, Index<kCount>) {
    const int64_t dh = ky - radius, dw = kx - radius;
    Vec<T> acc[kVecs][kCount] = {};
    for (int64_t h = most<int64_t>(0, -dh); h < least(map.height, map.height - dh); ++h) {
      for (int64_t w = most<int64_t>(0, -dw); w < least(map.width, map.width - dw); ++w) {
        const T* d = dy_first + (h * map.width + w) * dy_row;
        const T* at = x_first + map.lead + ((h + dh) * map.pitch + w + dw) * L;
        for (int64_t r = 0; r < count_images; ++r, d += pixels * dy_row, ++at) {
          Vec<T> dy_vec[kVecs];
          static_for<kVecs>([&]<int v>() { dy_vec[v] = load(d + v * L); });
          static_for<kCount>([&]<int i>() {
            const Vec<T> scalar = splat(at[i * map.channel]);
            static_for<kVecs>([&]<int v>() { acc[v][i] += dy_vec[v] * scalar; });
          });
        }
      }
    }
    static_for<kVecs>([&]<int v>() {
      static_for<kCount>([&]<int i>() {
        T* sum = to + (v * in_group + i) * taps * L;
        store(sum, first ? acc[v][i] : load(sum) + acc[v][i]);
      });
    });
  };
  auto run = [&](auto vecs) {
    for (int64_t i = in_begin; i < in_end;) {
      const int64_t left = in_end - i;
      const int step = left >= 8 ? 8 : left >= 4 ? 4 : 1;
      for (int64_t image = 0; image < images; image += L) {
        const T* x_first = x + (image / L * map.in + g * in_group + i) * map.channel;
        const T* dy_first = dy + image * pixels * dy_row + g * out_group + o;
        const int64_t count = least<int64_t>(L, images - image);
        for (int ky = 0; ky < map.k; ++ky) {
          for (int kx = 0; kx < map.k; ++kx) {
            T* to = sums + (i * taps + int64_t(ky) * map.k + kx) * L;
            if (step == 8) {
              block(x_first, dy_first, count, ky, kx, to, image == 0, vecs, Index<8>{});
            } else if (step == 4) {
              block(x_first, dy_first, count, ky, kx, to, image == 0, vecs, Index<4>{});
            } else {
              block(x_first, dy_first, count, ky, kx, to, image == 0, vecs, Index<1>{});
            }
          }
        }
      }
      i += step;
    }
  };
  if (kTaskVectors > 1 && out_group - o > L) {
    run(Index<kTaskVectors>{});
  } else {
    run(Index<1>{});
  }
}

// Elements of the sums of either form, and the gradient of group g out of them, into a tensor (out, in / groups,
// full_k, full_k) of which the inner k x k are written.
template <class T>
int64_t weight_grad_elements(const ConvMap<T>& map) {
  constexpr int L = kLanes<T>;
  const int64_t taps = int64_t(map.k) * map.k;
  int64_t count = 0;
  if (weight_grad_by_channels(map)) {
    count = round_up(map.out_group(), L) * map.in_group() * taps;
  } else {
    for (int64_t o = 0; o < map.out_group();) {
      const int out = next_grad_out(map, map.out_group() - o);
      count += map.in_group() * round_up(out * taps, L);
      o += out;
    }
  }
  return map.groups * count;
}
template <class T, class E>
void read_weight_grad(const ConvMap<T>& map, const T* sums, int64_t g, int64_t full_k, E* grads,
                      const int64_t stride[4]) {
  constexpr int L = kLanes<T>;
  const int64_t taps = int64_t(map.k) * map.k, in_group = map.in_group(), out_group = map.out_group();
  const bool by_channels = weight_grad_by_channels(map);
  sums += g * (weight_grad_elements(map) / map.groups);
  grads += g * out_group * stride[0] + (full_k - map.k) / 2 * (stride[2] + stride[3]);
  for (int64_t o = 0; o < out_group;) {
    const int64_t out = by_channels ? least<int64_t>(L, out_group - o) : next_grad_out(map, out_group - o);
    for (int64_t i = 0; i < in_group; ++i) {
      for (int64_t j = 0; j < out; ++j) {
        E* to = grads + (o + j) * stride[0] + i * stride[1];
        const T* from = sums + (by_channels ? j : j * taps);
        for (int ky = 0; ky < map.k; ++ky) {
          for (int kx = 0; kx < map.k; ++kx, from += by_channels ? L : 1) {
            from_compute(*from, to + ky * stride[2] + kx * stride[3]);
          }
        }
      }
      sums += by_channels ? taps * L : round_up(out * taps, L);
    }
    o += out;
  }
}

// Zeroes the borders of the padded layout of the images plan.
template <class T>
void zero_borders(const ConvMap<T>& map, int64_t channels, T* to) {
  const int64_t row = map.width * kLanes<T>, pitch = map.pitch * kLanes<T>;
  for (int64_t c = 0; c < channels; ++c) {
    for (int64_t h = 0; h < map.height; ++h) {
      T* at = to + c * map.channel + h * pitch;
      for (int64_t i = 0; i < map.lead; i += kLanes<T>) store(at + i, Vec<T>{});
      for (int64_t i = map.lead + row; i < pitch; i += kLanes<T>) store(at + i, Vec<T>{});
    }
  }
}

// Copies an unbordered map, channels map.out_channel apart, into the padded layout of the images plan. The
// channels of `map` are those of either side: their size is the same.
template <class T>
void pad_images(const ConvMap<T>& map, int64_t channels, const T* from, T* to) {
  const int64_t row = map.width * kLanes<T>, pitch = map.pitch * kLanes<T>;
  for (int64_t c = 0; c < channels; ++c) {
    for (int64_t h = 0; h < map.height; ++h) {
      const T* at_from = from + c * map.out_channel + h * row;
      T* at = to + c * map.channel + h * pitch;
      for (int64_t i = 0; i < map.lead; i += kLanes<T>) store(at + i, Vec<T>{});
      for (int64_t i = 0; i < row; i += kLanes<T>) store(at + map.lead + i, load(at_from + i));
      for (int64_t i = map.lead + row; i < pitch; i += kLanes<T>) store(at + i, Vec<T>{});
    }
  }
}

// A map in the layout of the convolution, of bfloat16 widened, to lanes that hold a pixel and the next of its row as
// bfloat16, as tiles by dot products read it; after the last of a row there is zero. May be done in place.
MFEF_INLINE void pair_pixels(const ConvMap<float>& map, int64_t channels, const float* from, float* to) {
  constexpr int64_t L = kLanes<float>;
  for (int64_t c = 0; c < channels; ++c) {
    for (int64_t h = 0; h < map.height; ++h) {
      const float* row = from + c * map.channel + h * map.pitch * L;
      float* at = to + c * map.channel + h * map.pitch * L;
      Vec<float> v = load(row);
      for (int64_t w = 1; w <= map.pitch; ++w, at += L) {
        const Vec<float> next = w < map.pitch ? load(row + w * L) : Vec<float>{};
        store(at, bit_cast<Vec<float>>((bit_cast<WordVec>(v) >> 16) | bit_cast<WordVec>(next)));
        v = next;
      }
    }
  }
}

// Copies rows of pixels [channels][from_pitch] into the padded layout of the pixels plan.
template <class T>
void pad_pixels(const ConvMap<T>& map, int64_t channels, const T* from, int64_t from_pitch, T* to) {
  for (int64_t c = 0; c < channels; ++c) {
    T* channel = to + c * map.channel;
    for (int64_t i = 0; i < map.channel; i += kLanes<T>) store(channel + i, Vec<T>{});
    for (int64_t h = 0; h < map.height; ++h) {
      const T* row = from + c * from_pitch + h * map.width;
      T* at = channel + map.lead + h * map.pitch;
      for (int64_t w = 0; w < map.width; ++w) at[w] = row[w];
    }
  }
}

// Copies the output of the pixels plan, whose rows have the padded pitch, to rows without a gap.
template <class T>
void unpad_pixels(const ConvMap<T>& map, int64_t channels, const T* from, T* to, int64_t to_pitch) {
  for (int64_t c = 0; c < channels; ++c) {
    for (int64_t h = 0; h < map.height; ++h) {
      const T* row = from + c * map.out_channel + h * map.pitch;
      T* at = to + c * to_pitch + h * map.width;
      for (int64_t w = 0; w < map.width; ++w) at[w] = row[w];
    }
    for (int64_t p = map.height * map.width; p < to_pitch; ++p) to[c * to_pitch + p] = T(0);
  }
}

}  // namespace mfef::cpu::MFEF_ISA
