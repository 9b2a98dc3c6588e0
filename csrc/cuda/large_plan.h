// The planner of the large-map kernels: how maps that do not fit on the chip are cut into rectangles, and the channels
// of a convolution into units, so that every thread block's piece fits into shared memory. Nothing here depends on the
// GPU, so sums have the same order on all of them; how tensor cores round their products is the architecture's.
#pragma once

#include "block.h"

namespace mfef::cuda {

constexpr int kLargeThreads = 256;
// The convolution has smaller thread blocks: with its 168 registers a multiprocessor holds three of them, not one of
// 256 threads (at 128 registers, which would let it hold two, they spilled on sm_80 and sm_90a). So many bytes of
// shared memory let one of sm_90 and later hold three too, and one of sm_80 two. Launches without a convolution take
// less, but for thousands of channels.
constexpr int kConvolutionThreads = 128, kConvolutionBlocks = 3;
constexpr int64_t kLargeShared = 74 * 1024;
constexpr int kSpan = 8;                // neighbouring pixels of a row that a thread owns
constexpr int kTileSpans = 4;           // the widest tile
constexpr int kTileItems = 32;          // most spans of a tile times pairs of rows
constexpr int kUnitChannels = 64;       // destination channels of a unit, at most
constexpr int kStatisticChannels = 16;  // of a unit without a convolution
// A piece is what a thread block of the attention has, of all channels: kSlots pixels, kChunk channels at a time.
constexpr int kSlots = 64, kPieceRows = 4, kChunk = 64;
constexpr int kSlotParts = kLargeThreads / kSlots;  // threads of a pixel, and of a channel
// The weight gradient is divided further than that of small maps: there is more of it in an image.
constexpr int kLargeBlocks = 1024;
constexpr int kMostLargeSlices = 256;

MFEF_HD int fill4(int floats) { return (floats + 3) / 4 * 4; }
// An odd number of 16-byte vectors, so that neighbouring threads with neighbouring channels read different banks.
MFEF_HD int64_t odd_vectors(int64_t floats) { return ((floats + 3) / 4 | 1) * 4; }

// A rectangle of a map.
struct Rectangle {
  int row, rows, column, columns;
};

// A map cut into rectangles, row by row; those at the border are as large as the map lets them.
struct Cover {
  int rows, columns;  // of a rectangle
  int down, across;

  MFEF_HD static Cover of(const Sizes& s, int rows, int columns) {
    return {rows, columns, ceil_div(s.height, rows), ceil_div(s.width, columns)};
  }
  MFEF_HD int count() const { return down * across; }
  MFEF_HD Rectangle rectangle(const Sizes& s, int index) const {
    const int row = index / across * rows, column = index % across * columns;
    return {row, least(rows, s.height - row), column, least(columns, s.width - column)};
  }
};

// The source of a rectangle for a k x k kernel in shared memory: [channel][row][column] with the halo.
struct Halo {
  int rows, pitch;  // floats of a row: the spans that threads read, whole vectors
  int64_t step;     // floats from channel to channel

  MFEF_HD Halo(const Cover& cover, int k)
      : rows(cover.rows + k - 1), pitch(cover.columns + fill4(k - 1)), step(odd_vectors(int64_t(rows) * pitch)) {}
};

// A part of a branch on tensor cores (large_conv_matrices.cuh), of 16-bit elements. A matrix of pixels is a span of two
// rows, a slot is 8 destination channels of a group, and a warp has up to kWarpItems items of kItemPixels matrices of
// pixels by kItemSlots slots. Channels of a group are filled up with zeros to whole chunks of 8 in shared memory.
struct MatrixPart {
  static constexpr int kSide = 8, kItemPixels = 4, kItemSlots = 2, kWarpItems = 2;
  static constexpr int kItems = kWarpItems * kConvolutionThreads / 32;  // of a thread block, at most

  int slots_per_group, slots;
  int columns;                     // of the source with its halo
  int group, pixel_step, tap_row;  // words: of a group's sources in a pixel, from pixel to pixel, of a channel's taps
  int64_t dest_step, weights, source, total;  // as in UnitLayout; a tap's weights are [slot][8 channels][source]

  // Words from row to row of what is read as matrices: 4 more than a multiple of 8, so that 8 rows read all banks.
  MFEF_HD static int row_step(int words) { return (words + 3) / 8 * 8 + 4; }
  MFEF_HD static int chunks(int channels) { return ceil_div(channels, kSide); }

