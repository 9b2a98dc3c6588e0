// Gradients of the weights of the branches on tensor cores, on maps that stay in memory, as sums over slices of the
// pieces of all images: of every tap, destination channels x pixels times pixels x source channels.
//
// A thread block is one tile of one slice (see LargeMatrixTiles), a warp has up to 3 of its items: 16 destination
// channels, 8 source channels, 3 neighbouring taps. A thread has 36 sums of a chain, which goes on from piece to piece,
// and 36 of the slice. The pieces come to shared memory one by one, or each while the one before is multiplied: dy as
// [pixel][16 channels], x with its halo as [pixel][channels of the tile's slots]; a tap is an offset.
//
// In 16 bits both are read transposed: per 16 pixels, a span of two rows, a warp reads 4 matrices of dy and 2 of x for
// every product of 2,048 multiply-adds. Float32 cannot be read so; lanes read its words one by one and round them, so
// that it is copied as it is: in TF32 4 of dy per 8 pixels of a row and 2 of x for every product of 1,024, in 16 bits 8
// of the dy that an attention leaves.
//
// Groups of 8 destination channels would waste half of the products: there an item has two rows of taps, the second
// half of its rows being the same channels of dy a row above.
#pragma once

#include "pixels.cuh"

namespace mfef::cuda {

struct LargeMatrixWeightSums {
  using OfWarp = Accumulator[LargeMatrixTiles::kWarpItems][LargeMatrixTiles::kTaps];
  OfWarp chain, slice;

  MFEF_DEVICE void end_chain() {
    MFEF_UNROLL
    for (int i = 0; i < LargeMatrixTiles::kWarpItems; ++i) {
      MFEF_UNROLL
      for (int t = 0; t < LargeMatrixTiles::kTaps; ++t) {
        slice[i][t].add(chain[i][t]);
        chain[i][t] = {};
      }
    }
  }
};

// A tile as it is in shared memory, since in registers it would be in the way of the sums.
struct LargeWeightTask {
  LargeMatrixTiles shape;
  LargeMatrixTile tile;

  MFEF_DEVICE LargeWeightTask(const Sizes& s, int index) : LargeWeightTask(s, LargeMatrixTile(s, index)) {}

 private:
  MFEF_DEVICE LargeWeightTask(const Sizes& s, const LargeMatrixTile& of) : shape(s.branches[of.branch]), tile(of) {}
};
static_assert(sizeof(LargeWeightTask) <= 4 * LargeMatrixTiles::kTaskWords && LargeMatrixTiles::kTaskWords % 4 == 0);

// An item: its taps are [kx, kx + taps) of row ky, and if paired of the next; none where a warp has fewer items.
struct LargeMatrixWeightItem {
  int slot, ky, kx, taps;  // the slot is one of the tile's

