// A grouped convolution by direct sums: weights packed for the register tiles of tiles.h, and the tiles run over a map.
#pragma once

#include "cpu/conv/shape.h"

namespace mfef::cpu::MFEF_ISA {

// Tiles of a group's weights follow each other, each [in][ky][kx][tile]; groups follow each other.
template <class T>
MFEF_INLINE int64_t tiles_per_group(const ConvShape<T>& shape) {
  int64_t tiles = 0;
  for (int64_t o = 0; o < shape.out_group(); ++tiles) o += next_out(shape.out_group() - o, shape.main_pix);
  return tiles;
}

// Packs the weights of kOut output channels from `from` on.
template <int kOut, class T, class E>
MFEF_INLINE void pack_tile(const ConvShape<T>& shape, const WeightView<const E>& view, const E* from, T* to) {
  for (int64_t i = 0; i < shape.in_group(); ++i, from += view.in) {
    for (int ky = 0; ky < shape.k; ++ky) {
      const E* at = from + ky * view.row;
      for (int kx = 0; kx < shape.k; ++kx, at += view.column, to += kOut) {
        static_for<kOut>([&]<int o>() { to[o] = to_compute(at[o * view.out]); });
      }
      if constexpr (kPerLane<E, T> == 2) {
        const E* pair = from + ky * view.row;
        for (int j = 0; shape.dot && j < shape.k / 2; ++j, pair += 2 * view.column, to += kOut) {
          static_for<kOut>([&]<int o>() { to[o] = pair_of(pair[o * view.out], pair[o * view.out + view.column]); });
        }
      }
    }
  }
}

// Packs tiles [begin, end).
template <class T, class E>
void pack_weights(const ConvShape<T>& shape, const WeightView<const E>& view, T* packed, int64_t begin, int64_t end) {
  const int64_t out_group = shape.out_group(), per_output = shape.weight_count() / shape.out;
  const int64_t tiles = tiles_per_group(shape);
  for (int64_t g = begin / tiles; g < shape.groups && g * tiles < end; ++g) {
    int64_t tile = g * tiles;
    for (int64_t o = 0; o < out_group; ++tile) {
      const int out = next_out(out_group - o, shape.main_pix);
      if (tile >= begin && tile < end) {
        static_for<kOutCount>([&]<int i>() {
          constexpr int kOut = kOutCounts[i];
          if (out == kOut) pack_tile<kOut>(shape, view, view.at(g, o, 0), packed + (g * out_group + o) * per_output);
        });
      }
      o += out;
    }
  }
}
// All tiles, of contiguous weights.
template <class T>
void pack_weights(const ConvShape<T>& shape, bool flipped, const T* weights, T* packed) {
  const int64_t taps = shape.taps();
  const int64_t stride[4] = {(flipped ? shape.out_group() : shape.in_group()) * taps, taps, shape.k, 1};
  pack_weights(shape, WeightView<const T>(shape, flipped, weights, shape.k, stride), packed, 0,
               shape.groups * tiles_per_group(shape));
}

// y = conv(x): x padded as the shape says, y [out][out_channel] without borders.
template <class T>
void convolve_direct(const ConvShape<T>& shape, const T* x, const T* packed, const T* bias, bool accumulate, T* y) {
  constexpr int L = kLanes<T>;
  const ConvTable<T>& table = conv_table<T>();
  const int ki = kernel_size_index<T>(shape.k);
  const auto& tiles = (shape.dot ? table.conv_dot : table.conv)[shape.layout][ki];
  const int radius = shape.k / 2;
  const int64_t in_group = shape.in_group(), out_group = shape.out_group();
  const int64_t tile_weights = in_group * shape.k * shape.weight_row();  // per output channel
  const bool pixels = shape.layout == kPixels;
  const int64_t rows = pixels ? 1 : shape.height;
  const int64_t width = pixels ? shape.vectors : shape.width;

  ConvTile<T> tile;
  tile.x_channel = shape.channel;
  tile.x_row = pixels ? shape.pitch : shape.pitch * L;
  tile.k = shape.k;
  tile.ky_begin = 0;
  tile.ky_end = shape.k;
  tile.y_channel = shape.out_channel;
  const int64_t longest = max<int64_t>(1, kChain / shape.taps());  // input channels of a chain
  const int64_t chain = divide_up(in_group, divide_up(in_group, longest));

  auto run_row = [&](int64_t g, int64_t h, int64_t o, int out, const T* weights) {
    const T* group = x + g * in_group * shape.channel;
    if (!pixels) {
      tile.ky_begin = int(max<int64_t>(0, radius - h));
      tile.ky_end = int(min<int64_t>(shape.k, shape.height + radius - h));
      group += (h - radius) * tile.x_row;  // rows outside the map are never read
    }
    T* row = y + (g * out_group + o) * shape.out_channel + (pixels ? 0 : h * shape.width * L);
    for (int64_t w = 0; w < width;) {
      const int pix = shape.layout == kClip ? int(width) : next_pix(width - w, shape.main_pix);
      tile.y = row + w * L;
      for (int64_t i = 0; i < in_group; i += chain) {
        tile.x = group + i * shape.channel + w * L;
        tile.channels = min(chain, in_group - i);
        tile.weights = weights + i * shape.k * shape.weight_row() * out;
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
  for (int64_t g = 0; g < shape.groups; ++g) {
    const T* weights = packed + g * out_group * tile_weights;
    for (int64_t outer = 0; outer < (rows_outside ? rows : 1); ++outer) {
      for (int64_t o = 0; o < out_group;) {
        const int out = next_out(out_group - o, shape.main_pix);
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

}  // namespace mfef::cpu::MFEF_ISA
