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

// How a part of a branch on tensor cores comes to shared memory: so many source channels of a group and rows of taps at
// a time, which is a round; with two buffers a round's while the products of the one before are computed.
struct MatrixRounds {
  int stage, rows, buffers;

  MFEF_HD int of_rows(const Way& part) const { return ceil_div(part.k, rows); }
  MFEF_HD int stages(const Way& part) const { return ceil_div(part.source_per_group, stage); }
  MFEF_HD int count(const Way& part) const { return stages(part) * of_rows(part); }
};

// A part of a branch on tensor cores (large_conv_matrices.cuh). A matrix of pixels is a span of two rows, a slot is 8
// destination channels of a group, and a warp has up to kWarpItems items of kItemPixels matrices of pixels by
// kItemSlots slots. Channels of a group are filled up with zeros to whole chunks of 8 in shared memory.
struct MatrixPart {
  static constexpr int kItemPixels = 4, kItemSlots = 2, kWarpItems = 2;
  static constexpr int kItems = kWarpItems * kConvolutionThreads / 32;  // of a thread block, at most
  static constexpr int kTask = 64;                                      // floats of a LargeMatrixTask, behind all else

  int slots_per_group, slots;
  int columns;  // of the source with its halo
  // Words: of a group's sources in a pixel, from pixel to pixel, from channel to channel of a tap, from tap to tap.
  int group, pixel_step, tap_row, tap_step;
  // Words of a round's taps, [tap][slot][8 channels][source], and of its pixels; how many of each there are; where the
  // pixels begin, behind the taps. The destination takes their place in the end.
  int weight_buffers, source_buffers;
  int64_t round_weights, round_source, source, total;

  // Words from row to row of what is read as matrices: 4 more than a multiple of 8, so that 8 rows read all banks. From
  // tap to tap they are 4 more than a multiple of 32, since neighbouring threads write 16 bytes of neighbouring taps.
  MFEF_HD static int row_step(int words) { return (words + 3) / 8 * 8 + 4; }
  MFEF_HD static int chunks(int channels) { return ceil_div(channels, kSide); }
  // Channels of a word: 16-bit elements, or TF32.
  MFEF_HD static int per_word(const Sizes& s) { return s.element == Element::kFloat ? 1 : 2; }

  MFEF_HD MatrixPart(const Sizes& s, const Cover& tiles, const Way& part, const MatrixRounds& rounds)
      : slots_per_group(chunks(part.dest_per_group)),
        slots(part.groups * slots_per_group),
        columns(tiles.columns + part.k - 1),
        group(chunks(rounds.stage) * kSide / per_word(s)),
        pixel_step(row_step(part.groups * group)),
        tap_row(row_step(group)),
        tap_step(slots * kSide * tap_row + 4),
        weight_buffers(least(rounds.buffers, rounds.count(part))),
        source_buffers(least(rounds.buffers, rounds.stages(part))),
        round_weights(int64_t(rounds.rows) * part.k * tap_step),
        round_source(int64_t(ceil_div(tiles.rows, 2) * 2 + part.k - 1) * columns * pixel_step),  // whole pairs
        source(weight_buffers * round_weights),
        total(source + source_buffers * round_source) {}