  // `stage` source channels of a group and `rows` rows of taps at a time.
  MFEF_HD MatrixPart(const Cover& tiles, const Way& part, int stage, int rows)
      : slots_per_group(chunks(part.dest_per_group)),
        slots(part.groups * slots_per_group),
        columns(tiles.columns + part.k - 1),
        group(chunks(stage) * kSide / 2),
        pixel_step(row_step(part.groups * group)),
        tap_row(row_step(group)),
        dest_step(odd_vectors(int64_t(tiles.rows) * tiles.columns)),
        weights(part.dest() * dest_step),
        source(weights + int64_t(rows) * part.k * slots * kSide * tap_row),
        total(source + int64_t(tiles.rows + part.k - 1) * columns * pixel_step) {}

  // Of a tile, or at most of any.
  MFEF_HD static int items(int rows, int columns, int slots) {
    const int pixels = ceil_div(rows, 2) * ceil_div(columns, kSpan);
    return ceil_div(pixels, kItemPixels) * ceil_div(slots, kItemSlots);
  }
  // Whether tensor cores suit a way; narrower groups would be mostly zeros.
  MFEF_HD static bool suit(const Sizes& s, const Way& way) {
    return s.element != Element::kFloat && way.source_per_group >= kSide && way.dest_per_group >= kSide;
  }
};

// A unit of a convolution: the destination channels [first, first + count) counted from `branch`'s first, which the
// branches [branch, end) write. Without a convolution, and where branches add to the same channels, all branches.
struct Unit {
  int branch, end, first, count;
};

// Where a unit begins among the weights of one of its branches.
struct UnitWeights {
  int out, in;

  MFEF_HD UnitWeights(const Way& whole, const Unit& unit, bool backward) {
    const int group = unit.first / whole.dest_per_group;
    out = backward ? group * whole.source_per_group : unit.first;
    in = backward ? unit.first - group * whole.dest_per_group : 0;
  }
};

// How a direction of the convolution is cut into units.
struct Units {
  int count;
  // Of every branch: destination channels of a unit, whole groups or a run of one; and how many source channels of a
  // group are in shared memory at a time. On tensor cores also how many rows of taps are, else 0.
  int channels[kMaxBranches], stage[kMaxBranches], rows[kMaxBranches];
  bool matrices;  // which branches count: those on tensor cores, or the others

  MFEF_HD static bool merged(const Sizes& s, bool backward) { return s.branch_count == 0 || summed(s, backward); }
  // Those of one launch alone.
  Units of_launch(const Sizes& s, bool backward, bool on_tensor_cores) const {
    Units units = *this;
    units.matrices = on_tensor_cores;
    if (merged(s, backward)) {
      if (on_tensor_cores) units.count = 0;
      return units;
    }
    units.count = 0;
    for (int b = 0; b < s.branch_count; ++b) units.count += units.of_branch(Way(s.branches[b], backward), b);
    return units;
  }
  MFEF_HD int of_branch(const Way& way, int b) const {
    if ((rows[b] > 0) != matrices) return 0;
    const int groups = channels[b] / way.dest_per_group;
    return groups ? ceil_div(way.groups, groups) : way.groups * ceil_div(way.dest_per_group, channels[b]);
  }
  MFEF_HD Unit unit(const Sizes& s, bool backward, int index) const {
    if (merged(s, backward)) {
      const int first = index * channels[0];
      return {0, s.branch_count, first, least(channels[0], (backward ? s.in : s.out) - first)};
    }
    int b = 0;
    for (int units = 0; index >= (units = of_branch(Way(s.branches[b], backward), b)); ++b) index -= units;
    const Way way(s.branches[b], backward);
    const int per_group = way.dest_per_group, channels_of = channels[b];
    if (channels_of >= per_group) {
      const int first = index * channels_of;
      return {b, b + 1, first, least(channels_of, way.dest() - first)};
    }
    const int runs = ceil_div(per_group, channels_of), group = index / runs,
              first = (index - group * runs) * channels_of;
    return {b, b + 1, group * per_group + first, least(channels_of, per_group - first)};
  }
};

// Shared memory of a convolution: the destination, the weights of a stage, its source. In floats.
struct UnitLayout {
  int64_t dest_step, weights, source, source_step, total;

