// A unit of a convolution on tensor cores, in bfloat16, float16 or TF32 with float32 sums: a product of
// pixels x (taps, source channels) and (taps, source channels) x destination channels, where a tap is an offset.
//
// Rounds: source channels `stage` at a time and, of those, taps `rows` rows at a time come to shared memory, as
// operands: the tile with its halo as [pixel][group][source], taps as [tap][slot][8 destination channels][source]. In
// every round a warp adds the products of its items (see MatrixPart) to its sums, which stay in registers until the
// last round; then they go to the destination in shared memory, where the rounds were. Where there are two buffers a
// round is loaded while the one before is multiplied; what is copied as it is in memory needs no thread meanwhile.
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

// A branch's part of a unit. It is in shared memory: in registers it would live from round to round, beside the sums.
struct LargeMatrixTask {
  Unit unit;
  Rectangle at;  // the tile
  int64_t image;
  int branch, next;
  Way way;
  MatrixPart part;
  MatrixRounds rounds;
  int height;   // of the map
  int out, in;  // where the part begins among the weights of the branch

  MFEF_DEVICE void take_branch(const BlockArgs& a) {
    const bool backward = a.large.backward;
    const int b = next++;
    branch = b;
    height = a.sizes.height;
    rounds = a.large.units.rounds(b);
    const Way whole(a.sizes.branches[b], backward);
    const UnitWeights from(whole, unit, backward);
    out = from.out;
    in = from.in;
    way = whole.part(unit.first, unit.count);
    part = MatrixPart(a.sizes, a.large.tiles, way, rounds);
  }

  // With two buffers a phase loads a round and multiplies the one before, with one it does either; -1: none.
  MFEF_DEVICE bool overlaps() const { return part.weight_buffers == 2; }
  MFEF_DEVICE int phases() const { return overlaps() ? rounds.count(way) + 1 : 2 * rounds.count(way); }
  MFEF_DEVICE int loaded(int phase) const {
    if (!overlaps()) return phase % 2 ? -1 : phase / 2;
    return phase < rounds.count(way) ? phase : -1;
  }
  MFEF_DEVICE int multiplied(int phase) const { return overlaps() ? phase - 1 : phase % 2 ? phase / 2 : -1; }
};
static_assert(sizeof(LargeMatrixTask) <= 4 * MatrixPart::kTask);

// One of its rounds, and where that is in shared memory.
struct LargeMatrixRound {
  int first, end;          // source channels of a group
  int first_row, end_row;  // of taps
  uint32_t *source, *weights;

  MFEF_DEVICE LargeMatrixRound(const Block& block, const LargeMatrixTask& task, int index) {
    const int of_rows = task.rounds.of_rows(task.way), stage = index / of_rows;
    first = stage * task.rounds.stage;
    end = least(first + task.rounds.stage, task.way.source_per_group);
    first_row = (index - stage * of_rows) * task.rounds.rows;
    end_row = least(first_row + task.rounds.rows, task.way.k);
    weights = reinterpret_cast<uint32_t*>(block.shared);
    source = weights + task.part.source;
    if (task.part.source_buffers == 2 && stage % 2) source += task.part.round_source;
    if (task.part.weight_buffers == 2 && index % 2) weights += task.part.round_weights;
  }
};

// Where an item's matrices of pixels begin, in a map whose rows and columns are so far apart, and its slots. Matrices
// beyond the last are the last, slots beyond the last are of group -1: nobody takes their sums.
struct LargeMatrixItem {
  int top, bottom;  // its first and its last row of the tile
  int pixels[MatrixPart::kItemPixels];
  int slot, group[MatrixPart::kItemSlots];