  // Of a tile, or at most of any.
  MFEF_HD static int items(int rows, int columns, int slots) {
    const int pixels = ceil_div(rows, 2) * ceil_div(columns, kSpan);
    return ceil_div(pixels, kItemPixels) * ceil_div(slots, kItemSlots);
  }
  // Whether tensor cores suit the gradient of x in pyramid mode, of which a branch alone is nothing. Slots are the same
  // channels for all branches, which takes groups of whole slots; and the zeros that fill up sources to chunks are at
  // most three in four of all products.
  MFEF_HD static bool suit_sum(const Sizes& s) {
    if (!s.suit_tensor_cores()) return false;
    int64_t products = 0, filled = 0;
    for (int b = 0; b < s.branch_count; ++b) {
      const Way way(s.branches[b], true);
      if (way.dest_per_group < kSide || (way.groups > 1 && way.dest_per_group % kSide)) return false;
      products += int64_t(way.source_per_group) * way.k * way.k;
      filled += int64_t(chunks(way.source_per_group)) * kSide * way.k * way.k;
    }
    return filled <= 4 * products;
  }
  // Whether tensor cores suit a way; narrower groups would be mostly zeros.
  MFEF_HD static bool suit(const Sizes& s, const Way& way) {
    return s.suit_tensor_cores() && way.source_per_group >= kSide && way.dest_per_group >= kSide;
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
  // group are in shared memory at a time. On tensor cores also how many rows of taps are, else 0, and in how many
  // buffers.
  int channels[kMaxBranches], stage[kMaxBranches], rows[kMaxBranches], buffers[kMaxBranches];
  int task;       // on tensor cores: where the LargeMatrixTask is in shared memory, in floats
  bool matrices;  // which branches count: those on tensor cores, or the others

  MFEF_HD MatrixRounds rounds(int b) const { return {stage[b], rows[b], buffers[b]}; }
  MFEF_HD static bool merged(const Sizes& s, bool backward) { return s.branch_count == 0 || summed(s, backward); }
  // Those of one launch alone.
  Units of_launch(const Sizes& s, bool backward, bool on_tensor_cores) const {
    Units units = *this;
    units.matrices = on_tensor_cores;
    if (merged(s, backward)) {
      if ((rows[0] > 0) != on_tensor_cores) units.count = 0;
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
  static constexpr int kTaskWords = 20;  // in shared memory, before the pieces: this and the tile

  // Groups of at most half as many destination channels have two rows of taps in an item: the second half of its rows
  // are the pixels of one row above. So what is multiplied of a piece is a pair of rows longer, in TF32 a row.
  bool paired;
  int runs, per_slot;                 // items of a row (or two) of taps, and of a slot
  int blocks, slots;                  // of a group: kDests destination channels, slots
  int tile_slots, parts, part_items;  // slots of a tile, or tiles of a slot: one of them is 1; a tile's items of a slot
  int per_block, tiles;

  MFEF_HD explicit LargeMatrixTiles(const Branch& b)
      : paired(2 * b.out_per_group() <= kDests && b.k > 1),
        runs(ceil_div(b.k, kTaps)),
        per_slot(ceil_div(b.k, tap_rows()) * runs),
        blocks(ceil_div(b.out_per_group(), kDests)),
        slots(ceil_div(b.in_per_group(), kSlot)),
        tile_slots(least(least(most(kItems / per_slot, 1), kMostSlots), slots)),
        parts(ceil_div(per_slot, kItems)),
        part_items(ceil_div(per_slot, parts)),
        per_block(ceil_div(slots, tile_slots) * parts),
        tiles(b.groups * blocks * per_block) {}

  MFEF_HD int tap_rows() const { return paired ? 2 : 1; }
  // Rows beside a piece: that are multiplied below it, and zeros above and below.
  MFEF_HD int more_rows(bool tf32) const { return paired ? (tf32 ? 1 : 2) : 0; }
  MFEF_HD int zero_rows(bool tf32) const { return paired ? 1 + more_rows(tf32) : 0; }

  MFEF_HD static int count(const Sizes& s, int branch) {
    const Branch& b = s.branches[branch];
    return MatrixPart::suit(s, Way(b, false)) ? LargeMatrixTiles(b).tiles : 0;
  }

  // Words from pixel to pixel in shared memory. Of what is read word by word in TF32, 4 pixels by 8 channels, an odd
  // multiple of 8, so that those lie in different banks.
  MFEF_HD static int pixel_step(bool tf32, int channels) {
    return tf32 ? (channels / 8 | 1) * 8 : MatrixPart::row_step(channels / 2);
  }
  MFEF_HD int x_step(bool tf32) const { return pixel_step(tf32, tile_slots * kSlot); }
  // dy may be in float32 also in 16 bits, whose words are two pixels: 20 suits them, and matrices.
  MFEF_HD static int dy_step(bool tf32) { return tf32 ? pixel_step(true, kDests) : MatrixPart::row_step(kDests); }
  MFEF_HD int64_t dy_words(bool tf32, const Cover& piece) const {
    return int64_t(piece.rows + zero_rows(tf32)) * piece.columns * dy_step(tf32);
  }
  // Of a piece, in all.
  MFEF_HD int64_t words(bool tf32, const Cover& piece, int k) const {
    const int rows = piece.rows + more_rows(tf32) + k - 1, columns = piece.columns + k - 1;
    return dy_words(tf32, piece) + int64_t(rows) * columns * x_step(tf32);
  }

  static int64_t bytes(const Sizes& s, const Cover& piece, int buffers) {
    int64_t largest = 0;
    for (int b = 0; b < s.branch_count; ++b) {
      const int64_t of = count(s, b) ? LargeMatrixTiles(s.branches[b]).words(s.tf32, piece, s.branches[b].k) : 0;
      largest = of > largest ? of : largest;
    }
    return largest ? 4 * (kTaskWords + buffers * largest) : 0;
  }

  // What the tiles of a slice of `pieces` take, each a thread block that shares a multiprocessor with two others, in
  // cycles: the longest of its own loads and products, one after the other or at once, and of all three's products.
  // Estimates: waiting for memory, a barrier, bytes per cycle of a third of what comes from L2; the latency of an
  // item's operands and products, a product.
  static int64_t cycles(const Sizes& s, const Cover& piece, int64_t pieces, int buffers) {
    constexpr int64_t kWait = 700, kBarrier = 200, kBytes = 21, kItem = 70, kProduct = 2, kBlocks = 3;
    int64_t sum = 0;
    for (int b = 0; b < s.branch_count; ++b) {
      if (!count(s, b)) continue;
      const LargeMatrixTiles shape(s.branches[b]);
      const int k = s.branches[b].k, element = s.tf32 ? 4 : 2, pixels = piece.rows * piece.columns;
      const int items = shape.tile_slots * shape.part_items, more = shape.more_rows(s.tf32);
      const int spans = (piece.rows + more) * piece.columns * element / 4 / kSpan;
      const int halo = (piece.rows + more + k - 1) * (piece.columns + k - 1);
      const int64_t bytes = 4 * kDests * int64_t(pixels) + element * kSlot * int64_t(halo) * shape.tile_slots;
      const int64_t load = bytes / kBytes + kWait;
      const int64_t multiply = spans * (1 + ceil_div(items, kItems / kWarpItems)) * kItem;
      const int64_t longer = load > multiply ? load : multiply;
      const int64_t own = buffers == 2 ? load + (pieces - 1) * longer + multiply + (pieces + 1) * kBarrier
                                       : pieces * (load + multiply + 2 * kBarrier);
      const int64_t all = pieces * kBlocks * kProduct * spans * items * kTaps;
      sum += shape.tiles * (own > all ? own : all);
    }
    return sum;
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
  // Of that on tensor cores: its pieces, how many a slice has and shared memory at a time, tiles of weights, bytes.
  Cover matrix_pieces;
  int64_t matrix_slice, shared_matrix_weights;
  int matrix_buffers, matrix_tiles;
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

// The source channels of a group that a stage of the unit `part` can have in `limit` bytes: whole chains, or where not
// one fits a part of one; 0 if not one channel fits.
inline int choose_stage(const Cover& tiles, const Way& part, int64_t limit) {
  auto fits = [&](int stage) {
    const int64_t floats = UnitLayout(tiles, part, stage).total,
                  statistics = UnitLayout::statistics(tiles, part.dest());
    return 4 * (floats > statistics ? floats : statistics) <= limit;
  };
  const int chains = ceil_div(part.source_per_group, part.chain());
  for (int stages = 1; stages <= chains; ++stages) {
    const int stage = least(ceil_div(chains, stages) * part.chain(), part.source_per_group);
    if (fits(stage)) return stage;
  }
  for (int stage = least(part.chain(), part.source_per_group) / 2; stage > 0; stage /= 2) {
    if (fits(stage)) return stage;
  }
  return 0;
}

// What the rounds of a part cost beside their products, in bytes that a thread block could have loaded meanwhile: loads
// that products wait for, and as constants those waits and the barriers of the rounds. The constants are estimates, of
// 700 and 200 cycles at 21 bytes, a third of what a multiprocessor gets from L2.
inline int64_t exposed_bytes(const Sizes& s, const Cover& tiles, const Way& part, const MatrixRounds& rounds) {
  constexpr int64_t kWait = 16 * 1024, kBarrier = 4 * 1024;
  const MatrixPart shape(s, tiles, part, rounds);
  const int64_t pixels = shape.round_source / shape.pixel_step * part.groups * shape.group * 4;
  const int64_t weights = int64_t(rounds.rows) * part.k * shape.slots * kSide * shape.group * 4;
  const int count = rounds.count(part);
  if (rounds.buffers == 2) return pixels + weights + kWait + (count + 1) * kBarrier;
  return rounds.stages(part) * pixels + count * (weights + kWait + 2 * kBarrier);
}

// The same on tensor cores: the rounds that cost least, and what they cost. 0 if they do not suit.
inline int64_t choose_matrices(const Sizes& s, const Cover& tiles, const Way& part, int64_t limit, MatrixRounds* best) {
  if (4 * UnitLayout::statistics(tiles, part.dest()) > limit) return 0;
  const int slots = part.groups * MatrixPart::chunks(part.dest_per_group);
  if (MatrixPart::items(tiles.rows, tiles.columns, slots) > MatrixPart::kItems) return 0;
  const int sources = part.source_per_group, depth = kSide * MatrixPart::per_word(s);  // of a product
  const int products = ceil_div(sources, depth);
  int64_t cost = 0;
  // The last resort is half a product.
  for (int stages = 1; stages <= products + (cost == 0); ++stages) {
    for (int runs = 1; runs <= part.k; ++runs) {
      for (const int buffers : {1, 2}) {
        const int stage = stages > products ? kSide : least(ceil_div(products, stages) * depth, sources);
        const MatrixRounds rounds{stage, ceil_div(part.k, runs), buffers};
        if (4 * int64_t(MatrixPart(s, tiles, part, rounds).total) > limit) continue;
        const int64_t of_rounds = exposed_bytes(s, tiles, part, rounds);
        if (cost && of_rounds >= cost) continue;
        cost = of_rounds;
        *best = rounds;
      }
    }
  }
  return cost;
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
  // The same on tensor cores, by `rounds`.
  auto take_matrices = [&](int b, int channels, const MatrixRounds& rounds) {
    units->channels[b] = channels;
    units->stage[b] = rounds.stage;
    units->rows[b] = rounds.rows;
    units->buffers[b] = rounds.buffers;
    see_in(shared_matrices, MatrixPart(s, tiles, Way(s.branches[b], backward).part(0, channels), rounds).total);
    see_in(shared_matrices, UnitLayout::statistics(tiles, channels));
  };
  auto place_tasks = [&] {
    units->task = fill4(int(*shared_matrices / 4));
    if (*shared_matrices) *shared_matrices = 4 * int64_t(units->task + MatrixPart::kTask);
  };
  // Destination channels of a unit with at most `slots`: whole groups, or a run of one.
  auto of_slots = [](const Way& way, int slots) {
    const int chunks = MatrixPart::chunks(way.dest_per_group), groups = least(slots / chunks, way.groups);
    return groups ? groups * way.dest_per_group : ceil_div(chunks, ceil_div(chunks, slots)) * kSide;
  };
  constexpr int64_t matrix_limit = kLargeShared - 4 * (MatrixPart::kTask + 4);
  const int columns_of_items = MatrixPart::kItems / MatrixPart::items(tiles.rows, tiles.columns, 1);
  const int most_slots = least(columns_of_items * MatrixPart::kItemSlots, kUnitChannels / kSide);
  if (merged) {
    for (int slots = MatrixPart::suit_sum(s) ? most_slots : 0; slots > 0; --slots) {
      const int channels = least(slots * kSide, s.in);
      MatrixRounds rounds[kMaxBranches];
      bool all = true;
      for (int b = 0; all && b < s.branch_count; ++b) {
        const Way way(s.branches[b], true);
        const bool whole = channels % way.dest_per_group == 0 || way.dest_per_group % channels == 0;
        all = (way.groups == 1 || whole) && choose_matrices(s, tiles, way.part(0, channels), matrix_limit, &rounds[b]);
      }
      if (!all) continue;
      for (int b = 0; b < s.branch_count; ++b) take_matrices(b, channels, rounds[b]);
      place_tasks();
      units->count = ceil_div(s.in, channels);
      return true;
    }
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
    // On tensor cores units of the size that costs least per channel.
    MatrixRounds best{};
    int64_t cost = 0;
    for (int slots = MatrixPart::suit(s, way) ? most_slots : 0; slots > 0; slots /= 2) {
      const int of_unit = of_slots(way, slots);
      MatrixRounds rounds;
      const int64_t of_rounds = choose_matrices(s, tiles, way.part(0, of_unit), matrix_limit, &rounds);
      if (!of_rounds || (cost && of_rounds * channels >= cost * of_unit)) continue;
      cost = of_rounds;
      channels = of_unit;
      best = rounds;
    }
    if (channels) take_matrices(b, channels, best);
    for (int most_channels = wanted * pairs; most_channels > 0 && !channels; most_channels /= 2) {
      const int groups = least(most_channels / per_group, way.groups);
      const int runs = ceil_div(per_group, most_channels), even = ceil_div(ceil_div(per_group, runs), pairs) * pairs;
      channels = groups ? groups * per_group : least(even, per_group);
      if (!suits(b, channels)) channels = 0;
    }
    if (!channels) return false;
  }
  place_tasks();
  units->count = units->of_launch(s, backward, false).count + units->of_launch(s, backward, true).count;
  return true;
}

}  // namespace mfef::cuda