  MFEF_HD UnitLayout(const Cover& tiles, const Way& part, int stage)
      : dest_step(odd_vectors(int64_t(tiles.rows) * tiles.columns)),
        weights(part.dest() * dest_step),
        source(weights + (int64_t(stage) * part.k * part.k * part.weight_step() + 3) / 4 * 4),
        source_step(Halo(tiles, part.k).step),
        total(source + int64_t(part.groups) * stage * source_step) {}
  // Without a convolution, and afterwards: three numbers of every row of every channel, behind the destination.
  MFEF_HD static int64_t statistics(const Cover& tiles, int channels) {
    return channels * (odd_vectors(int64_t(tiles.rows) * tiles.columns) + 3 * tiles.rows);
  }
};

// Shared memory of a piece, in floats: maps [channel][pixel], then what the channels and the pixels of it have.
struct PieceLayout {
  static constexpr int kStep = kSlots | 1;  // from channel to channel
  int y, grad, gate, sums, spatial_gate, channel_index, grad_pooled, pooled, grad_spatial, taps, parts;
  int halo_rows, halo_columns, total;

  MFEF_HD PieceLayout(const Sizes& s, const Cover& pieces, bool backward) {
    int next = 0;
    auto take = [&next](int count) {
      const int at = next;
      next += count;
      return at;
    };
    halo_rows = pieces.rows + s.spatial_k - 1;
    halo_columns = pieces.columns + s.spatial_k - 1;
    y = take(kChunk * kStep);
    grad = take(backward ? kChunk * kStep : 0);
    gate = take(kChunk);
    spatial_gate = take(kSlots);
    channel_index = take(kSlots);
    grad_pooled = take(2 * kSlots);
    pooled = take(2 * halo_rows * halo_columns);
    grad_spatial = take(backward ? halo_rows * halo_columns : 0);
    taps = take(2 * s.spatial_k * s.spatial_k);
    parts = take(most(3 * kSlotParts, 2 * s.spatial_k) * kSlots);
    sums = parts;
    total = next;
  }
};

// How the weight gradient of a branch on tensor cores (large_weight_matrices.cuh) is cut. An item is kDests destination
// channels of a group by a slot of 8 source channels by up to kTaps neighbouring taps; a tile is up to kItems items of
// the same destination channels: all of a few slots, or a part of one slot's.
struct LargeMatrixTiles {
  static constexpr int kDests = 16, kSlot = 8, kTaps = 3, kWarpItems = 3, kMostSlots = 4;
  static constexpr int kItems = kWarpItems * kConvolutionThreads / 32;

  int runs, per_slot;                 // items of a row of taps, and of a slot
  int blocks, slots;                  // of a group: kDests destination channels, slots
  int tile_slots, parts, part_items;  // slots of a tile, or tiles of a slot: one of them is 1; a tile's items of a slot
  int per_block, tiles;

  MFEF_HD explicit LargeMatrixTiles(const Branch& b)
      : runs(ceil_div(b.k, kTaps)),
        per_slot(b.k * runs),
        blocks(ceil_div(b.out_per_group(), kDests)),
        slots(ceil_div(b.in_per_group(), kSlot)),
        tile_slots(least(least(most(kItems / per_slot, 1), kMostSlots), slots)),
        parts(ceil_div(per_slot, kItems)),
        part_items(ceil_div(per_slot, parts)),
        per_block(ceil_div(slots, tile_slots) * parts),
        tiles(b.groups * blocks * per_block) {}

  MFEF_HD static int count(const Sizes& s, int branch) {
    const Branch& b = s.branches[branch];
    return MatrixPart::suit(s, Way(b, false)) ? LargeMatrixTiles(b).tiles : 0;
  }

  // Words of a pixel in shared memory: of dy, and of x, where it has a halo.
  MFEF_HD static int dy_step() { return MatrixPart::row_step(kDests / 2); }
  MFEF_HD int x_step() const { return MatrixPart::row_step(tile_slots * kSlot / 2); }
  MFEF_HD static int64_t dy_words(const Cover& piece) { return int64_t(piece.rows) * piece.columns * dy_step(); }

