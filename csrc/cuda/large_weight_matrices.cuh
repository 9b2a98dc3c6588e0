// Gradients of the weights of the branches on tensor cores, on maps that stay in memory, as sums over slices of the
// pieces of all images: of every tap, destination channels x pixels times pixels x source channels.
//
// A thread block is one tile of one slice (see LargeMatrixTiles), a warp has up to 3 of its items: 16 destination
// channels, 8 source channels, 3 neighbouring taps. A thread has 36 sums of a chain, which goes on from piece to piece,
// and 36 of the slice. The pieces come to shared memory one by one, in 16 bits: dy as [pixel][16 channels], x with its
// halo as [pixel][channels of the tile's slots]; both are read transposed, so a tap is an offset. Per 16 pixels, a span
// of two rows, a warp reads 4 matrices of dy and 2 of x for every product of 2,048 multiply-adds. Groups of 8
// destination channels waste half of them.
#pragma once

#include "pixels.cuh"

namespace mfef::cuda {

// Products that one sum takes before it is added to that of the slice. Tensor cores do not round, they cut towards
// zero: a long chain would end too near it, by half a last place per product of matrices.
constexpr int kMatrixChain = 128;

struct LargeMatrixWeightSums {
  using OfWarp = Accumulator[LargeMatrixTiles::kWarpItems][LargeMatrixTiles::kTaps];
  OfWarp chain, slice;

  MFEF_DEVICE void end_chain() {
    MFEF_UNROLL
    for (int i = 0; i < LargeMatrixTiles::kWarpItems; ++i) {
      MFEF_UNROLL
      for (int t = 0; t < LargeMatrixTiles::kTaps; ++t) {
        MFEF_UNROLL
        for (int v = 0; v < 4; ++v) slice[i][t].value[v] += chain[i][t].value[v];
        chain[i][t] = {};
      }
    }
  }
};

// An item: its taps are [kx, kx + taps) of row ky; none where a warp has fewer items.
struct LargeMatrixWeightItem {
  int slot, ky, kx, taps;  // the slot is one of the tile's

