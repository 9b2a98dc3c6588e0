// A unit of a convolution on tensor cores, in bfloat16 or float16 with float32 sums: a product of
// pixels x (taps, source channels) and (taps, source channels) x destination channels, where a tap is an offset.
//
// Rounds: source channels `stage` at a time and, of those, taps `rows` rows at a time come to shared memory, as 16-bit
// elements: the tile with its halo as [pixel][group][source], taps as [tap][slot][8 destination channels][source]. In
// every round a warp adds the products of its items (see MatrixPart) to its sums, which stay in registers until the
// last round; then they go to the destination in shared memory.
// Per 16 source channels of a tap a warp reads 16 matrices of pixels (32 where its slots are of two groups) and 4 of
// weights, 128 bytes each, for 8 products of 2,048 multiply-adds.
//
// Rows of taps that meet no row of an item are left out; columns beside the map are zeros and are multiplied.
#pragma once

#include "pixels.cuh"

namespace mfef::cuda {

// What every lane keeps from the first round to the last.
struct LargeMatrixSums {
  Accumulator of[MatrixPart::kWarpItems][MatrixPart::kItemSlots][MatrixPart::kItemPixels];
};

// One round of a branch's part, and where it is in shared memory.
struct LargeMatrixTask {
  Way way;
  MatrixPart part;
  Rectangle at;            // the tile
  int height;              // of the map
  int first, end;          // source channels of a group
  int first_row, end_row;  // of taps
  uint32_t *source, *weights;

  MFEF_DEVICE LargeMatrixTask(const BlockArgs& a, const Block& block, const UnitOfTile& of)
      : way(Way(a.sizes.branches[of.unit.branch], a.large.backward).part(of.unit.first, of.unit.count)),
        part(a.large.tiles, way, a.large.units.stage[of.unit.branch], a.large.units.rows[of.unit.branch]),
        at(of.region.at),
        height(a.sizes.height),
        first(0),
        end(0),
        first_row(0),
        end_row(0),
        source(reinterpret_cast<uint32_t*>(block.shared) + part.source),
        weights(reinterpret_cast<uint32_t*>(block.shared) + part.weights) {}
};

// Where an item's matrices of pixels begin, and its slots. Matrices beyond the last are the last, slots beyond the last
// are of group -1: nobody takes their sums.
struct LargeMatrixItem {
  int pixels;  // matrices that are there
  Place place[MatrixPart::kItemPixels];
  int slot, group[MatrixPart::kItemSlots];