  static int64_t bytes(const Sizes& s, const Cover& piece) {
    int64_t largest = 0;
    for (int b = 0; b < s.branch_count; ++b) {
      if (!count(s, b)) continue;
      const int k = s.branches[b].k;
      const int64_t x =
          int64_t(piece.rows + k - 1) * (piece.columns + k - 1) * LargeMatrixTiles(s.branches[b]).x_step();
      largest = largest > dy_words(piece) + x ? largest : dy_words(piece) + x;
    }
    return 4 * largest;
  }
};

// What a tile of it has: `items` items of the destination channels [out, out + kDests) of a group, counted in the
// branch, and of slots from `slot` on.
struct LargeMatrixTile {
  int branch, group, out, slot, slots, part;

  MFEF_HD LargeMatrixTile(const Sizes& s, int tile) : branch(0) {
    while (tile >= LargeMatrixTiles::count(s, branch)) tile -= LargeMatrixTiles::count(s, branch++);
    const Branch& b = s.branches[branch];
    const LargeMatrixTiles shape(b);
    const int block = tile / shape.per_block, rest = tile - block * shape.per_block;
    group = block / shape.blocks;
    out = group * b.out_per_group() + (block - group * shape.blocks) * LargeMatrixTiles::kDests;
    slot = rest / shape.parts * shape.tile_slots;
    part = rest % shape.parts;
    slots = least(shape.tile_slots, shape.slots - slot);
  }
};

struct LargePlan {
  Cover tiles;          // of the convolution, with the statistics of each
  Cover pieces;         // of the attention
  Cover weight_pieces;  // of the weight gradient
  // Of that on tensor cores: its pieces, how many a slice has, tiles of weights, bytes.
  Cover matrix_pieces;
  int64_t matrix_slice, shared_matrix_weights;
  int matrix_tiles;
  Units units, units_backward;
  int reduce_parts;                                   // threads that add up the statistics of a channel
  int64_t shared, shared_backward, shared_weights;    // bytes: convolution, data gradient, weight gradient
  int64_t shared_matrices, shared_matrices_backward;  // of the launch on tensor cores
  int64_t shared_gates, shared_mlp;                   // the MLP of an image, forward and backward
  int64_t shared_piece, shared_piece_backward;        // the attention of a piece

