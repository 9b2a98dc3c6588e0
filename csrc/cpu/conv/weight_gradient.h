// The weight gradient by direct sums. Sums over pixels run through the register tiles of tiles.h; maps of a few pixels
// have output channels in the lanes instead.
#pragma once

#include "cpu/conv/shape.h"

namespace mfef::cpu::MFEF_ISA {

// Elements of scratch that weight_grad_direct needs: the sums of the widest tile.
template <class T>
MFEF_INLINE int64_t weight_grad_scratch(int k) {
  return (int64_t(kOutCounts[kOutCount - 1]) * k * k + kLanes<T>)*kLanes<T>;
}

// Bytes of dy, of all output channels of a tile, that stay in the L1 cache beside x and the sums.
constexpr int64_t kBandBytes = 32 * 1024;

// Output channels of the weight gradient's next tile.
template <class T>
MFEF_INLINE int next_grad_out(const ConvShape<T>& shape, int64_t remaining) {
  const int ki = kernel_size_index<T>(shape.k);
  int out = 1;
  for (int i = 0; i < kOutCount; ++i) {
    if (kOutCounts[i] <= remaining && weight_grad_fits(kOutCounts[i], kKernelSizes[ki])) out = kOutCounts[i];
  }
  return out;
}

// The sums over a map of the products for one tile of output channels and one input channel, a vector for each element
// of [out of the tile][ky][kx]. dy: see weight_grad_tiles().
template <class T>
MFEF_INLINE void weight_grad_sums(const ConvShape<T>& shape, WeightGradTileFn<T> run_tile, int out, const T* x,
                                  const T* dy, int64_t dy_channel, int64_t dy_row, T* sums) {
  constexpr int L = kLanes<T>;
  const bool pixels = shape.layout == kPixels;
  const int radius = shape.k / 2;
  // Rows of taps that meet the map at all; the tiles leave out the others and, when clipping, columns.
  const int ky_begin = int(max<int64_t>(0, radius - (shape.height - 1)));
  const int ky_end = int(min<int64_t>(shape.k, radius + shape.height));
  // Rows (images) or vectors (pixels) of dy at a time: no more than a chain, and what the L1 cache keeps for all ky.
  const int64_t vectors = max<int64_t>(1, min<int64_t>(kGradChain, kBandBytes / (out * L * int64_t(sizeof(T)))));
  const int64_t band = pixels ? vectors : max<int64_t>(1, vectors / shape.width);
  WeightGradTile<T> tile;
  tile.k = shape.k;
  tile.x_row = pixels ? shape.pitch : shape.pitch * L;
  tile.dy_row = dy_row;
  tile.dy_channel = dy_channel;
  // A band of rows of dy; the first to reach a ky starts its sums.
  auto run = [&](int ky, const T* x_at, const T* dy_at, int64_t rows, int64_t width, bool first) {
    tile.sums = sums + int64_t(ky) * shape.k * L;
    tile.x = x_at;
    tile.dy = dy_at;
    tile.rows = rows;
    tile.width = width;
    tile.accumulate = !first;
    run_tile(tile);
  };
  for (int64_t p = 0; pixels && p < shape.vectors; p += band) {
    for (int ky = 0; ky < shape.k; ++ky) {
      run(ky, x + ky * shape.pitch + p * L, dy + p * L, 1, min(band, shape.vectors - p), p == 0);
    }
  }
  // A row longer than a chain has the padded layout, where any part of a row is one of its own.
  const int64_t part = shape.layout == kClip ? shape.width : kGradChain;
  for (int64_t top = 0; !pixels && top < shape.height; top += band) {
    for (int ky = ky_begin; ky < ky_end; ++ky) {
      const int64_t first = max<int64_t>(0, radius - ky), begin = max(top, first);
      const int64_t end = min(min(top + band, shape.height), shape.height + radius - ky);
      if (begin >= end) continue;
      const T* x_row = x + (begin + ky - radius) * tile.x_row;
      for (int64_t w = 0; w < shape.width; w += part) {
        run(ky, x_row + w * L, dy + begin * dy_row + w * L, end - begin, min(part, shape.width - w),
            begin == first && w == 0);
      }
    }
  }
}

// The gradient of the weights for the input channels that are wanted(channel): calls add(o, out, i, t, sums) with
// elements [t, t + kLanes) of the gradient [out of the tile][ky][kx] of `out` output channels from o on and input
// channel i of a group. Groups, tiles and input channels follow each other. dy has rows of `width` vectors, `dy_gap`
// vectors apart (images), or the padded layout of the shape, borders zero (pixels).
template <class T, class Wanted, class Add>
MFEF_INLINE void weight_grad_tiles(const ConvShape<T>& shape, const T* x, const T* dy, int64_t dy_channel, T* scratch,
                                   int64_t dy_gap, const Wanted& wanted, const Add& add) {
  constexpr int L = kLanes<T>;
  const int64_t in_group = shape.in_group(), out_group = shape.out_group();
  const auto& tiles = conv_table<T>().weight_grad[shape.layout][kernel_size_index<T>(shape.k)];
  const int pix = shape.layout == kClip ? pix_index(int(shape.width)) : 0;
  if (shape.k / 2 >= min(shape.height, shape.width)) {  // some taps meet no pixel
    for (int64_t i = 0; i < weight_grad_scratch<T>(shape.k); i += L) store(scratch + i, Vec<T>{});
  }
  for (int64_t g = 0; g < shape.groups; ++g) {
    for (int64_t o = 0; o < out_group;) {
      const int out = next_grad_out(shape, out_group - o);
      for (int64_t i = 0; i < in_group; ++i) {
        if (!wanted(g * in_group + i)) continue;
        weight_grad_sums(shape, tiles[out_index(out)][pix], out, x + (g * in_group + i) * shape.channel,
                         dy + (g * out_group + o) * dy_channel, dy_channel, (shape.width + dy_gap) * L, scratch);
        // Sums of lanes, kLanes of them at a time; those beyond the last tap are never read.
        for (int64_t t = 0; t < out * shape.taps(); t += L) {
          Vec<T> lanes[L];
          static_for<L>([&]<int r>() { lanes[r] = load(scratch + (t + r) * L); });
          add(o, out, i, t, sums_of_lanes<T>(lanes));
        }
      }
      o += out;
    }
  }
}

// sums += the whole gradient in the order in which it is computed, [group][tile][in][out of the tile][ky][kx], every
// (tile, in) rounded up to whole vectors, so that sums over lanes are added a vector at a time. read_weight_grad() puts
// them in order.
template <class T>
void weight_grad_direct(const ConvShape<T>& shape, const T* x, const T* dy, int64_t dy_channel, T* sums, T* scratch,
                        int64_t dy_gap = 0) {
  weight_grad_tiles<T>(
      shape, x, dy, dy_channel, scratch, dy_gap, [](int64_t) { return true; },
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
MFEF_INLINE bool weight_grad_by_channels(const ConvShape<T>& shape) {
  return shape.layout != kPixels && shape.in_group() >= 4 && shape.height * shape.width * kLanes<T> <= kChain;
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
MFEF_INLINE int64_t channel_blocks_out(const ConvShape<T>& shape) {
  return divide_up(shape.out_group(), kTaskVectors * kLanes<T>);
}
template <class T>
MFEF_INLINE int64_t channel_blocks_in(const ConvShape<T>& shape) {
  return divide_up(shape.in_group(), kTaskIn);
}

// One tap, kVecs vectors of output channels and kCount input channels, summed over a block of images; to: [output
// vector][input channel], `to_out` and `to_in` elements apart.
template <class T, int kVecs, int kCount>
MFEF_INLINE void weight_grad_tap(const ConvShape<T>& shape, int64_t images, const T* x, const T* dy, int64_t dh,
                                 int64_t dw, T* to, int64_t to_out, int64_t to_in, bool first) {
  constexpr int L = kLanes<T>;
  const int64_t dy_row = channel_row<T>(shape.out), dy_image = shape.height * shape.width * dy_row;
  Vec<T> acc[kVecs][kCount] = {};
  for (int64_t h = max<int64_t>(0, -dh); h < min(shape.height, shape.height - dh); ++h) {
    for (int64_t w = max<int64_t>(0, -dw); w < min(shape.width, shape.width - dw); ++w) {
      const T* d = dy + (h * shape.width + w) * dy_row;
      const T* at = x + shape.lead + ((h + dh) * shape.pitch + w + dw) * L;
      for (int64_t r = 0; r < images; ++r, d += dy_image, ++at) {
        Vec<T> dy_vec[kVecs];
        static_for<kVecs>([&]<int v>() { dy_vec[v] = load(d + v * L); });
        static_for<kCount>([&]<int i>() {
          const Vec<T> scalar = splat(at[i * shape.channel]);
          static_for<kVecs>([&]<int v>() { acc[v][i] += dy_vec[v] * scalar; });
        });
      }
    }
  }
  static_for<kVecs>([&]<int v>() {
    static_for<kCount>([&]<int i>() {
      T* sum = to + v * to_out + i * to_in;
      store(sum, first ? acc[v][i] : load(sum) + acc[v][i]);
    });
  });
}

// sums, [group][kLanes output channels][in][ky][kx][lane]: the part of one task. x: [unit][channel], padded as
// the shape says; dy from channels_to_lanes.
template <class T>
void weight_grad_channels(const ConvShape<T>& shape, int64_t task, int64_t images, const T* x, const T* dy, T* sums) {
  constexpr int L = kLanes<T>;
  const int radius = shape.k / 2;
  const int64_t in_group = shape.in_group(), out_group = shape.out_group();
  const int64_t dy_image = shape.height * shape.width * channel_row<T>(shape.out), sums_in = shape.taps() * L;
  const int64_t blocks_in = channel_blocks_in(shape), blocks_out = channel_blocks_out(shape);
  const int64_t g = task / (blocks_out * blocks_in);
  const int64_t o = task / blocks_in % blocks_out * kTaskVectors * L;
  const int64_t in_begin = task % blocks_in * kTaskIn, in_end = min(in_begin + kTaskIn, in_group);
  sums += (g * round_up(out_group, L) + o) * in_group * shape.taps();
  auto run = [&]<int kVecs>(Index<kVecs>) {
    auto inputs = [&]<int kCount>(int64_t i, Index<kCount>) {
      for (int64_t image = 0; image < images; image += L) {
        const T* x_first = x + (image / L * shape.in + g * in_group + i) * shape.channel;
        const T* dy_first = dy + image * dy_image + g * out_group + o;
        T* to = sums + i * sums_in;
        for (int ky = 0; ky < shape.k; ++ky) {
          for (int kx = 0; kx < shape.k; ++kx, to += L) {
            weight_grad_tap<T, kVecs, kCount>(shape, min<int64_t>(L, images - image), x_first, dy_first, ky - radius,
                                              kx - radius, to, in_group * sums_in, sums_in, image == 0);
          }
        }
      }
    };
    int64_t i = in_begin;
    for (; i + 8 <= in_end; i += 8) inputs(i, Index<8>{});
    in_fours(i, in_end, inputs);
  };
  if (kTaskVectors > 1 && out_group - o > L) {
    run(Index<kTaskVectors>{});
  } else {
    run(Index<1>{});
  }
}

// --- either form ----------------------------------------------------------------------------------

// Elements of the sums.
template <class T>
int64_t weight_grad_elements(const ConvShape<T>& shape) {
  constexpr int L = kLanes<T>;
  if (weight_grad_by_channels(shape))
    return shape.groups * round_up(shape.out_group(), L) * shape.in_group() * shape.taps();
  int64_t count = 0;
  for (int64_t o = 0; o < shape.out_group();) {
    const int out = next_grad_out(shape, shape.out_group() - o);
    count += shape.in_group() * round_up(out * shape.taps(), L);
    o += out;
  }
  return shape.groups * count;
}

// Writes the taps of one pair of channels, `step` elements apart in the sums.
template <class T, class E>
MFEF_INLINE void write_taps(const T* sums, int64_t step, int k, const WeightView<E>& grads, E* to) {
  for (int ky = 0; ky < k; ++ky) {
    for (int kx = 0; kx < k; ++kx, sums += step) from_compute(*sums, to + ky * grads.row + kx * grads.column);
  }
}

// Writes the gradient of group g.
template <class T, class E>
void read_weight_grad(const ConvShape<T>& shape, const T* sums, int64_t g, const WeightView<E>& grads) {
  constexpr int L = kLanes<T>;
  const int64_t taps = shape.taps(), out_group = shape.out_group();
  const bool by_channels = weight_grad_by_channels(shape);
  sums += g * (weight_grad_elements(shape) / shape.groups);
  for (int64_t o = 0; o < out_group;) {
    const int64_t out = by_channels ? min<int64_t>(L, out_group - o) : next_grad_out(shape, out_group - o);
    for (int64_t i = 0; i < shape.in_group(); ++i) {
      for (int64_t j = 0; j < out; ++j) {
        write_taps(sums + (by_channels ? j : j * taps), by_channels ? L : 1, shape.k, grads, grads.at(g, o + j, i));
      }
      sums += by_channels ? taps * L : round_up(out * taps, L);
    }
    o += out;
  }
}

}  // namespace mfef::cpu::MFEF_ISA