  MFEF_DEVICE LargeMatrixItem(const LargeMatrixTask& task, int index, int of_row, int of_column) {
    const int spans = ceil_div(task.at.columns, kSpan), all = spans * ceil_div(task.at.rows, 2);
    const int runs = ceil_div(all, MatrixPart::kItemPixels), run = index / runs;
    const int first = (index - run * runs) * MatrixPart::kItemPixels;
    slot = run * MatrixPart::kItemSlots;
    MFEF_UNROLL
    for (int p = 0; p < MatrixPart::kItemPixels; ++p) {
      const int of = least(first + p, all - 1), pair = of / spans;
      pixels[p] = pair * 2 * of_row + (of - pair * spans) * kSpan * of_column;
      if (p == 0) top = pair * 2;
      bottom = pair * 2 + 1;
    }
    MFEF_UNROLL
    for (int i = 0; i < MatrixPart::kItemSlots; ++i) {
      group[i] = slot + i < task.part.slots ? (slot + i) / task.part.slots_per_group : -1;
    }
  }
};

// f(place, tap, group, destination channel, source channel, count) of all vectors of 16 bytes that `thread` has of the
// taps of a round: `count` source channels of T, none where they are filled up. Threads follow memory: neighbours take
// neighbouring source channels, destination channels or taps, whichever are neighbours there.
template <class T, class F>
MFEF_DEVICE void for_each_weight_vector(const Parameter& weights, const LargeMatrixTask& task,
                                        const LargeMatrixRound& round, bool backward, int thread, int threads,
                                        const F& f) {
  constexpr int kVector = 4 * kPerWord<T>;
  const Way& way = task.way;
  const MatrixPart& part = task.part;
  const int count = round.end - round.first;
  const int vectors = MatrixPart::chunks(count) * kSide / kVector, channels = part.slots * kSide;
  const int of_group = part.slots_per_group * kSide, taps = (round.end_row - round.first_row) * way.k;
  const int64_t of_source = weights.stride[backward ? 0 : 1], of_dest = weights.stride[backward ? 1 : 0];
  const bool by_source = of_source == 1, by_dest = !by_source && of_dest == 1, by_tap = !by_source && !by_dest;
  const bool near_source = by_source || (by_tap && of_source < of_dest);
  // The index of a vector: (inner, middle, outer).
  const int inner = by_source ? vectors : by_dest ? channels : taps;
  const int middle = by_tap ? near_source ? vectors : channels : taps;
  const Quotient by_inner(inner), by_middle(middle), by_group(of_group);
  MFEF_ROLLED
  for (int e = thread; e < vectors * channels * taps; e += threads) {
    const int rest = by_inner(e), i = e - rest * inner, o = by_middle(rest), m = rest - o * middle;
    const int tap = by_tap ? i : m, near = by_tap ? m : i;
    const int vector = near_source ? near : o, channel = near_source ? o : near;
    const int group = by_group(channel), dest = channel - group * of_group, source = vector * kVector;
    f(round.weights + tap * part.tap_step + channel * part.tap_row + vector * 4, tap, group, dest, source,
      dest < way.dest_per_group ? least(count - source, kVector) : 0);
  }
}

