// Gradients of the convolutions' weights, as sums over slices of the batch; or, for the backward, over the images of a
// thread block (sum_weight_gradients).
//
// A thread block is one tile (see Tile: some weights of one branch) of one slice. Images of the slice come to shared
// memory one by one, only the channels that the tile needs. A thread owns one output channel, one input channel and up
// to kTileRows rows of taps, accumulated in registers: per row of x it reads that row and one more row of the gradient
// of y (the others are still in registers), 2 * kRow words for up to 3 * k * kRow multiply-adds, less those of taps
// beside the map. Neighbouring threads own neighbouring output channels: one x for all of them (or, in narrow
// groups, rows an odd number of 16-byte vectors apart). Chains end after about kChain products, and with the image.
// Memory: each slice of x and of the gradient of y is read once per tile that needs it, from L2; a slice writes its
// sums once.
#pragma once

#include "weight_matrices.cuh"

namespace mfef::cuda {

// The weights of one thread: row `ky` of taps and those after it, or one tap.
struct TileItem {
  bool owns;
  int in, out;  // channels, counted from the branch's first
  int ky, kx;

  TileItem() = default;
  MFEF_DEVICE TileItem(const Branch& b, const TileShape& shape, const Tile& tile, int thread) {
    const int e = tile.item + thread, local_unit = e / shape.items, item = e - local_unit * shape.items;
    const int unit = tile.unit + local_unit, group = unit / shape.runs, run = unit - group * shape.runs;
    const int per_input = shape.rows * shape.channels, j = item / per_input, rest = item - j * per_input;
    const int row = rest / shape.channels, channel = run * shape.channels + rest - row * shape.channels;
    owns = local_unit < tile.units && channel < b.out_per_group();
    in = group * b.in_per_group() + j;
    out = group * b.out_per_group() + channel;
    ky = TileShape::compiled(b.k) ? row * kTileRows : row / b.k;
    kx = TileShape::compiled(b.k) ? 0 : row % b.k;
  }
  // Those of a whole branch, in the order (row, input channel, output channel); a plan with so small branches has fewer
  // than 2^20.
  MFEF_DEVICE TileItem(const Branch& b, int e) : owns(true) {
    const Quotient by_outputs(b.out), by_inputs(b.in_per_group()), by_group(b.out_per_group());
    const int pair = by_outputs(e), row = by_inputs(pair);
    out = e - pair * b.out;
    in = by_group(out) * b.in_per_group() + pair - row * b.in_per_group();
    ky = TileShape::compiled(b.k) ? row * kTileRows : row / b.k;
    kx = TileShape::compiled(b.k) ? 0 : row % b.k;
  }
  MFEF_HD static int count(const Branch& b) { return TileShape(b).rows * b.in_per_group() * b.out; }
};

struct TileSums {
  TileItem item;
  float acc[kTileRows][9], total[kTileRows][9];
};

// Adds the products of `height` rows of kRow pixels of dy with x in shared memory. x has `x_rows` rows and kBeside
// (none, or k / 2) more pixels on each side, above and to the left too. A chain ends after about `flush` rows.
template <int K, int kRow, int kBeside>
MFEF_DEVICE void add_products(const float* x, int x_pitch, int x_rows, const float* dy, int dy_pitch, int height,
                              int flush, int ky, TileSums& sums) {
  constexpr int kHalf = K / 2, kRows = K < kTileRows ? K : kTileRows;
  constexpr int kLoaded = kRow + 2 * kBeside;
  static_assert(kBeside == 0 || kBeside == kHalf);
  // Row r of x meets row newest(r) - t of dy at the row of taps ky + t. The latest kRows rows of dy take turns in d: of
  // the row that is `turn` after one where d begins, in d[(turn - t) % kRows].
  auto newest = [&](int r) { return r - kBeside + kHalf - ky; };
  const int begin = most(0, -newest(0)), end = least(x_rows, begin + height + kRows - 1 - most(0, newest(0)));
  flush = most(flush / kRows, 1) * kRows;
  float d[kRows][kRow] = {}, row[kLoaded];
  MFEF_UNROLL
  for (int t = 1; t < kRows; ++t) {
    const int h = newest(begin) - t;
    if (h >= 0 && h < height) load_row<kRow>(dy + h * dy_pitch, d[kRows - t]);
  }
  MFEF_ROLLED
  for (int first = begin; first < end; first += flush) {
    MFEF_UNROLL
    for (int t = 0; t < kRows; ++t) {
      MFEF_UNROLL
      for (int kx = 0; kx < K; ++kx) sums.acc[t][kx] = 0.0f;
    }
    MFEF_ROLLED
    for (int top = first; top < least(first + flush, end); top += kRows) {
      MFEF_UNROLL
      for (int turn = 0; turn < kRows; ++turn) {
        const int r = top + turn;
        if (r >= end) continue;
        load_row<kLoaded>(x + r * x_pitch, row);
        if (newest(r) >= 0 && newest(r) < height) load_row<kRow>(dy + newest(r) * dy_pitch, d[turn]);
        MFEF_UNROLL
        for (int t = 0; t < kRows; ++t) {
          const int h = newest(r) - t;
          if (h < 0 || h >= height || ky + t >= K) continue;
          const float (&of)[kRow] = d[(turn - t + kRows) % kRows];
          MFEF_UNROLL
          for (int kx = 0; kx < K; ++kx) {
            MFEF_UNROLL
            for (int p = 0; p < kRow; ++p) {
              const int at = p + kx - kHalf + kBeside;
              if (at >= 0 && at < kRow + 2 * kBeside) sums.acc[t][kx] = fmaf(row[at], of[p], sums.acc[t][kx]);
            }
          }
        }
      }
    }
    MFEF_UNROLL
    for (int t = 0; t < kRows; ++t) {
      MFEF_UNROLL
      for (int kx = 0; kx < K; ++kx) sums.total[t][kx] += sums.acc[t][kx];
    }
  }
}

// One tap of any k: the products of dy's pixels [h_begin, h_end) x [w_begin, w_end) with x at as many rows and columns
// further on as the pointers say.
MFEF_DEVICE void add_products_of_tap(const float* x, int x_pitch, const float* dy, int dy_pitch, int h_begin, int h_end,
                                     int w_begin, int w_end, TileSums& sums) {
  for (int h = h_begin; h < h_end; ++h) {
    float sum = 0.0f;
    for (int w = w_begin; w < w_end; ++w) sum = fmaf(dy[h * dy_pitch + w], x[h * x_pitch + w], sum);
    sums.total[0][0] += sum;
  }
}

template <int K, int kRow>
MFEF_DEVICE void add_products_of_images(const float* x, const float* dy, const Sizes& s, int images, TileSums& sums) {
  const int step = s.height * kRow;
  for (int image = 0; image < images; ++image) {
    add_products<K, kRow, 0>(x + image * step, kRow, s.height, dy + image * step, kRow, s.height,
                             most(kChain / s.width, 1), sums.item.ky, sums);
  }
}

// The products of the images in shared memory for one thread: x and dy are the maps of its channels.
template <int kRow>
MFEF_DEVICE void add_products_of_images(const Branch& b, const float* x, const float* dy, const Sizes& s, int images,
                                        TileSums& sums) {
  switch (b.k) {
    case 3:
      return add_products_of_images<3, kRow>(x, dy, s, images, sums);
    case 5:
      return add_products_of_images<5, kRow>(x, dy, s, images, sums);
    case 7:
      return add_products_of_images<7, kRow>(x, dy, s, images, sums);
    case 9:
      return add_products_of_images<9, kRow>(x, dy, s, images, sums);
  }
  const int up = sums.item.ky - b.k / 2, left = sums.item.kx - b.k / 2, step = s.height * kRow;
  for (int image = 0; image < images; ++image, x += step, dy += step) {
    add_products_of_tap(x + up * kRow + left, kRow, dy, kRow, most(0, -up), least(s.height, s.height - up),
                        most(0, -left), least(s.width, s.width - left), sums);
  }
}

// Sums `step` apart from tap to tap.
template <int K>
MFEF_DEVICE void write_sums(const TileSums& sums, int ky, float* to, int step) {
  MFEF_UNROLL
  for (int t = 0; t < kTileRows; ++t) {
    MFEF_UNROLL
    for (int kx = 0; kx < K; ++kx) {
      if (ky + t < K) to[((ky + t) * K + kx) * step] = sums.total[t][kx];
    }
  }
}

// Where the sums of a branch are in those of a slice.
MFEF_DEVICE float* sums_of_branch(const BlockArgs& a, int branch, int64_t slice) {
  return a.grads.weights + slice * first_sum(a.sizes, a.sizes.branch_count) + first_sum(a.sizes, branch);
}

// The sums of a thread that owns some to those of the branch; `in_backward`: see place_of_sum.
MFEF_DEVICE void write_item(const Branch& b, bool in_backward, float* to, const TileSums& sums) {
  const TileItem& item = sums.item;
  to += place_of_sum(b, in_backward, item.out, item.in % b.in_per_group(), 0, 0);
  const int step = in_backward ? b.in_per_group() * b.out : 1;
  switch (b.k) {
    case 3:
      return write_sums<3>(sums, item.ky, to, step);
    case 5:
      return write_sums<5>(sums, item.ky, to, step);
    case 7:
      return write_sums<7>(sums, item.ky, to, step);
    case 9:
      return write_sums<9>(sums, item.ky, to, step);
    default:
      to[(item.ky * b.k + item.kx) * step] = sums.total[0][0];
  }
}

// The work of one thread of the backward on the weight gradient of its images, x and dy whole in shared memory.
// Branches follow one another in whole warps, round the block's threads; the last is first, since it is most often the
// one whose items take longest.
template <int kRow>
MFEF_DEVICE void sum_weight_gradients(const BlockArgs& a, const float* x, const float* dy, int images, int64_t block,
                                      int thread, int threads) {
  const Sizes& s = a.sizes;
  int start = 0;
  MFEF_ROLLED
  for (int i = s.branch_count - 1; i >= 0; --i) {
    const Branch& b = s.branches[i];
    const int count = TileItem::count(b);
    float* to = sums_of_branch(a, i, block);
    MFEF_ROLLED
    for (int e = thread - start < 0 ? thread - start + threads : thread - start; e < count; e += threads) {
      TileSums sums = {};
      sums.item = TileItem(b, e);
      add_products_of_images<kRow>(b, x + (b.in_first + sums.item.in) * a.step,
                                   dy + (b.out_first + sums.item.out) * a.step, s, images, sums);
      write_item(b, true, to, sums);
    }
    start = (start + ceil_div(count, kWarp) * kWarp) % threads;
  }
}

template <int kRow, bool kMatrices>
struct WeightGradientOf {
  static MFEF_DEVICE void run(const BlockArgs& a, const Block& block) {
    const Sizes& s = a.sizes;
    for (int64_t index = block.index; index < int64_t(a.tiles) * a.slices; index += block.count) {
      const int slice = int(index / a.tiles);
      const int which = int(index - int64_t(slice) * a.tiles);
      const bool given = a.grads.dy == nullptr;
      const int64_t pixels = s.pixels();
      const Map grad = given ? a.grad_result : Map{a.grads.dy, {s.out * pixels, pixels, s.width, 1}};
      if constexpr (kMatrices) {
        if (which < a.matrix_tiles) {
          const Element element = given ? a.element : Element::kFloat;
          if (s.tf32) {
            run_matrix_tile<true>(a, block, which, slice, grad, element);
          } else {
            run_matrix_tile<false>(a, block, which, slice, grad, element);
          }
          continue;
        }
      }
      const Tile tile(s, true, which - a.matrix_tiles);
      const Branch& b = s.branches[tile.branch];
      const TileShape shape(b);
      float *x = block.shared, *dy = x + tile.in_count * a.step;
      const int64_t end = (slice + 1) * a.slice_images < s.batch ? (slice + 1) * a.slice_images : s.batch;
      Block::Registers<TileSums> registers(block);
      block.phase([&](int thread) {
        registers[thread] = {};
        registers[thread].item = TileItem(b, shape, tile, thread);
      });
      for (int64_t first = slice * a.slice_images; first < end; first += a.pass_images) {
        const int images = end - first < a.pass_images ? int(end - first) : a.pass_images;
        block.phase([&](int thread) {
          load_map<kRow>(a.x, a.element, s, first, images, images, b.in_first + tile.in, tile.in_count, a.step, x,
                         thread, block.threads);
          load_map<kRow>(grad, given ? a.element : Element::kFloat, s, first, images, images, b.out_first + tile.out,
                         tile.out_count, a.step, dy, thread, block.threads);
        });
        block.phase([&](int thread) {
          TileSums& sums = registers[thread];
          if (!sums.item.owns) return;
          add_products_of_images<kRow>(b, x + (sums.item.in - tile.in) * a.step,
                                       dy + (sums.item.out - tile.out) * a.step, s, images, sums);
        });
      }
      block.phase([&](int thread) {
        const TileSums& sums = registers[thread];
        if (sums.item.owns) write_item(b, false, sums_of_branch(a, tile.branch, slice), sums);
      });
    }
  }
};

template <int kRow>
struct WeightGradient : WeightGradientOf<kRow, false> {};
// Where tensor cores compute a branch.
struct MatrixWeightGradient : WeightGradientOf<kSide, true> {};

}  // namespace mfef::cuda