  MFEF_DEVICE LargeMatrixWeightItem(const LargeMatrixTiles& shape, const LargeMatrixTile& tile, int k, int index) {
    slot = index / shape.part_items;
    const int of_slot = tile.part * shape.part_items + index - slot * shape.part_items;
    ky = of_slot / shape.runs;
    kx = (of_slot - ky * shape.runs) * LargeMatrixTiles::kTaps;
    taps = slot < tile.slots && ky < k ? least(LargeMatrixTiles::kTaps, k - kx) : 0;
  }
};

// The products of a piece of `rows` x `columns` pixels, whole pairs and spans; `chained` products are in the chains.
template <class T>
MFEF_DEVICE void multiply_piece(const Warp& warp, const LargeMatrixTiles& shape, const LargeMatrixTile& tile, int k,
                                const uint32_t* dy, int dy_columns, const uint32_t* x, int x_columns, int rows,
                                int columns, int warps, int chained,
                                Block::Registers<LargeMatrixWeightSums>& registers) {
  const int dy_step = LargeMatrixTiles::dy_step(), x_step = shape.x_step();
  int offset[LargeMatrixTiles::kWarpItems], taps[LargeMatrixTiles::kWarpItems];
  MFEF_UNROLL
  for (int i = 0; i < LargeMatrixTiles::kWarpItems; ++i) {
    const LargeMatrixWeightItem item(shape, tile, k, warp.index + i * warps);
    offset[i] = (item.ky * x_columns + item.kx) * x_step + item.slot * (LargeMatrixTiles::kSlot / 2);
    taps[i] = item.taps;
  }
  Warp::Registers<Fragment<4>> a;
  Warp::Registers<Fragment<2>> b;
  MFEF_ROLLED
  for (int h = 0; h < rows; h += 2) {
    MFEF_ROLLED
    for (int w = 0; w < columns; w += kSpan) {
      load_transposed<4>(
          warp, [&](int thread) -> auto& { return a[thread]; },
          [&](int m, int r) { return dy + ((h + m / 2) * dy_columns + w + r) * dy_step + m % 2 * 4; });
      MFEF_UNROLL
      for (int i = 0; i < LargeMatrixTiles::kWarpItems; ++i) {
        MFEF_UNROLL
        for (int t = 0; t < LargeMatrixTiles::kTaps; ++t) {
          if (t >= taps[i]) continue;
          load_transposed<2>(
              warp, [&](int thread) -> auto& { return b[thread]; },
              [&](int m, int r) { return x + ((h + m) * x_columns + w + r + t) * x_step + offset[i]; });
          multiply_add<T, 8>(
              warp, [&](int thread) -> auto& { return registers[thread].chain[i][t]; },
              [&](int thread) -> auto& { return a[thread]; }, [&](int thread) -> auto& { return b[thread]; });
        }
      }
      chained = (chained + 2 * kSpan) % kMatrixChain;
      if (!chained) warp.lanes([&](int thread) { registers[thread].end_chain(); });
    }
  }
}

// The sums of a warp to those of the slice.
MFEF_DEVICE void write_matrix_sums(const BlockArgs& a, const Warp& warp, const LargeMatrixTiles& shape,
                                   const LargeMatrixTile& tile, int slice, int warps,
                                   Block::Registers<LargeMatrixWeightSums>& registers) {
  const Sizes& s = a.sizes;
  const Branch& b = s.branches[tile.branch];
  float* sums = a.grads.weights + slice * first_sum(s, s.branch_count) + first_sum(s, tile.branch);
  MFEF_UNROLL
  for (int i = 0; i < LargeMatrixTiles::kWarpItems; ++i) {
    const LargeMatrixWeightItem item(shape, tile, b.k, warp.index + i * warps);
    MFEF_UNROLL
    for (int t = 0; t < LargeMatrixTiles::kTaps; ++t) {
      if (t >= item.taps) continue;
      warp.lanes([&](int thread) {
        MFEF_UNROLL
        for (int v = 0; v < 4; ++v) {
          const Place at = place_in_c(thread % kWarp, v);
          const int out = tile.out + at.row, in = (tile.slot + item.slot) * LargeMatrixTiles::kSlot + at.column;
          if (out >= (tile.group + 1) * b.out_per_group() || in >= b.in_per_group()) continue;
          sums[((int64_t(out) * b.in_per_group() + in) * b.k + item.ky) * b.k + item.kx + t] =
              registers[thread].slice[i][t].value[v];
        }
      });
    }
  }
}

template <class T>
MFEF_DEVICE void matrix_weight_gradient(const BlockArgs& a, const Block& block, const LargeMatrixTile& tile,
                                        int slice) {
  const Sizes& s = a.sizes;
  const LargeArgs& l = a.large;
  const Cover& cover = l.matrix_pieces;
  const Branch& b = s.branches[tile.branch];
  const LargeMatrixTiles shape(b);
  const int half = b.k / 2, warps = block.threads / kWarp;
  const int64_t per_image = cover.count(), pieces = s.batch * per_image;
  const int64_t end = (slice + 1) * l.matrix_slice < pieces ? (slice + 1) * l.matrix_slice : pieces;
  uint32_t* dy = reinterpret_cast<uint32_t*>(block.shared);
  const PixelStage to_dy{dy, cover.columns, LargeMatrixTiles::dy_step(), 0};
  const PixelStage to_x{dy + LargeMatrixTiles::dy_words(cover), cover.columns + b.k - 1, shape.x_step(), 0};
  const int outs = least(LargeMatrixTiles::kDests, (tile.group + 1) * b.out_per_group() - tile.out);
  const int in = tile.slot * LargeMatrixTiles::kSlot;
  const int ins = least(tile.slots * LargeMatrixTiles::kSlot, b.in_per_group() - in);
  Block::Registers<LargeMatrixWeightSums> sums(block);
  Block::Registers<Copies> copies(block);
  block.phase([&](int thread) { sums[thread] = {}; });
  int chained = 0;
  MFEF_ROLLED
  for (int64_t piece = slice * l.matrix_slice; piece < end; ++piece) {
    const int64_t image = piece / per_image;
    const Rectangle at = cover.rectangle(s, int(piece - image * per_image));
    // Pairs of rows and spans end in zeros where the map ends.
    const int rows = ceil_div(at.rows, 2) * 2, columns = ceil_div(at.columns, kSpan) * kSpan;
    block.phase([&](int thread) {
      load_pixels<T>(l.dy, l.dy_element, s, {image, b.out_first + tile.out, outs, {at.row, rows, at.column, columns}},
                     1, 0, to_dy, copies[thread], thread, block.threads);
      load_pixels<T>(a.x, a.element, s,
                     {image,
                      b.in_first + tile.group * b.in_per_group() + in,
                      ins,
                      {at.row - half, rows + 2 * half, at.column - half, columns + 2 * half}},
                     1, 0, to_x, copies[thread], thread, block.threads);
      copies[thread].commit();
      copies[thread].wait();
    });
    block.warps([&](const Warp& warp) {
      multiply_piece<T>(warp, shape, tile, b.k, dy, to_dy.columns, to_x.to, to_x.columns, rows, columns, warps, chained,
                        sums);
    });
    chained = (chained + rows * columns) % kMatrixChain;
  }
  block.phase([&](int thread) { sums[thread].end_chain(); });
  block.warps([&](const Warp& warp) { write_matrix_sums(a, warp, shape, tile, slice, warps, sums); });
}

struct LargeMatrixWeightGradient {
  static MFEF_DEVICE void run(const BlockArgs& a, const Block& block) {
    const int tiles = a.large.matrix_tiles;
    for (int64_t index = block.index; index < int64_t(tiles) * a.slices; index += block.count) {
      const int slice = int(index / tiles);
      const LargeMatrixTile tile(a.sizes, int(index - int64_t(slice) * tiles));
      if (a.element == Element::kBFloat16) {
        matrix_weight_gradient<c10::BFloat16>(a, block, tile, slice);
      } else {
        matrix_weight_gradient<c10::Half>(a, block, tile, slice);
      }
    }
  }
};

}  // namespace mfef::cuda