  MFEF_DEVICE LargeMatrixItem(const LargeMatrixTask& task, int index) {
    const int spans = ceil_div(task.at.columns, kSpan), all = spans * ceil_div(task.at.rows, 2);
    const int runs = ceil_div(all, MatrixPart::kItemPixels), run = index / runs;
    const int first = (index - run * runs) * MatrixPart::kItemPixels;
    pixels = least(MatrixPart::kItemPixels, all - first);
    slot = run * MatrixPart::kItemSlots;
    MFEF_UNROLL
    for (int p = 0; p < MatrixPart::kItemPixels; ++p) {
      const int of = least(first + p, all - 1), pair = of / spans;
      place[p] = {pair * 2, (of - pair * spans) * kSpan};
    }
    MFEF_UNROLL
    for (int i = 0; i < MatrixPart::kItemSlots; ++i) {
      group[i] = slot + i < task.part.slots ? (slot + i) / task.part.slots_per_group : -1;
    }
  }
};

// The taps of a round. out_first and in_first: where the part begins among the weights of the branch.
template <class T>
MFEF_DEVICE void load_matrix_weights(const Parameter& weights, const LargeMatrixTask& task, int full_k, int out_first,
                                     int in_first, bool backward, int thread, int threads) {
  constexpr int kSide = MatrixPart::kSide;
  const Way& way = task.way;
  const MatrixPart& part = task.part;
  const int count = task.end - task.first, words = MatrixPart::chunks(count) * kSide / 2;
  const int skip = (full_k - way.k) / 2, channels = part.slots * kSide;
  const int64_t of_source = weights.stride[backward ? 0 : 1];
  const int64_t step = backward ? -weights.stride[3] : weights.stride[3];
  const Quotient by_words(words), by_group(part.slots_per_group * kSide);
  MFEF_ROLLED
  for (int e = thread; e < channels * words; e += threads) {
    const int channel = by_words(e), word = e - channel * words;
    const int group = by_group(channel), dest = channel - group * part.slots_per_group * kSide, source = 2 * word;
    const bool has[2] = {dest < way.dest_per_group && source < count, dest < way.dest_per_group && source + 1 < count};
    // Forward a group's destination channels follow on those before it, backward its source channels.
    const int64_t out = backward ? out_first + group * way.source_per_group + task.first + source
                                 : out_first + group * way.dest_per_group + dest;
    const int64_t in = backward ? in_first + dest : in_first + task.first + source;
    const T* corner = static_cast<const T*>(weights.data) + out * weights.stride[0] + in * weights.stride[1];
    uint32_t* to = task.weights + channel * part.tap_row + word;
    MFEF_ROLLED
    for (int ky = task.first_row; ky < task.end_row; ++ky) {
      const int row = skip + (backward ? way.k - 1 - ky : ky), column = skip + (backward ? way.k - 1 : 0);
      const T* from = corner + row * weights.stride[2] + column * weights.stride[3];
      MFEF_ROLLED
      for (int kx = 0; kx < way.k; ++kx, from += step, to += channels * part.tap_row) {
        uint32_t value = has[0] ? from[0].x : 0;
        if (has[1]) value |= uint32_t(from[of_source].x) << 16;
        *to = value;
      }
    }
  }
}

// kWords words of the source's channels at one tap: the products of an item.
template <class T, int kWords, class Sums>
MFEF_DEVICE void multiply_chunk(const Warp& warp, const LargeMatrixTask& task, const LargeMatrixItem& item,
                                const uint32_t* source, const uint32_t* weights, const Sums& sums) {
  constexpr int kPixels = MatrixPart::kItemPixels, kSide = MatrixPart::kSide;
  const MatrixPart& part = task.part;
  Warp::Registers<Fragment<kWords / 2>> a[kPixels];
  Warp::Registers<Fragment<kWords / 4>> b;
  MFEF_UNROLL
  for (int i = 0; i < MatrixPart::kItemSlots; ++i) {
    const int slot = item.slot + i, group = item.group[i];
    if (group < 0) continue;
    load_matrices<kWords / 4>(
        warp, [&](int thread) -> auto& { return b[thread]; },
        [&](int m, int r) { return weights + (slot * kSide + r) * part.tap_row + m * 4; });
    if (i == 0 || group != item.group[0]) {
      MFEF_UNROLL
      for (int p = 0; p < kPixels; ++p) {
        const Place at = item.place[p];
        load_matrices<kWords / 2>(
            warp, [&](int thread) -> auto& { return a[p][thread]; },
            [&](int m, int r) {
              return source + ((at.row + m % 2) * part.columns + at.column + r) * part.pixel_step + group * part.group +
                     m / 2 * 4;
            });
      }
    }
    MFEF_UNROLL
    for (int p = 0; p < kPixels; ++p) {
      multiply_add<T, kWords>(
          warp, [&](int thread) -> auto& { return sums(thread, i, p); },
          [&](int thread) -> auto& { return a[p][thread]; }, [&](int thread) -> auto& { return b[thread]; });
    }
  }
}

// A round's products of the items of a warp.
template <class T>
MFEF_DEVICE void multiply_round(const Block& block, const Warp& warp, const LargeMatrixTask& task,
                                Block::Registers<LargeMatrixSums>& registers) {
  const MatrixPart& part = task.part;
  const int k = task.way.k, half = k / 2, words = MatrixPart::chunks(task.end - task.first) * MatrixPart::kSide / 2;
  const int items = MatrixPart::items(task.at.rows, task.at.columns, part.slots);
  MFEF_UNROLL
  for (int i = 0; i < MatrixPart::kWarpItems; ++i) {
    const int index = warp.index + i * (block.threads / kWarp);
    if (index >= items) continue;
    const LargeMatrixItem item(task, index);
    auto sums = [&](int thread, int slot, int p) -> Accumulator& { return registers[thread].of[i][slot][p]; };
    // Rows of taps that meet the map from any of the item's rows.
    const int top = item.place[0].row, bottom = item.place[MatrixPart::kItemPixels - 1].row + 1;
    const int begin = most(task.first_row, -task.at.row - bottom + half);
    const int end = least(task.end_row, task.height - task.at.row - top + half);
    MFEF_ROLLED
    for (int ky = begin; ky < end; ++ky) {
      MFEF_ROLLED
      for (int kx = 0; kx < k; ++kx) {
        const uint32_t* source = task.source + (ky * part.columns + kx) * part.pixel_step;
        const uint32_t* weights =
            task.weights + ((ky - task.first_row) * k + kx) * part.slots * MatrixPart::kSide * part.tap_row;
        int word = 0;
        MFEF_ROLLED
        for (; word + 8 <= words; word += 8) {
          multiply_chunk<T, 8>(warp, task, item, source + word, weights + word, sums);
        }
        if (word < words) multiply_chunk<T, 4>(warp, task, item, source + word, weights + word, sums);
      }
    }
  }
}

// The sums of a warp's items to the destination in shared memory. What is beyond the last matrix is written where the
// last is, as the same, and a row beyond the tile's where nobody reads.
MFEF_DEVICE void keep_matrix_sums(const Block& block, const Warp& warp, const LargeMatrixTask& task, int pitch,
                                  float* dest, Block::Registers<LargeMatrixSums>& registers) {
  const MatrixPart& part = task.part;
  const int items = MatrixPart::items(task.at.rows, task.at.columns, part.slots), step = int(part.dest_step);
  MFEF_UNROLL
  for (int i = 0; i < MatrixPart::kWarpItems; ++i) {
    const int index = warp.index + i * (block.threads / kWarp);
    if (index >= items) continue;
    const LargeMatrixItem item(task, index);
    MFEF_UNROLL
    for (int j = 0; j < MatrixPart::kItemSlots; ++j) {
      const int group = item.group[j];
      if (group < 0) continue;
      const int of_group = (item.slot + j - group * part.slots_per_group) * MatrixPart::kSide;
      warp.lanes([&](int thread) {
        const Place in_c = place_in_c(thread % kWarp, 0);
        const int channel = of_group + in_c.column, left = task.way.dest_per_group - channel;
        float* to = dest + (group * task.way.dest_per_group + channel) * step + in_c.row;
        MFEF_UNROLL
        for (int p = 0; p < MatrixPart::kItemPixels; ++p) {
          const Accumulator& sum = registers[thread].of[i][j][p];
          float* of_pixel = to + item.place[p].row * pitch + item.place[p].column;
          MFEF_UNROLL
          for (int v = 0; v < 4; ++v) {
            if (v % 2 < left) of_pixel[v / 2 * pitch + v % 2 * step] = sum.value[v];
          }
        }
      });
    }
  }
}

template <class T>
MFEF_DEVICE void convolve_unit_by_matrices(const BlockArgs& a, const Block& block, const UnitOfTile& of) {
  const LargeArgs& l = a.large;
  const Branch& branch = a.sizes.branches[of.unit.branch];
  const int stage = l.units.stage[of.unit.branch], rows = l.units.rows[of.unit.branch];
  LargeMatrixTask task(a, block, of);
  const Way& way = task.way;
  const Rectangle& at = task.at;
  Block::Registers<LargeMatrixSums> sums(block);
  Block::Registers<Copies> copies(block);
  block.phase([&](int thread) { sums[thread] = {}; });
  MFEF_ROLLED
  for (task.first = 0; task.first < way.source_per_group; task.first += stage) {
    task.end = least(task.first + stage, way.source_per_group);
    MFEF_ROLLED
    for (task.first_row = 0; task.first_row < way.k; task.first_row += rows) {
      task.end_row = least(task.first_row + rows, way.k);
      block.phase([&](int thread) {
        const UnitWeights from(Way(branch, l.backward), of.unit, l.backward);
        load_matrix_weights<T>(a.conv_weights[of.unit.branch], task, branch.full_k, from.out, from.in, l.backward,
                               thread, block.threads);
        if (task.first_row) return;
        const int half = way.k / 2;
        const Rectangle around{at.row - half, at.rows + 2 * half, at.column - half,
                               ceil_div(at.columns, kSpan) * kSpan + 2 * half};
        const PixelStage to{task.source, task.part.columns, task.part.pixel_step, task.part.group};
        load_pixels<T>(l.source, l.source_element, a.sizes,
                       {of.region.image, way.source_first + task.first, task.end - task.first, around}, way.groups,
                       way.source_per_group, to, copies[thread], thread, block.threads);
        copies[thread].commit();
        copies[thread].wait();
      });
      block.warps([&](const Warp& warp) { multiply_round<T>(block, warp, task, sums); });
    }
  }
  block.warps([&](const Warp& warp) { keep_matrix_sums(block, warp, task, l.tiles.columns, block.shared, sums); });
}

}  // namespace mfef::cuda