  MFEF_DEVICE LargeMatrixWeightItem(const LargeMatrixTiles& shape, const LargeMatrixTile& tile, int k, int index) {
    slot = index / shape.part_items;
    const int of_slot = tile.part * shape.part_items + index - slot * shape.part_items;
    const int row = of_slot / shape.runs;
    ky = row * shape.tap_rows();
    kx = (of_slot - row * shape.runs) * LargeMatrixTiles::kTaps;
    taps = slot < tile.slots && ky < k ? least(LargeMatrixTiles::kTaps, k - kx) : 0;
  }
};

// An operand word by word, rounded from the value(row, k) there.
template <class T, int kCount, class To, class At, class Value>
MFEF_DEVICE void load_rounded(const Warp& warp, const To& to, const At& place, const Value& value) {
  warp.lanes([&](int thread) {
    Fragment<kCount>& f = to(thread);
    MFEF_UNROLL
    for (int reg = 0; reg < kCount; ++reg) {
      const Place at = place(thread % kWarp, reg);
      float of_word[kPerWord<T>];
      MFEF_UNROLL
      for (int i = 0; i < kPerWord<T>; ++i) of_word[i] = value(at.row, at.column * kPerWord<T> + i);
      f.word[reg] = word_of<T>(of_word);
    }
  });
}

// The products of a piece of `rows` x `columns` pixels, whole pairs and spans; `chained` products are in the chains. dy
// is in float32 or as T; where tiles are paired it begins with a row of zeros.
template <class T>
MFEF_DEVICE void multiply_piece(const Warp& warp, const LargeWeightTask& task, int k, const uint32_t* dy, bool float_dy,
                                int dy_columns, const uint32_t* x, int x_columns, int rows, int columns, int warps,
                                int chained, Block::Registers<LargeMatrixWeightSums>& registers) {
  constexpr bool kTf32 = kPerWord<T> == 1;
  const LargeMatrixTiles shape = task.shape;
  const LargeMatrixTile tile = task.tile;
  const int dy_step = LargeMatrixTiles::dy_step(kTf32), x_step = shape.x_step(kTf32);
  int offset[LargeMatrixTiles::kWarpItems], taps[LargeMatrixTiles::kWarpItems];
  MFEF_UNROLL
  for (int i = 0; i < LargeMatrixTiles::kWarpItems; ++i) {
    const LargeMatrixWeightItem item(shape, tile, k, warp.index + i * warps);
    offset[i] = (item.ky * x_columns + item.kx) * x_step + item.slot * (LargeMatrixTiles::kSlot / kPerWord<T>);
    taps[i] = item.taps;
  }
  Warp::Registers<Fragment<4>> a;
  Warp::Registers<Fragment<2>> b[LargeMatrixTiles::kTaps];
  auto to_a = [&](int thread) -> auto& { return a[thread]; };
  // A product's pixels are a span of two rows, in TF32 of one.
  constexpr int kRows = kPerWord<T>;
  const int dy_row = dy_columns * dy_step;
  if (shape.paired) dy += dy_row;
  MFEF_ROLLED
  for (int h = 0; h < rows; h += kRows) {
    MFEF_ROLLED
    for (int w = 0; w < columns; w += kSpan) {
      const uint32_t *of_dy = dy + (h * dy_columns + w) * dy_step, *of_x = x + (h * x_columns + w) * x_step;
      if (float_dy) {
        const float* values = reinterpret_cast<const float*>(of_dy);
        load_rounded<T, 4>(warp, to_a, place_in_a, [&](int channel, int k) {
          const int above = shape.paired ? channel / 8 : 0;
          return values[(k / kSpan - above) * dy_row + k % kSpan * dy_step + channel - 8 * above];
        });
      } else if constexpr (!kTf32) {
        load_transposed<4>(warp, to_a, [&](int m, int r) {
          return of_dy + m / 2 * dy_row + r * dy_step + m % 2 * (shape.paired ? -dy_row : 4);
        });
      }
      MFEF_UNROLL
      for (int i = 0; i < LargeMatrixTiles::kWarpItems; ++i) {
        // All taps are under way before the first product waits for its own.
        MFEF_UNROLL
        for (int t = 0; t < LargeMatrixTiles::kTaps; ++t) {
          if (t >= taps[i]) continue;
          const uint32_t* of_tap = of_x + t * x_step + offset[i];
          auto to_b = [&](int thread) -> auto& { return b[t][thread]; };
          if constexpr (kTf32) {
            const float* values = reinterpret_cast<const float*>(of_tap);
            load_rounded<T, 2>(warp, to_b, place_in_b,
                               [&](int channel, int pixel) { return values[pixel * x_step + channel]; });
          } else {
            load_transposed<2>(warp, to_b, [&](int m, int r) { return of_tap + (m * x_columns + r) * x_step; });
          }
        }
        MFEF_UNROLL
        for (int t = 0; t < LargeMatrixTiles::kTaps; ++t) {
          if (t >= taps[i]) continue;
          multiply_add<T, 8>(
              warp, [&](int thread) -> auto& { return registers[thread].chain[i][t]; }, to_a,
              [&](int thread) -> auto& { return b[t][thread]; });
        }
      }
      chained = (chained + kRows * kSpan) % kMatrixChain;
      if (!chained) warp.lanes([&](int thread) { registers[thread].end_chain(); });
    }
  }
}

// The sums of a warp to those of the slice.
MFEF_DEVICE void write_matrix_sums(const BlockArgs& a, const Warp& warp, const LargeWeightTask& task, int slice,
                                   int warps, Block::Registers<LargeMatrixWeightSums>& registers) {
  const Sizes& s = a.sizes;
  const LargeMatrixTiles shape = task.shape;
  const LargeMatrixTile tile = task.tile;
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
          const int below = shape.paired ? at.row / 8 : 0, ky = item.ky + below;
          const int out = tile.out + at.row - 8 * below,
                    in = (tile.slot + item.slot) * LargeMatrixTiles::kSlot + at.column;
          if (out >= (tile.group + 1) * b.out_per_group() || in >= b.in_per_group() || ky >= b.k) continue;
          sums[((int64_t(out) * b.in_per_group() + in) * b.k + ky) * b.k + item.kx + t] =
              registers[thread].slice[i][t].value[v];
        }
      });
    }
  }
}

