// The convolution of maps that stay in memory, forward and the gradient of x, with the statistics of what it computes:
// one launch, a thread block for a unit of destination channels (see Units) in one tile of one image. Without a
// convolution only the statistics.
//
// Phases: the tile with its halo and the weights to shared memory, as many source channels at a time as fit; the
// products (conv.cuh), a thread has kSpan pixels of two rows of one or two channels, and adds to the destination there;
// then the destination to memory and, row by row, sums, maxima and their first places; their totals. Memory: reads x
// (rows + k - 1) (columns + k - 1) / (rows columns) times per unit of a branch that shares its source, nearly all from
// L2; writes the destination once. The weights are read once per thread block, from L2.
#pragma once

#include "conv.cuh"
#include "large_conv_matrices.cuh"
#include "region.cuh"

namespace mfef::cuda {

// The pixels of a tile in shared memory, and the rows of the map, counted from the tile's first.
struct TileRows {
  Rectangle at;
  int pitch, above, below;
};

template <int K, int kOut>
MFEF_DEVICE void convolve_span(const ConvTask& task, const TileRows& tile, const Halo& halo, const float* source,
                               float* dest, int dest_step, int item) {
  constexpr int kRows = 2;
  const Way& way = task.way;
  const int per_group = way.dest_per_group / kOut, columns = way.groups * per_group;
  const int place = item / columns, column = item - place * columns;
  const int group = column / per_group, channel = group * way.dest_per_group + column - group * per_group;
  const int spans = ceil_div(tile.at.columns, kSpan), pair = place / spans, h = pair * kRows;
  const int w = (place - pair * spans) * kSpan, step = int(halo.step);
  source += group * (task.end - task.first) * step + (h + K / 2) * halo.pitch + w;
  dest += channel * dest_step + h * tile.pitch + w;
  convolve_rows<K, kSpan, kRows, kOut, K / 2>(task, task.weights + channel, {source, halo.pitch, step},
                                              {dest, tile.pitch, dest_step}, per_group, tile.above - h, tile.below - h,
                                              tile.at.rows - h);
}

MFEF_DEVICE void convolve_span_of_row(const ConvTask& task, const TileRows& tile, const Halo& halo, const float* source,
                                      float* dest, int dest_step, int item) {
  const Way& way = task.way;
  const int columns = way.dest(), place = item / columns, channel = item - place * columns;
  const int group = channel / way.dest_per_group, spans = ceil_div(tile.at.columns, kSpan), h = place / spans;
  const int w = (place - h * spans) * kSpan, half = way.k / 2, step = int(halo.step);
  source += group * (task.end - task.first) * step + (h + half) * halo.pitch + half + w;
  dest += channel * dest_step + h * tile.pitch + w;
  convolve_row<kSpan>(task, task.weights + channel, {source, halo.pitch, step}, dest, tile.above - h, tile.below - h,
                      -half, kSpan + half);
}

template <int K>
MFEF_DEVICE void convolve_spans(const ConvTask& task, const TileRows& tile, const Halo& halo, const float* source,
                                float* dest, int dest_step, int thread, int threads) {
  const int places = ceil_div(tile.at.columns, kSpan) * ceil_div(tile.at.rows, 2);
  if (task.way.dest_per_group % 2 == 0) {
    for (int item = thread; item < places * task.way.dest() / 2; item += threads) {
      convolve_span<K, 2>(task, tile, halo, source, dest, dest_step, item);
    }
  } else {
    for (int item = thread; item < places * task.way.dest(); item += threads) {
      convolve_span<K, 1>(task, tile, halo, source, dest, dest_step, item);
    }
  }
}

// The work of one thread in a stage of a branch.
MFEF_DEVICE void convolve_tile(const ConvTask& task, const TileRows& tile, const Halo& halo, const float* source,
                               float* dest, int dest_step, int thread, int threads) {
  switch (task.way.k) {
    case 3:
      return convolve_spans<3>(task, tile, halo, source, dest, dest_step, thread, threads);
    case 5:
      return convolve_spans<5>(task, tile, halo, source, dest, dest_step, thread, threads);
    case 7:
      return convolve_spans<7>(task, tile, halo, source, dest, dest_step, thread, threads);
    case 9:
      return convolve_spans<9>(task, tile, halo, source, dest, dest_step, thread, threads);
    default: {
      const int items = ceil_div(tile.at.columns, kSpan) * tile.at.rows * task.way.dest();
      for (int item = thread; item < items; item += threads) {
        convolve_span_of_row(task, tile, halo, source, dest, dest_step, item);
      }
    }
  }
}

// Branch b's part of a unit, for one tile: all its stages, added to the destination in shared memory.
MFEF_DEVICE void convolve_branch_of_unit(const BlockArgs& a, const Block& block, const Unit& unit, int b,
                                         const TileRows& tile, int64_t image) {
  const LargeArgs& l = a.large;
  const Branch& branch = a.sizes.branches[b];
  const Way whole(branch, l.backward), way = whole.part(unit.first, unit.count);
  const Halo halo(l.tiles, way.k);
  const int stage = l.units.stage[b], half = way.k / 2, step = int(halo.step);
  const UnitLayout at(l.tiles, way, stage);
  float *weights = block.shared + at.weights, *source = block.shared + at.source;
  const UnitWeights from(whole, unit, l.backward);
  // Beyond the map's last column the spans of a tile have zeros.
  const Rectangle around{tile.at.row - half, tile.at.rows + 2 * half, tile.at.column - half,
                         ceil_div(tile.at.columns, kSpan) * kSpan + 2 * half};
  for (int first = 0; first < way.source_per_group; first += stage) {
    const int end = least(first + stage, way.source_per_group), count = end - first;
    block.phase([&](int thread) {
      load_branch_weights(way, branch.full_k, a.conv_weights[b], from.out, from.in, a.element, l.backward, first, end,
                          weights, thread, block.threads);
      // Whole groups lie side by side.
      const int runs = count == way.source_per_group ? 1 : way.groups, run = count * way.groups / runs;
      for (int i = 0; i < runs; ++i) {
        const Region region{image, way.source_first + i * way.source_per_group + first, run, around};
        load_region(l.source, l.source_element, a.sizes, region, source + i * run * step, step, halo.pitch, thread,
                    block.threads);
      }
    });
    block.phase([&](int thread) {
      const ConvTask task{way, first, end, first, weights, b == unit.branch && first == 0};
      convolve_tile(task, tile, halo, source, block.shared, int(at.dest_step), thread, block.threads);
    });
  }
}

// Sum, maximum and its first place of every channel of the unit in the tile, from shared memory. Of the values that go
// to memory, which is where the attention reads them: so the block is its two halves, to the last bit.
MFEF_DEVICE void tile_statistics(const BlockArgs& a, const Block& block, const Region& region, int64_t tile) {
  const LargeArgs& l = a.large;
  const int channels = region.channels, rows = region.at.rows, all = channels * rows;
  const int pitch = l.tiles.columns, step = int(odd_vectors(l.tiles.rows * pitch));
  float *y = block.shared, *sums = y + channels * step, *tops = sums + all, *places = tops + all;
  block.phase([&](int thread) {
    const Quotient by_channels(channels);
    for (int e = thread; e < all; e += block.threads) {
      const int row = by_channels(e), c = e - row * channels;
      const float* from = y + c * step + row * pitch;
      float sum = 0.0f;
      Largest top{from[0], 0};
      for (int first = 0; first < region.at.columns; first += kSpan) {
        float v[kSpan], part = 0.0f;
        load_row<kSpan>(from + first, v);
        MFEF_UNROLL
        for (int w = 0; w < kSpan; ++w) {
          if (first + w >= region.at.columns) continue;
          v[w] = rounded(a.element, v[w]);
          part += v[w];
          top.see(v[w], first + w);
        }
        sum += part;
      }
      sums[e] = sum;
      tops[e] = top.value;
      places[e] = float(top.index);
    }
  });
  block.phase([&](int thread) {
    for (int c = thread; c < channels; c += block.threads) {
      Largest top{tops[c], 0};
      for (int h = 1; h < rows; ++h) top.see(tops[h * channels + c], h);
      const int64_t to = tile * a.sizes.out + region.channel + c;
      l.tile_sums[to] = sum_of(rows, [&](int h) { return sums[h * channels + c]; });
      if (!l.tile_tops) continue;
      l.tile_tops[to] = top.value;
      l.tile_places[to] =
          (region.at.row + top.index) * a.sizes.width + region.at.column + int(places[top.index * channels + c]);
    }
  });
}

// All units of a launch, in all tiles of all images; fill(unit) brings the destination to shared memory.
template <class Fill>
MFEF_DEVICE void for_each_unit(const BlockArgs& a, const Block& block, const Fill& fill) {
  const Sizes& s = a.sizes;
  const LargeArgs& l = a.large;
  const int64_t all = s.batch * l.tiles.count() * l.units.count;
  const int pitch = l.tiles.columns, step = int(odd_vectors(l.tiles.rows * pitch));
  // A thread block's turns, since one number is kept meanwhile and not two.
  for (int turn = 0; block.index + turn * block.count < all; ++turn) {
    auto unit = [&] { return UnitOfTile(a, block.index + anew(turn) * block.count); };
    fill(unit());
    const UnitOfTile of = unit();
    const Region& region = of.region;
    if (l.dest.data) {
      block.phase([&](int thread) {
        store_region(l.dest, a.element, s, region, step, pitch, thread, block.threads, [&](int place, int channel) {
          const float bias = a.bias.data ? load(a.bias, a.element, channel * a.bias.stride[0]) : 0.0f;
          return block.shared[place] + bias;
        });
      });
    }
    if (l.tile_sums) tile_statistics(a, block, region, of.tile);
  }
}

struct LargeConvolution {
  static MFEF_DEVICE void run(const BlockArgs& a, const Block& block) {
    const Sizes& s = a.sizes;
    const LargeArgs& l = a.large;
    const int pitch = l.tiles.columns, step = int(odd_vectors(l.tiles.rows * pitch));
    for_each_unit(a, block, [&](const UnitOfTile& of) {
      const Unit& unit = of.unit;
      const Region& region = of.region;
      if (s.branch_count) {
        const TileRows rows{region.at, pitch, -region.at.row, s.height - region.at.row};
        for (int b = unit.branch; b < unit.end; ++b) convolve_branch_of_unit(a, block, unit, b, rows, region.image);
      } else {
        Region spans = region;  // whole ones, as the statistics read them
        spans.at.columns = ceil_div(region.at.columns, kSpan) * kSpan;
        block.phase([&](int thread) {
          load_region(l.source, l.source_element, s, spans, block.shared, step, pitch, thread, block.threads);
        });
      }
    });
  }
};

// The branches that tensor cores take, by a launch of their own: in one kernel with the others both spilled.
struct LargeMatrixConvolution {
  static MFEF_DEVICE void run(const BlockArgs& a, const Block& block) {
    for_each_unit(a, block, [&](const UnitOfTile& of) {
      with_operand(a.element, [&](auto zero) { convolve_unit_by_matrices<decltype(zero)>(a, block, of); });
    });
  }
};

}  // namespace mfef::cuda