// The taps of a round. Whole vectors in memory and single numbers of float32 are copied.
template <class T>
MFEF_DEVICE void load_matrix_weights(const Parameter& weights, const LargeMatrixTask& task,
                                     const LargeMatrixRound& round, int full_k, bool backward, Copies& copies,
                                     int thread, int threads) {
  constexpr int kVector = 4 * kPerWord<T>;
  const Way& way = task.way;
  const int skip = (full_k - way.k) / 2;
  const int64_t of_source = weights.stride[backward ? 0 : 1];
  const Quotient by_k(way.k);
  for_each_weight_vector<T>(weights, task, round, backward, thread, threads,
                            [&](uint32_t* to, int tap, int group, int dest, int source, int left) {
                              // Forward a group's destination channels follow on those before it, backward its source
                              // channels.
                              const int out = task.out + (backward ? group * way.source_per_group + round.first + source
                                                                   : group * way.dest_per_group + dest);
                              const int in = task.in + (backward ? dest : round.first + source);
                              const int row = by_k(tap), ky = round.first_row + row, kx = tap - row * way.k;
                              const T* from = static_cast<const T*>(weights.data) + out * weights.stride[0] +
                                              in * weights.stride[1] +
                                              (skip + (backward ? way.k - 1 - ky : ky)) * weights.stride[2] +
                                              (skip + (backward ? way.k - 1 - kx : kx)) * weights.stride[3];
                              if (of_source == 1 && left == kVector && reinterpret_cast<uint64_t>(from) % 16 == 0) {
                                return copies.copy_16_bytes(to, from);
                              }
                              if constexpr (std::is_same_v<T, float>) {
                                MFEF_UNROLL
                                for (int j = 0; j < 4; ++j, from += of_source)
                                  copies.copy_4_bytes(to + j, from, j < left);
                              } else {
                                uint32_t words[4] = {};
                                MFEF_UNROLL
                                for (int j = 0; j < kVector; ++j, from += of_source) {
                                  if (j < left) words[j / 2] |= uint32_t(from->x) << j % 2 * 16;
                                }
                                store_16_bytes(to, words);
                              }
                            });
}