// The pixels of a piece, whole pairs of rows and spans, with zeros where the map ends.
template <class T>
MFEF_DEVICE void load_piece(const BlockArgs& a, const LargeWeightTask& task, int64_t image, const Rectangle& at,
                            uint32_t* to, Copies& copies, int thread, int threads) {
  constexpr bool kTf32 = kPerWord<T> == 1;
  const Sizes& s = a.sizes;
  const LargeMatrixTiles& shape = task.shape;
  const LargeMatrixTile& tile = task.tile;
  const Cover& cover = a.large.matrix_pieces;
  const Branch& b = s.branches[tile.branch];
  const int half = b.k / 2, dy_step = LargeMatrixTiles::dy_step(kTf32), dy_row = cover.columns * dy_step;
  for (int e = thread * 4; e < shape.zero_rows(kTf32) * dy_row; e += threads * 4) {
    *reinterpret_cast<Vector<uint32_t, 4>*>(to + e + (e < dy_row ? 0 : at.rows * dy_row)) = {};
  }
  const int outs = least(LargeMatrixTiles::kDests, (tile.group + 1) * b.out_per_group() - tile.out);
  const Region of_dy{image, b.out_first + tile.out, outs, at};
  const PixelStage to_dy{to + (shape.paired ? dy_row : 0), cover.columns, dy_step, 0};
  if (kTf32 || a.large.dy_element == Element::kFloat) {
    load_pixels_from<float, float>(a.large.dy, s, of_dy, 1, 0, to_dy, copies, thread, threads);
  } else if constexpr (!kTf32) {
    load_pixels_from<T, T>(a.large.dy, s, of_dy, 1, 0, to_dy, copies, thread, threads);
  }
  // Products take 16 channels of dy, zeros where the second 8 do not exist.
  const int of_eight = kTf32 || a.large.dy_element == Element::kFloat ? kSide : kSide / 2;
  for (int e = thread; !shape.paired && outs <= kSide && e < at.rows * at.columns; e += threads) {
    uint32_t* pixel = to_dy.to + (e / at.columns * cover.columns + e % at.columns) * dy_step;
    for (int i = 0; i < of_eight; i += 4) *reinterpret_cast<Vector<uint32_t, 4>*>(pixel + of_eight + i) = {};
  }
  const int in = tile.slot * LargeMatrixTiles::kSlot;
  const int ins = least(tile.slots * LargeMatrixTiles::kSlot, b.in_per_group() - in);
  const Rectangle around{at.row - half, at.rows + shape.more_rows(kTf32) + 2 * half, at.column - half,
                         at.columns + 2 * half};
  const PixelStage to_x{to + shape.dy_words(kTf32, cover), cover.columns + b.k - 1, shape.x_step(kTf32), 0};
  load_pixels_from<Stored<T>, Stored<T>>(a.x, s, {image, b.in_first + tile.group * b.in_per_group() + in, ins, around},
                                         1, 0, to_x, copies, thread, threads);
}