  // The sizes of an image whose maps stay in memory, as Layout takes them.
  MFEF_HD static Sizes vectors(Sizes s, int reduce_parts) {
    s.height = reduce_parts;
    s.width = 0;
    return s;
  }
};

// The source channels of a group that a stage of the unit `part` can have in `limit` bytes; 0 if not one chain fits.
inline int choose_stage(const Cover& tiles, const Way& part, int64_t limit) {
  const int chains = ceil_div(part.source_per_group, part.chain());
  for (int stages = 1; stages <= chains; ++stages) {
    const int stage = least(ceil_div(chains, stages) * part.chain(), part.source_per_group);
    const int64_t floats = UnitLayout(tiles, part, stage).total,
                  statistics = UnitLayout::statistics(tiles, part.dest());
    if (4 * (floats > statistics ? floats : statistics) <= limit) return stage;
  }
  return 0;
}

// The same on tensor cores, with the rows of taps at a time: those of the fewest rounds. False if they do not suit.
inline bool choose_matrices(const Sizes& s, const Cover& tiles, const Way& way, const Way& part, int64_t limit,
                            int* stage, int* rows) {
  constexpr int kDepth = 2 * MatrixPart::kSide;  // of a product
  if (!MatrixPart::suit(s, way) ||
      MatrixPart::items(tiles.rows, tiles.columns, MatrixPart(tiles, part, 1, 1).slots) > MatrixPart::kItems ||
      4 * UnitLayout::statistics(tiles, part.dest()) > limit) {
    return false;
  }
  const int sources = way.source_per_group, products = ceil_div(sources, kDepth);
  int fewest = 0;
  for (int stages = 1; stages <= products + 1; ++stages) {
    // The last resort is half a product.
    const int channels = stages > products ? MatrixPart::kSide : least(ceil_div(products, stages) * kDepth, sources);
    const int64_t taps = MatrixPart(tiles, part, channels, 1).source - MatrixPart(tiles, part, channels, 0).source;
    const int64_t left = (limit / 4 - MatrixPart(tiles, part, channels, 0).total) / taps;
    if (left < 1) continue;
    const int of_taps = left < part.k ? int(left) : part.k;
    const int rounds = ceil_div(sources, channels) * ceil_div(part.k, of_taps);
    if (fewest && rounds >= fewest) continue;
    fewest = rounds;
    *stage = channels;
    *rows = of_taps;
  }
  return fewest > 0;
}

// Statistics alone, of what has the channels of y.
MFEF_HD Units statistic_units(const Sizes& s) {
  Units units{};
  units.channels[0] = least(s.out, kStatisticChannels);
  units.count = ceil_div(s.out, units.channels[0]);
  return units;
}

// Cuts a direction of the convolution into units; false if the smallest does not fit.
inline bool choose_units(const Sizes& s, bool backward, const Cover& tiles, Units* units, int64_t* shared,
                         int64_t* shared_matrices) {
  // As many channels as give every thread two items: a pair of rows, a span and, where groups are even, two channels.
  const int items = tiles.columns / kSpan * ceil_div(tiles.rows, 2);
  const int wanted = least(most(2 * kConvolutionThreads / items, 1), kUnitChannels / 2);
  const bool merged = Units::merged(s, backward);
  *units = {};
  *shared = *shared_matrices = 0;
  auto see_in = [](int64_t* bytes, int64_t floats) { *bytes = 4 * floats > *bytes ? 4 * floats : *bytes; };
  auto see = [&](int64_t floats) { see_in(shared, floats); };
  if (s.branch_count == 0) {
    *units = statistic_units(s);
    see(UnitLayout::statistics(tiles, units->channels[0]));
    return true;
  }
  // Whether units of `channels` suit branch b, and if so its stage.
  auto suits = [&](int b, int channels) {
    const Way way(s.branches[b], backward);
    if (merged && channels % way.dest_per_group && way.dest_per_group % channels) return false;
    units->channels[b] = channels;
    units->stage[b] = choose_stage(tiles, way.part(0, channels), kLargeShared);
    if (units->stage[b]) {
      see(UnitLayout(tiles, way.part(0, channels), units->stage[b]).total);
      see(UnitLayout::statistics(tiles, channels));
    }
    return units->stage[b] > 0;
  };
  // The same on tensor cores.
  auto matrices_suit = [&](int b, int channels) {
    const Way way(s.branches[b], backward), part = way.part(0, channels);
    int stage, rows;
    if (!choose_matrices(s, tiles, way, part, kLargeShared, &stage, &rows)) return false;
    units->channels[b] = channels;
    units->stage[b] = stage;
    units->rows[b] = rows;
    see_in(shared_matrices, MatrixPart(tiles, part, stage, rows).total);
    see_in(shared_matrices, UnitLayout::statistics(tiles, channels));
    return true;
  };
  // Destination channels of a unit with at most `slots`: whole groups, or a run of one.
  auto of_slots = [](const Way& way, int slots) {
    const int chunks = MatrixPart::chunks(way.dest_per_group), groups = least(slots / chunks, way.groups);
    return groups ? groups * way.dest_per_group : ceil_div(chunks, ceil_div(chunks, slots)) * MatrixPart::kSide;
  };
  const int columns_of_items = MatrixPart::kItems / MatrixPart::items(tiles.rows, tiles.columns, 1);
  const int most_slots = least(columns_of_items * MatrixPart::kItemSlots, kUnitChannels / MatrixPart::kSide);
  if (merged) {
    for (int channels = least(2 * wanted, s.in); channels > 0; --channels) {
      bool all = true;
      *shared = 0;
      for (int b = 0; all && b < s.branch_count; ++b) all = suits(b, channels);
      if (!all) continue;
      units->count = ceil_div(s.in, channels);
      return true;
    }
    return false;
  }
  for (int b = 0; b < s.branch_count; ++b) {
    const Way way(s.branches[b], backward);
    const int per_group = way.dest_per_group, pairs = per_group % 2 == 0 ? 2 : 1;
    int channels = 0;
    for (int slots = MatrixPart::suit(s, way) ? most_slots : 0; slots > 0 && !channels; slots /= 2) {
      channels = of_slots(way, slots);
      if (!matrices_suit(b, channels)) channels = 0;
    }
    for (int most_channels = wanted * pairs; most_channels > 0 && !channels; most_channels /= 2) {
      const int groups = least(most_channels / per_group, way.groups);
      const int runs = ceil_div(per_group, most_channels), even = ceil_div(ceil_div(per_group, runs), pairs) * pairs;
      channels = groups ? groups * per_group : least(even, per_group);
      if (!suits(b, channels)) channels = 0;
    }
    if (!channels) return false;
  }
  units->count = units->of_launch(s, backward, false).count + units->of_launch(s, backward, true).count;
  return true;
}

}  // namespace mfef::cuda