// kWords words of the source's channels at one tap: the products of kPixels matrices of an item. sums(thread, slot, p)
// is where a lane adds them.
template <class T, int kWords, int kPixels, class Sums>
MFEF_DEVICE void multiply_chunk(const Warp& warp, const MatrixPart& part, const LargeMatrixItem& item,
                                const int* pixels, const uint32_t* source, const uint32_t* weights, const Sums& sums) {
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
        const uint32_t* from = source + pixels[p] + group * part.group;
        load_matrices<kWords / 2>(
            warp, [&](int thread) -> auto& { return a[p][thread]; },
            [&](int m, int r) { return from + (m % 2 * part.columns + r) * part.pixel_step + m / 2 * 4; });
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

// The same of the taps of rows [begin, end).
template <class T, int kPixels, class Sums>
MFEF_DEVICE void multiply_taps(const Warp& warp, const MatrixPart& part, int k, const LargeMatrixRound& round,
                               const LargeMatrixItem& item, const int* pixels, int begin, int end, const Sums& sums) {
  const int words = MatrixPart::chunks(round.end - round.first) * kSide / kPerWord<T>;
  MFEF_ROLLED
  for (int ky = begin; ky < end; ++ky) {
    MFEF_ROLLED
    for (int kx = 0; kx < k; ++kx) {
      const uint32_t* source = round.source + (ky * part.columns + kx) * part.pixel_step;
      const uint32_t* weights = round.weights + ((ky - round.first_row) * k + kx) * part.tap_step;
      int word = 0;
      MFEF_ROLLED
      for (; word + 8 <= words; word += 8) {
        multiply_chunk<T, 8, kPixels>(warp, part, item, pixels, source + word, weights + word, sums);
      }
      if constexpr (kPerWord<T> == 2) {
        if (word < words) {
          multiply_chunk<T, 4, kPixels>(warp, part, item, pixels, source + word, weights + word, sums);
        }
      }
    }
  }
}

// A round's products of the items of a warp. In TF32 sums are as exact as float32, so there they are added up in
// chains: of half an item at a time, or registers would not do.
template <class T>
MFEF_DEVICE void multiply_round(const Block& block, const Warp& warp, const LargeMatrixTask& task,
                                const LargeMatrixRound& round, Block::Registers<LargeMatrixSums>& registers) {
  constexpr int kSlots = MatrixPart::kItemSlots, kPixels = MatrixPart::kItemPixels;
  const MatrixPart part = task.part;  // in registers, where the loops are
  const int k = task.way.k, items = MatrixPart::items(task.at.rows, task.at.columns, part.slots);
  MFEF_UNROLL
  for (int i = 0; i < MatrixPart::kWarpItems; ++i) {
    const int index = warp.index + i * (block.threads / kWarp);
    if (index >= items) continue;
    const LargeMatrixItem item(task, index, part.columns * part.pixel_step, part.pixel_step);
    // Rows of taps that meet the map from any of the item's rows.
    const int begin = most(round.first_row, -task.at.row - item.bottom + k / 2);
    const int end = least(round.end_row, task.height - task.at.row - item.top + k / 2);
    if constexpr (!std::is_same_v<T, Tf32>) {
      multiply_taps<T, kPixels>(warp, part, k, round, item, item.pixels, begin, end,
                                [&](int thread, int slot, int p) -> auto& { return registers[thread].of[i][slot][p]; });
    } else {
      constexpr int kHalf = kPixels / 2;
      const int rows = most(kMatrixChain / (k * (round.end - round.first)), 1);
      MFEF_UNROLL
      for (int half = 0; half < kPixels; half += kHalf) {
        MFEF_ROLLED
        for (int first = begin; first < end; first += rows) {
          struct Chain {
            Accumulator of[kSlots][kHalf];
          };
          Warp::Registers<Chain> chain;
          warp.lanes([&](int thread) { chain[thread] = {}; });
          multiply_taps<T, kHalf>(warp, part, k, round, item, item.pixels + half, first, least(first + rows, end),
                                  [&](int thread, int slot, int p) -> auto& { return chain[thread].of[slot][p]; });
          warp.lanes([&](int thread) {
            MFEF_UNROLL
            for (int slot = 0; slot < kSlots; ++slot) {
              MFEF_UNROLL
              for (int p = 0; p < kHalf; ++p) registers[thread].of[i][slot][half + p].add(chain[thread].of[slot][p]);
            }
          });
        }
      }
    }
  }
}

// The sums of a warp's items to the destination in shared memory. What is beyond the last matrix is written where the
// last is, as the same, and a row beyond the tile's where nobody reads.
MFEF_DEVICE void keep_matrix_sums(const Block& block, const Warp& warp, const LargeMatrixTask& task, const Cover& tiles,
                                  float* dest, Block::Registers<LargeMatrixSums>& registers) {
  const MatrixPart& part = task.part;
  const int items = MatrixPart::items(task.at.rows, task.at.columns, part.slots);
  const int pitch = tiles.columns, step = int(odd_vectors(tiles.rows * pitch));
  MFEF_UNROLL
  for (int i = 0; i < MatrixPart::kWarpItems; ++i) {
    const int index = warp.index + i * (block.threads / kWarp);
    if (index >= items) continue;
    const LargeMatrixItem item(task, index, pitch, 1);
    MFEF_UNROLL
    for (int j = 0; j < MatrixPart::kItemSlots; ++j) {
      const int group = item.group[j];
      if (group < 0) continue;
      const int of_group = (item.slot + j - group * part.slots_per_group) * kSide;
      warp.lanes([&](int thread) {
        const Place in_c = place_in_c(thread % kWarp, 0);
        const int channel = of_group + in_c.column, left = task.way.dest_per_group - channel;
        float* to = dest + (group * task.way.dest_per_group + channel) * step + in_c.row;
        MFEF_UNROLL
        for (int p = 0; p < MatrixPart::kItemPixels; ++p) {
          const Accumulator& sum = registers[thread].of[i][j][p];
          float* of_pixel = to + item.pixels[p];
          MFEF_UNROLL
          for (int v = 0; v < 4; ++v) {
            if (v % 2 < left) of_pixel[v / 2 * pitch + v % 2 * step] = sum.value[v];
          }
        }
      });
    }
  }
}

// The pixels that come with a round, and where they go.
struct LargeMatrixPixels {
  Region region;
  PixelStage to;

  MFEF_DEVICE LargeMatrixPixels(const LargeMatrixTask& task, const LargeMatrixRound& round)
      : region{task.image,
               task.way.source_first + round.first,
               round.end - round.first,
               {task.at.row - task.way.k / 2, ceil_div(task.at.rows, 2) * 2 + task.way.k / 2 * 2,
                task.at.column - task.way.k / 2, ceil_div(task.at.columns, kSpan) * kSpan + task.way.k / 2 * 2}},
        to{round.source, task.part.columns, task.part.pixel_step, task.part.group} {}
};

// A round to shared memory; in TF32 as float32, to be rounded by whoever has copied it.
template <class T>
MFEF_DEVICE void load_round(const BlockArgs& a, const LargeMatrixTask& task, const LargeMatrixRound& round,
                            Copies& copies, int thread, int threads) {
  const LargeArgs& l = a.large;
  load_matrix_weights<Stored<T>>(a.conv_weights[task.branch], task, round, a.sizes.branches[task.branch].full_k,
                                 l.backward, copies, thread, threads);
  if (round.first_row == 0) {
    const LargeMatrixPixels pixels(task, round);
    load_pixels<Stored<T>>(l.source, l.source_element, a.sizes, pixels.region, task.way.groups,
                           task.way.source_per_group, pixels.to, copies, thread, threads);
  }
}

MFEF_DEVICE void round_to_tf32(const BlockArgs& a, const LargeMatrixTask& task, const LargeMatrixRound& round,
                               int thread, int threads) {
  for_each_weight_vector<float>(a.conv_weights[task.branch], task, round, a.large.backward, thread, threads,
                                [&](uint32_t* at, int, int, int, int, int) { round_16_bytes(at); });
  if (round.first_row > 0) return;
  const LargeMatrixPixels pixels(task, round);
  for_each_pixel_vector<float>(a.large.source, pixels.region, task.way.groups, task.way.source_per_group, pixels.to,
                               thread, threads, [&](uint32_t* at, int, int, int, int) { round_16_bytes(at); });
}

template <class T>
MFEF_DEVICE void convolve_unit_by_matrices(const BlockArgs& a, const Block& block, const UnitOfTile& of) {
  LargeMatrixTask& shared = *reinterpret_cast<LargeMatrixTask*>(block.shared + a.large.units.task);
  Block::Registers<LargeMatrixSums> sums(block);
  Block::Registers<Copies> copies(block);
  block.phase([&](int thread) {
    sums[thread] = {};
    if (thread > 0) return;
    shared.unit = of.unit;
    shared.at = of.region.at;
    shared.image = of.region.image;
    shared.next = of.unit.branch;
  });
  // In pyramid mode all branches add to the same sums, one after another; phase -1 is the first of each.
  int branches = of.unit.end - of.unit.branch, phases = 0;
  MFEF_ROLLED
  for (int phase = -1; branches > 0;) {
    block.warps([&](const Warp& warp) {
      if (phase < 0) {
        warp.lanes([&](int thread) {
          if (thread == 0) shared.take_branch(a);
        });
        return;
      }
      const int loaded = shared.loaded(phase), multiplied = shared.multiplied(phase);
      if (loaded >= 0) {
        const LargeMatrixRound round(block, shared, loaded);
        warp.lanes([&](int thread) { load_round<T>(a, shared, round, copies[thread], thread, block.threads); });
        warp.together();
      }
      if (multiplied >= 0) {
        multiply_round<T>(block, warp, shared, LargeMatrixRound(block, shared, multiplied), sums);
      }
      warp.lanes([&](int thread) { copies[thread].wait(); });
      if constexpr (std::is_same_v<T, Tf32>) {
        if (loaded >= 0) {
          const LargeMatrixRound round(block, shared, loaded);
          warp.lanes([&](int thread) { round_to_tf32(a, shared, round, thread, block.threads); });
        }
      }
    });
    if (phase < 0) phases = shared.phases();
    if (++phase < phases) continue;
    phase = -1;
    --branches;
  }
  block.warps([&](const Warp& warp) {
    const LargeMatrixTask task = shared;
    keep_matrix_sums(block, warp, task, a.large.tiles, block.shared, sums);
  });
}

}  // namespace mfef::cuda
