// Gradients of the convolutions' weights on maps that stay in memory, as sums over slices of the pieces of all images.
//
// As in weight_gradient.cuh a thread block is one tile (some weights of one branch) of one slice, and a thread owns
// one output channel, one input channel and up to kTileRows rows of taps. The pieces of the slice come to shared memory
// one by one, x with its halo, only the channels that the tile needs; a piece is spans of kSpan columns of dy.
#pragma once

#include "region.cuh"
#include "weight_gradient.cuh"

namespace mfef::cuda {

// The products of a piece for one thread: x and dy are its channels, x from the halo's corner on.
template <int K>
MFEF_DEVICE void add_products_of_piece(const float* x, const float* dy, const Halo& halo, int pitch,
                                       const Rectangle& at, TileSums& sums) {
  for (int w = 0; w < at.columns; w += kSpan) {
    add_products<K, kSpan, K / 2>(x + w, halo.pitch, at.rows + K - 1, dy + w, pitch, at.rows, kChain / kSpan,
                                  sums.item.ky, sums);
  }
}

struct LargeWeightGradient {
  static MFEF_DEVICE void run(const BlockArgs& a, const Block& block) {
    const Sizes& s = a.sizes;
    const Cover& cover = a.large.weight_pieces;
    const int64_t per_image = cover.count(), pieces = s.batch * per_image;
    for (int64_t index = block.index; index < int64_t(a.tiles) * a.slices; index += block.count) {
      const int slice = int(index / a.tiles);
      const Tile tile(s, false, int(index - int64_t(slice) * a.tiles));
      const Branch& b = s.branches[tile.branch];
      const TileShape shape(b);
      const Halo halo(cover, b.k);
      const int half = b.k / 2, of_x = int(x_step(cover, b)), of_dy = int(dy_step(cover));
      float *x = block.shared, *dy = x + tile.in_count * of_x;
      const int64_t end = (slice + 1) * a.slice_images < pieces ? (slice + 1) * a.slice_images : pieces;
      Block::Registers<TileSums> registers(block);
      block.phase([&](int thread) {
        registers[thread] = {};
        registers[thread].item = TileItem(b, shape, tile, thread);
      });
      for (int64_t piece = slice * a.slice_images; piece < end; ++piece) {
        const int64_t image = piece / per_image;
        const Rectangle at = cover.rectangle(s, int(piece - image * per_image));
        // Spans end in zeros where the map ends.
        const int columns = ceil_div(at.columns, kSpan) * kSpan;
        block.phase([&](int thread) {
          const Rectangle around{at.row - half, at.rows + 2 * half, at.column - half, columns + 2 * half};
          load_region(a.x, a.element, s, {image, b.in_first + tile.in, tile.in_count, around}, x, of_x, halo.pitch,
                      thread, block.threads);
          load_region(a.large.dy, a.large.dy_element, s,
                      {image, b.out_first + tile.out, tile.out_count, {at.row, at.rows, at.column, columns}}, dy, of_dy,
                      cover.columns, thread, block.threads);
        });
        block.phase([&](int thread) {
          TileSums& sums = registers[thread];
          const TileItem item = sums.item;
          if (!item.owns) return;
          const float *from = x + (item.in - tile.in) * of_x, *grad = dy + (item.out - tile.out) * of_dy;
          switch (b.k) {
            case 3:
              return add_products_of_piece<3>(from, grad, halo, cover.columns, at, sums);
            case 5:
              return add_products_of_piece<5>(from, grad, halo, cover.columns, at, sums);
            case 7:
              return add_products_of_piece<7>(from, grad, halo, cover.columns, at, sums);
            case 9:
              return add_products_of_piece<9>(from, grad, halo, cover.columns, at, sums);
            default:
              return add_products_of_tap(from + item.ky * halo.pitch + item.kx, halo.pitch, grad, cover.columns, 0,
                                         at.rows, 0, at.columns, sums);
          }
        });
      }
      block.phase([&](int thread) {
        const TileSums& sums = registers[thread];
        if (sums.item.owns) write_item(b, false, sums_of_branch(a, tile.branch, slice), sums);
      });
    }
  }
};

}  // namespace mfef::cuda