template <class T>
MFEF_DEVICE void matrix_weight_gradient(const BlockArgs& a, const Block& block, int64_t index) {
  constexpr bool kTf32 = kPerWord<T> == 1;
  const LargeArgs& l = a.large;
  const Cover& cover = l.matrix_pieces;
  LargeWeightTask& task = *reinterpret_cast<LargeWeightTask*>(block.shared);
  uint32_t* const shared = reinterpret_cast<uint32_t*>(block.shared) + LargeMatrixTiles::kTaskWords;
  const int warps = block.threads / kWarp;
  Block::Registers<LargeMatrixWeightSums> sums(block);
  Block::Registers<Copies> copies(block);
  block.phase([&](int thread) {
    sums[thread] = {};
    if (thread == 0) task = LargeWeightTask(a.sizes, int(index % l.matrix_tiles));
  });
  const int64_t pieces = a.sizes.batch * cover.count();
  int64_t piece = index / l.matrix_tiles * l.matrix_slice;
  int left = int(piece + l.matrix_slice < pieces ? l.matrix_slice : pieces - piece);  // 2^31 would be terabytes
  // A phase loads a piece or multiplies that of the phase before; with two buffers it does both.
  int buffer = 0, rows = 0, columns = 0, chained = 0;  // of what is loaded
  MFEF_ROLLED
  while (left > 0 || rows) {
    const bool loads = left > 0 && (!rows || l.matrix_buffers == 2);
    const int next = l.matrix_buffers == 2 ? 1 - buffer : 0;
    const int64_t image = piece / cover.count();
    Rectangle at = cover.rectangle(a.sizes, int(piece - image * cover.count()));
    at.rows = ceil_div(at.rows, 2) * 2;
    at.columns = ceil_div(at.columns, kSpan) * kSpan;
    block.warps([&](const Warp& warp) {
      const int k = a.sizes.branches[task.tile.branch].k;
      const int words = int(task.shape.words(kTf32, cover, k));
      warp.lanes([&](int thread) {
        if (!loads) return;
        load_piece<T>(a, task, image, at, shared + next * words, copies[thread], thread, block.threads);
      });
      warp.together();
      const uint32_t* dy = shared + buffer * words;
      multiply_piece<T>(warp, task, k, dy, kTf32 || l.dy_element == Element::kFloat, cover.columns,
                        dy + task.shape.dy_words(kTf32, cover), cover.columns + k - 1, rows, columns, warps, chained,
                        sums);
      warp.lanes([&](int thread) { copies[thread].wait(); });
    });
    piece += loads;
    left -= loads;
    chained = (chained + rows * columns) % kMatrixChain;
    rows = loads ? at.rows + task.shape.more_rows(kTf32) : 0;
    columns = at.columns;
    buffer = next;
  }
  block.phase([&](int thread) { sums[thread].end_chain(); });
  block.warps(
      [&](const Warp& warp) { write_matrix_sums(a, warp, task, int(anew(index) / l.matrix_tiles), warps, sums); });
}

struct LargeMatrixWeightGradient {
  static MFEF_DEVICE void run(const BlockArgs& a, const Block& block) {
    for (int64_t index = block.index; index < int64_t(a.large.matrix_tiles) * a.slices; index += block.count) {
      with_operand(a.element, [&](auto zero) { matrix_weight_gradient<decltype(zero)>(a, block, index); });
    }
  }
};

}  // namespace mfef::cuda
