// The planner: whether one thread block can hold an image from the first load to the last store (the small-map
// kernels), how its shared memory is laid out, and how the launches are divided; else how those of the large-map
// kernels are. Plain C++: module.cpp shows its answers to Python, the operators follow them.
#pragma once

#include <string>
#include <vector>

#include "large_plan.h"

namespace mfef::cuda {

constexpr int kWidestMap = 16;  // a thread owns whole rows, in registers
// Of the forward and the backward: 170 registers each, so that the widest register tiles do not spill (at 512 threads,
// with 128 registers, they did on sm_80).
constexpr int kMostThreads = 384;
constexpr int kParts = 16;         // runs of channels that are summed side by side in the MLP
constexpr int kPixelParts = 8;     // and per pixel
constexpr int kTileThreads = 128;  // of the weight gradient: a thread owns up to 3 rows of taps of one weight
constexpr int kTileRows = 3;
constexpr int kTileChannels = 32;  // output channels side by side in it
// The weight gradient is divided into tiles times slices of the batch; slices are made until there are about as
// many blocks as this. A constant: the order of sums must not depend on the GPU.
constexpr int kTileBlocks = 512;
constexpr int kMostSlices = 64;
// Of its tiles by tensor cores: bytes of the images in shared memory at a time, so that a multiprocessor of sm_90 and
// later holds three thread blocks.
constexpr int64_t kMatrixShared = 72 * 1024;
constexpr int kMostMatrixImages = 4;
// Where the backward's thread blocks sum the weight gradient of their images themselves (see weights_in_backward):
// bytes that they leave at most, all together; multiply-adds by which a thread block may be busier than an equal share
// for as many multiprocessors would make it, some 3 us of one, about what a launch takes; and what a weight costs
// beside its products. Constants as above.
constexpr int64_t kMostPartials = 4 << 20, kMostBusier = 400 * 1000;
constexpr int kMultiprocessors = 128, kWeightCost = 8;
constexpr int kWidestWithWeights = 8;  // at 16 floats a row the backward's registers do not suffice

// The convolution of a block runs in stages: the weights of a stage are in shared memory, those of the next
// take their place. A stage has of every branch an equal share of its chains.

// Input channels of a group that a stage reduces over: [share(..., s), share(..., s + 1)).
MFEF_HD int share(int channels, int chain, int stages, int stage) {
  const int chains = ceil_div(channels, chain);
  return least(int(int64_t(chains) * stage / stages) * chain, channels);
}

// How the convolution of a direction is cut: `count` shares of every branch, all branches side by side in a stage; or,
// where that is too much for shared memory and where branches add to the same channels, one branch at a time.
struct Stages {
  int count;
  bool one_by_one;

  MFEF_HD int total(const Sizes& s) const { return one_by_one ? count * s.branch_count : count; }
  // The source channels [first, end) of a group of branch b in a stage; by matrices the columns of taps.
  MFEF_HD void channels(const Sizes& s, bool backward, int stage, int b, int* first, int* end) const {
    const Way way(s.branches[b], backward);
    const bool matrices = by_matrices(s, s.branches[b]);
    const MatrixWay by_columns(s, s.branches[b], backward);
    const int all = matrices ? by_columns.columns() : way.source_per_group;
    const int chain = matrices ? by_columns.chain() : way.chain();
    *first = *end = 0;
    if (one_by_one) {
      if (stage / count != b) return;
      stage %= count;
    }
    *first = share(all, chain, count, stage);
    *end = share(all, chain, count, stage + 1);
  }
};

// Floats of the weights of `count` of what a stage has of branch b.
MFEF_HD int64_t stage_floats(const Sizes& s, bool backward, int b, int count) {
  const Way way(s.branches[b], backward);
  if (by_matrices(s, s.branches[b])) return int64_t(count) * MatrixWay(s, s.branches[b], backward).column_step();
  return int64_t(count) * way.k * way.k * way.weight_step();
}

// The weight gradient: units are (group, run of output channels), items (unit, input channel, rows of taps,
// output channel); a tile is kTileThreads items of one unit, or several whole units.
struct TileShape {
  int rows;      // items in place of ky: runs of kTileRows rows of taps; single taps where k is not compiled
  int channels;  // output channels of a unit
  int runs;      // units per group
  int items;     // per unit
  int units_per_tile, tiles_per_unit;  // one of them is 1
  int tiles;

  MFEF_HD explicit TileShape(const Branch& b) {
    rows = compiled(b.k) ? ceil_div(b.k, kTileRows) : b.k * b.k;
    channels = least(b.out_per_group(), kTileChannels);
    runs = ceil_div(b.out_per_group(), channels);
    items = b.in_per_group() * rows * channels;
    units_per_tile = most(kTileThreads / items, 1);
    tiles_per_unit = ceil_div(items, kTileThreads);
    tiles = units_per_tile > 1 ? ceil_div(b.groups * runs, units_per_tile) : b.groups * runs * tiles_per_unit;
  }
  MFEF_HD static bool compiled(int k) { return k == 3 || k == 5 || k == 7 || k == 9; }
};

// What a tile reads: channels of x and of the gradient of y, both counted from the branch's first.
struct Tile {
  int branch, unit, units, item;  // units [unit, unit + units); items of a unit from `item` on
  int in, in_count, out, out_count;

  // The branches that tensor cores compute have no such tiles.
  MFEF_HD static int count(const Sizes& s, bool small, int branch) {
    const Branch& b = s.branches[branch];
    return (small ? by_matrices(s, b) : MatrixPart::suit(s, Way(b, false))) ? 0 : TileShape(b).tiles;
  }
  MFEF_HD Tile(const Sizes& s, bool small, int tile) : branch(0), item(0) {
    while (tile >= count(s, small, branch)) tile -= count(s, small, branch++);
    const Branch& b = s.branches[branch];
    const TileShape shape(b);
    const int all = b.groups * shape.runs, inputs = b.in_per_group(), outputs = b.out_per_group();
    if (shape.units_per_tile > 1) {
      unit = tile * shape.units_per_tile;
      units = least(shape.units_per_tile, all - unit);
      const int first_group = unit / shape.runs, last_group = (unit + units - 1) / shape.runs;
      in = first_group * inputs;
      in_count = (last_group - first_group + 1) * inputs;
    } else {
      unit = tile / shape.tiles_per_unit;
      units = 1;
      item = tile % shape.tiles_per_unit * kTileThreads;
      const int per_input = shape.rows * shape.channels;
      const int last = (least(item + kTileThreads, shape.items) - 1) / per_input;
      in = unit / shape.runs * inputs + item / per_input;
      in_count = last - item / per_input + 1;
    }
    const int last = unit + units - 1;
    out = unit / shape.runs * outputs + unit % shape.runs * shape.channels;
    out_count = last / shape.runs * outputs + least((last % shape.runs + 1) * shape.channels, outputs) - out;
  }
};

// The same by tensor cores: units are (group, 16 output channels), items (unit, 8 input channels, column of taps). A
// tile is what a thread block's warps hold of one unit, one item after the other in each warp.
struct MatrixTile {
  static constexpr int kOutputs = 16, kInputs = 8, kWarps = kTileThreads / 32;
  static constexpr int kBeside = 4;  // columns of zeros on either side of x

  int branch, item, item_end;        // of the unit
  int input, input_end;              // runs of 8 input channels
  int in, in_count, out, out_count;  // channels, counted from the branch's first

  // Items of a warp: as many as registers have room for.
  MFEF_HD static constexpr int held(int k, bool tf32) { return k == 3 ? 4 : tf32 && k >= 7 ? 1 : 2; }
  MFEF_HD static int items(const Branch& b) { return ceil_div(b.in_per_group(), kInputs) * b.k; }
  MFEF_HD static int per_unit(const Sizes& s, const Branch& b) {
    return ceil_div(items(b), held(b.k, s.tf32) * kWarps);
  }
  MFEF_HD static int count(const Sizes& s, int branch) {
    const Branch& b = s.branches[branch];
    return by_matrices(s, b) ? b.groups * ceil_div(b.out_per_group(), kOutputs) * per_unit(s, b) : 0;
  }
  // Words of a row in shared memory, of `per_word` pixels each: two of 16 bits, or one in TF32; and from channel to
  // channel, 4 more than a multiple of 8: 8 channels by 4 words are all banks.
  MFEF_HD static constexpr int x_row(int per_word) { return (kSide + 2 * kBeside) / per_word; }
  MFEF_HD static constexpr int gradient_row(int per_word) { return kSide / per_word; }
  MFEF_HD static constexpr int x_step(int per_word) { return kSide * x_row(per_word) + 4; }
  MFEF_HD static constexpr int gradient_step(int per_word) { return kSide * gradient_row(per_word) + 4; }
  // Of an image's gradient and x.
  MFEF_HD static int words(const Sizes& s, int inputs) {
    const int per_word = s.tf32 ? 1 : 2;
    return kOutputs * gradient_step(per_word) + inputs * kInputs * x_step(per_word);
  }

  MFEF_HD int inputs() const { return input_end - input; }
  MFEF_HD MatrixTile(const Sizes& s, int tile) : branch(0) {
    while (tile >= count(s, branch)) tile -= count(s, branch++);
    const Branch& b = s.branches[branch];
    const int runs = ceil_div(b.out_per_group(), kOutputs), unit = tile / per_unit(s, b), group = unit / runs;
    const int run = unit - group * runs, step = held(b.k, s.tf32) * kWarps;
    item = (tile - unit * per_unit(s, b)) * step;
    item_end = least(item + step, items(b));
    input = item / b.k;
    input_end = (item_end - 1) / b.k + 1;
    in = group * b.in_per_group() + input * kInputs;
    in_count = least(inputs() * kInputs, b.in_per_group() - input * kInputs);
    out = group * b.out_per_group() + run * kOutputs;
    out_count = least(kOutputs, b.out_per_group() - run * kOutputs);
  }
};

// Where the sums of a branch begin among those of a slice; they are in the order (out, in per group, ky, kx).
MFEF_HD int64_t first_sum(const Sizes& s, int branch) {
  int64_t first = 0;
  for (int i = 0; i < branch; ++i) {
    const Branch& b = s.branches[i];
    first += int64_t(b.out) * b.in_per_group() * b.k * b.k;
  }
  return first;
}
// The sum of a weight among those of a branch. In the backward neighbouring threads have neighbouring output channels,
// and there are as many partial sums as thread blocks: there those are neighbours, (ky, kx, in per group, out).
MFEF_HD int64_t place_of_sum(const Branch& b, bool in_backward, int out, int in, int ky, int kx) {
  return in_backward ? (int64_t(ky * b.k + kx) * b.in_per_group() + in) * b.out + out
                     : ((int64_t(out) * b.in_per_group() + in) * b.k + ky) * b.k + kx;
}

// --- shared memory ----------------------------------------------------------------------------

// Offsets in floats. Maps first; then what lives from the pooling to the end; then a region that the weights of the
// convolution use and, at other times, the partial sums of the attention.
struct Layout {
  int source, dest;                // forward: x and y; backward: the gradient of y and, before the gradient of x, y
  int copy;                        // of the source for tensor cores, [row][column][channel] in 16-bit elements
  int mean, max, max_index, gate;  // [image][channel]
  int hidden_mean, hidden_max;     // [image][hidden]; forward: hidden_mean is their sum
  int logit, grad_mean, grad_max;  // backward, [image][channel]
  int spatial_gate, pooled, grad_pooled, grad_spatial;  // [image][pixel]; pooled: 2 per pixel, maximum and mean
  int channel_index;
  int weights, parts;
  int total;

  MFEF_HD Layout(const Sizes& s, bool backward, int step, int images, int weight_floats) {
    int next = 0;
    auto take = [&next](int count) {
      const int at = next;
      next += (count + 3) / 4 * 4;
      return at;
    };
    const bool attention = s.hidden > 0, convolution = s.branch_count > 0;
    const int per_channel = attention ? images * s.out : 0, per_hidden = attention ? images * s.hidden : 0;
    const int per_pixel = attention ? images * s.pixels() : 0;
    source = take((backward ? s.out : (convolution ? s.in : 0)) * step);
    dest = take((backward ? most(s.out * attention, s.in * convolution) : s.out) * step);
    copy = take(images * s.height * kSide * MatrixWay::pixel_step(s, backward));
    gate = take(per_channel);
    mean = take(per_channel);
    max = take(per_channel);
    max_index = take(per_channel);
    hidden_mean = take(per_hidden);
    hidden_max = take(per_hidden);
    pooled = take(2 * per_pixel);
    spatial_gate = take(per_pixel);
    channel_index = take(per_pixel);
    logit = take(backward ? per_channel : 0);
    grad_mean = take(backward ? per_channel : 0);
    grad_max = take(backward ? per_channel : 0);
    grad_pooled = take(backward ? 2 * per_pixel : 0);
    grad_spatial = take(backward ? per_pixel : 0);
    weights = parts = next;
    const int of_rows = 3 * per_channel * s.height, of_mlp = 2 * kParts * per_hidden;
    const int of_pixels = 3 * kPixelParts * per_pixel, of_taps = 2 * s.spatial_k * per_pixel;
    total = next + most(most(weight_floats, of_rows), most(most(of_mlp, of_pixels), of_taps));
  }
};

// --- the plan ---------------------------------------------------------------------------------

struct Plan {
  bool fits;
  std::string reason;  // why not, or why not in one launch

  int row;      // floats of a row in shared memory: W, filled up to 2, 4, 8 or 16
  int images;   // per thread block
  int step;     // floats from channel to channel in shared memory
  int threads;  // per block, both directions
  Stages stages, stages_backward;
  int weights, weights_backward;                    // floats of a stage's weights
  int64_t shared, shared_backward, shared_weights;  // bytes of each launch; of the weight gradient
  bool matrices;                                    // whether tensor cores compute a branch

  bool weights_in_backward;                   // then no tiles, and slices are the blocks of images
  int tiles, slices, pass_images, tile_step;  // of the weight gradient
  int matrix_tiles, matrix_images;            // of the tiles the first, by tensor cores, and images of a pass there
  int64_t slice_images;                       // large maps: pieces of images

  bool large;  // then of the above only tiles, slices and slice_images count
  LargePlan maps;
};

// Floats of the largest stage's weights.
inline int64_t stage_weights(const Sizes& s, bool backward, const Stages& stages) {
  int64_t largest = 0;
  for (int stage = 0; stage < stages.total(s); ++stage) {
    int64_t sum = 0;
    for (int b = 0; b < s.branch_count; ++b) {
      int first, end;
      stages.channels(s, backward, stage, b, &first, &end);
      sum += stage_floats(s, backward, b, end - first);
    }
    largest = sum > largest ? sum : largest;
  }
  return largest;
}

// Floats from channel to channel of maps of `rows` rows: an odd number of vectors, so that neighbouring threads
// that own neighbouring channels read different banks.
inline int channel_step(int rows, int row) {
  const int vector = row < 4 ? row : 4, count = rows * row / vector;
  return (count + 1 - count % 2) * vector;
}

// Chooses the fewest stages whose weights fit into `limit` bytes beside everything else; false if none do.
inline bool choose_stages(const Sizes& s, bool backward, const Plan& p, int64_t limit, Stages* stages, int* weights,
                          int64_t* bytes) {
  int most_stages = 1;
  for (int b = 0; b < s.branch_count; ++b) {
    const Way way(s.branches[b], backward);
    const MatrixWay by_columns(s, s.branches[b], backward);
    most_stages = most(most_stages, by_matrices(s, s.branches[b]) ? ceil_div(by_columns.columns(), by_columns.chain())
                                                                  : ceil_div(way.source_per_group, way.chain()));
  }
  for (const bool one_by_one : {false, true}) {
    if (!one_by_one && summed(s, backward)) continue;
    for (int count = 1; count <= most_stages; ++count) {
      *stages = {count, one_by_one};
      const int64_t floats = stage_weights(s, backward, *stages);
      *weights = int(floats < (1 << 28) ? floats : 1 << 28);
      *bytes = 4 * int64_t(Layout(s, backward, p.step, p.images, *weights).total);
      if (*bytes <= limit) return true;
    }
  }
  return false;
}

// Most channels that a tile of a small map's weight gradient reads.
inline int tile_channels(const Sizes& s, int tiles) {
  int channels = 0;
  for (int t = 0; t < tiles; ++t) {
    const Tile tile(s, true, t);
    channels = most(channels, tile.in_count + tile.out_count);
  }
  return channels;
}

// The sum of of(b) over the branches.
template <class Of>
inline int over_branches(const Sizes& s, const Of& of) {
  int sum = 0;
  for (int b = 0; b < s.branch_count; ++b) sum += of(b);
  return sum;
}

inline int count_tiles(const Sizes& s, bool small) {
  return over_branches(s, [&](int b) { return Tile::count(s, small, b); });
}

// Whether the backward's thread blocks sum the weight gradient of their images while that of y is in shared memory.
// It saves a launch and the gradient of y in memory, and costs a copy of the weights for every thread block, and time
// where there are few thread blocks, since the tiles of the other way keep all multiprocessors busy.
inline bool weights_in_backward(const Sizes& s, int images, int64_t most_partials) {
  if (s.width > kWidestWithWeights) return false;
  const int64_t blocks = (s.batch + images - 1) / images, weights = first_sum(s, s.branch_count);
  if (!weights || 4 * weights > most_partials || 4 * weights * blocks > most_partials) return false;
  // Products of a row of taps with a row of pixels that are not beside the map.
  auto meeting = [](int k, int side) {
    const int half = least(k / 2, side - 1);
    return int64_t(side) * (2 * half + 1) - int64_t(half) * (half + 1);
  };
  int64_t work = kWeightCost * weights;
  for (int i = 0; i < s.branch_count; ++i) {
    const Branch& b = s.branches[i];
    work += images * int64_t(b.out) * b.in_per_group() * meeting(b.k, s.height) * meeting(b.k, s.width);
  }
  return work * (kMultiprocessors - least(int(blocks), kMultiprocessors)) <= kMostBusier * kMultiprocessors;
}

inline Plan make_small_plan(const Sizes& s, int64_t limit, int64_t most_partials) {
  Plan p{};
  auto refuse = [&p](const std::string& reason) {
    p.reason = reason;
    return p;
  };
  const std::string map = std::to_string(s.height) + " x " + std::to_string(s.width);
  if (s.width > kWidestMap) {
    return refuse("a map of " + map + " is wider than " + std::to_string(kWidestMap) + " pixels");
  }
  p.row = 2;
  while (p.row < s.width) p.row *= 2;
  // Sizes that shared memory could never hold are refused before they are multiplied.
  constexpr int64_t kMost = 1 << 20;
  if (s.in > kMost || s.out > kMost || s.hidden > kMost || s.height > kMost || s.spatial_k > 255 ||
      int64_t(s.out > s.in ? s.out : s.in) * s.height * p.row > kMost || int64_t(s.hidden) * kParts > kMost) {
    return refuse("an image of " + std::to_string(s.in) + " x " + map + " does not fit into a thread block");
  }
  // Images share a block while they are tiny and there are more than enough blocks.
  p.images = 1;
  while (2 * p.images * s.pixels() <= 64 && s.batch >= int64_t(512) * p.images) p.images *= 2;
  p.step = channel_step(p.images * s.height, p.row);
  bool ok = choose_stages(s, false, p, limit, &p.stages, &p.weights, &p.shared);
  ok = choose_stages(s, true, p, limit, &p.stages_backward, &p.weights_backward, &p.shared_backward) && ok;
  if (!ok && p.images > 1) {
    Sizes alone = s;
    alone.batch = 1;
    Plan one = make_small_plan(alone, limit, most_partials);
    if (!one.fits) return one;
    p.images = 1;
    p.step = one.step;
    choose_stages(s, false, p, limit, &p.stages, &p.weights, &p.shared);
    ok = choose_stages(s, true, p, limit, &p.stages_backward, &p.weights_backward, &p.shared_backward);
  }
  if (!ok) {
    const int64_t bytes = p.shared > p.shared_backward ? p.shared : p.shared_backward;
    return refuse("an image of " + std::to_string(s.in) + " x " + map + " takes " +
                  std::to_string((bytes + 1023) / 1024) + " KiB of shared memory, a thread block has " +
                  std::to_string(limit / 1024));
  }
  p.threads = s.out * p.images * ceil_div(s.height, 2) > 256 ? kMostThreads : 256;

  p.matrices = over_branches(s, [&](int b) { return by_matrices(s, s.branches[b]); }) > 0;
  p.slices = 1;
  if (weights_in_backward(s, p.images, most_partials)) {
    p.weights_in_backward = p.fits = true;
    p.slices = int(s.batch > 0 ? (s.batch + p.images - 1) / p.images : 1);
    p.shared_weights = p.shared_backward;
    return p;
  }
  p.pass_images = most(64 / s.pixels(), 1);
  p.tile_step = channel_step(p.pass_images * s.height, p.row);
  const int direct_tiles = count_tiles(s, true);
  p.matrix_tiles = over_branches(s, [&](int b) { return MatrixTile::count(s, b); });
  p.tiles = p.matrix_tiles + direct_tiles;
  if (p.tiles) {
    const int64_t wanted = most(least(kTileBlocks / p.tiles, kMostSlices), 4);
    p.slices = int(s.batch < wanted ? (s.batch > 0 ? s.batch : 1) : wanted);
    p.slice_images = (s.batch + p.slices - 1) / p.slices;
    const int channels = tile_channels(s, direct_tiles);
    p.shared_weights = int64_t(channels) * p.tile_step * 4;
    while (p.shared_weights > limit && p.pass_images > 1) {
      p.pass_images /= 2;
      p.tile_step = channel_step(p.pass_images * s.height, p.row);
      p.shared_weights = int64_t(channels) * p.tile_step * 4;
    }
    if (p.shared_weights > limit) {
      return refuse("the weight gradient of maps of " + map + " takes " +
                    std::to_string((p.shared_weights + 1023) / 1024) + " KiB of shared memory, a thread block has " +
                    std::to_string(limit / 1024));
    }
    int64_t bytes = 0;  // of an image by tensor cores; less than 35 KiB
    for (int t = 0; t < p.matrix_tiles; ++t) {
      const int64_t of = 4 * MatrixTile::words(s, MatrixTile(s, t).inputs());
      bytes = of > bytes ? of : bytes;
    }
    p.matrix_images = kMostMatrixImages;
    while (p.matrix_images > 1 && p.matrix_images * bytes > kMatrixShared) p.matrix_images /= 2;
    bytes *= p.matrix_images;
    p.shared_weights = bytes > p.shared_weights ? bytes : p.shared_weights;
  }
  p.fits = true;
  return p;
}

// Floats that a tile of the weight gradient has in shared memory of a piece of an image: x with its halo, and dy.
MFEF_HD int64_t x_step(const Cover& piece, const Branch& b) { return Halo(piece, b.k).step; }
MFEF_HD int64_t dy_step(const Cover& piece) { return odd_vectors(int64_t(piece.rows) * piece.columns); }

inline int64_t weight_piece_bytes(const Sizes& s, int tiles, const Cover& piece) {
  int64_t floats = 0;
  for (int t = 0; t < tiles; ++t) {
    const Tile tile(s, false, t);
    const int64_t of = tile.in_count * x_step(piece, s.branches[tile.branch]) + tile.out_count * dy_step(piece);
    floats = of > floats ? of : floats;
  }
  return 4 * floats;
}

// Makes pieces smaller until bytes(pieces) are at most `limit`, or they are a span of one row.
template <class Bytes>
inline int64_t shrink(const Sizes& s, int64_t limit, const Bytes& bytes, Cover* pieces) {
  int64_t taken = bytes(*pieces);
  while (taken > limit && pieces->rows * pieces->columns > kSpan) {
    const bool flat = pieces->rows <= 4 && pieces->columns > kSpan;
    *pieces = flat ? Cover::of(s, pieces->rows, pieces->columns - kSpan)
                   : Cover::of(s, ceil_div(pieces->rows, 2), pieces->columns);
    taken = bytes(*pieces);
  }
  return taken;
}

// Cuts tiles into the pieces of the weight gradient on tensor cores, pairs of rows of spans, one or two at a time in
// shared memory: of those that fit the fastest in so many slices. Where none fit, the smallest, one at a time.
inline void choose_matrix_pieces(const Sizes& s, int slices, LargePlan* maps) {
  LargePlan& m = *maps;
  auto take = [&](const Cover& pieces, int buffers) {
    m.matrix_pieces = pieces;
    m.matrix_buffers = buffers;
    m.shared_matrix_weights = LargeMatrixTiles::bytes(s, pieces, buffers);
  };
  take(Cover::of(s, 2, kSpan), 1);
  int64_t fewest = 0;
  for (const int buffers : {1, 2}) {
    for (int columns = m.tiles.columns; columns > 0; columns -= kSpan) {
      for (int rows = m.tiles.rows; rows > 0; rows -= 2) {
        // Smaller pieces that are as many: not these.
        if (rows > 2 && ceil_div(m.tiles.rows, rows) == ceil_div(m.tiles.rows, rows - 2)) continue;
        const Cover pieces = Cover::of(s, rows, columns);
        if (LargeMatrixTiles::bytes(s, pieces, buffers) > kLargeShared) continue;
        const int64_t of_slice = (s.batch * pieces.count() + slices - 1) / slices;
        const int64_t cycles = LargeMatrixTiles::cycles(s, pieces, of_slice > 1 ? of_slice : 1, buffers);
        if (fewest && cycles >= fewest) continue;
        fewest = cycles;
        take(pieces, buffers);
      }
    }
  }
}

// Adds the launches of the large-map kernels to a plan; leaves a reason where there are none.
inline void make_large_plan(const Sizes& s, int64_t limit, Plan* plan) {
  Plan& p = *plan;
  LargePlan& m = p.maps;
  auto refuse = [&p](const std::string& reason) { p.reason += ", and by the large-map kernels " + reason; };
  auto kib = [](int64_t bytes) { return std::to_string((bytes + 1023) / 1024) + " KiB"; };
  auto takes = [&](const std::string& what, int64_t bytes) {
    if (bytes > limit) refuse(what + " takes " + kib(bytes) + " of shared memory, a thread block has " + kib(limit));
    return bytes > limit;
  };
  // Sizes that shared memory could never hold are refused before they are multiplied.
  constexpr int kMost = 1 << 20;
  if (s.in > kMost || s.out > kMost || s.hidden > kMost) return refuse("2^20 channels are the most");
  for (int b = 0; b < s.branch_count; ++b) {
    const Branch& of = s.branches[b];
    if (double(of.out) * of.in_per_group() * of.k * of.k > double(1 << 28))
      return refuse("a weight has over 2^28 taps");
  }

  const int spans = ceil_div(s.width, kSpan), across = ceil_div(spans, kTileSpans), wide = ceil_div(spans, across);
  const int tall = 2 * (kTileItems / wide), down = ceil_div(s.height, tall);
  m.tiles = Cover::of(s, (ceil_div(s.height, down) + 1) / 2 * 2, wide * kSpan);
  if (!choose_units(s, false, m.tiles, &m.units, &m.shared, &m.shared_matrices) ||
      !choose_units(s, true, m.tiles, &m.units_backward, &m.shared_backward, &m.shared_matrices_backward)) {
    return refuse("not one channel of a convolution of a tile of " + std::to_string(m.tiles.rows) + " x " +
                  std::to_string(m.tiles.columns) + " pixels fits into " + kib(kLargeShared));
  }

  // The sums for the gradient of a bias are statistics alone.
  const int64_t statistics = 4 * UnitLayout::statistics(m.tiles, kStatisticChannels);
  m.shared = m.shared > statistics ? m.shared : statistics;

  m.pieces =
      Cover::of(s, kPieceRows, s.width > kSlots / kPieceRows / 2 ? kSlots / kPieceRows : kSlots / kPieceRows / 2);
  m.reduce_parts = most(least(2 * kLargeThreads / s.out, 8), 1);
  if (s.hidden) {
    if (int64_t(s.hidden) * kParts > kMost) return refuse("there are too many hidden units");
    const Sizes vectors = LargePlan::vectors(s, m.reduce_parts);
    m.shared_gates = 4 * int64_t(Layout(vectors, false, 0, 1, 0).total);
    m.shared_mlp = 4 * int64_t(Layout(vectors, true, 0, 1, 0).total);
    if (takes("the MLP", m.shared_mlp)) return;
    if (s.spatial_k > 255) return refuse("a spatial kernel of 255 x 255 is the largest");
    m.shared_piece = 4 * int64_t(PieceLayout(s, m.pieces, false).total);
    m.shared_piece_backward = 4 * int64_t(PieceLayout(s, m.pieces, true).total);
    if (takes("the spatial convolution", m.shared_piece_backward)) return;
  }

  p.slices = 1;
  p.tiles = count_tiles(s, false);
  m.matrix_tiles = over_branches(s, [&](int b) { return LargeMatrixTiles::count(s, b); });
  if (p.tiles + m.matrix_tiles) {
    m.weight_pieces = m.matrix_pieces = m.tiles;
    m.shared_weights =
        shrink(s, kLargeShared, [&](const Cover& of) { return weight_piece_bytes(s, p.tiles, of); }, &m.weight_pieces);
    const int64_t wanted = most(least(kLargeBlocks / (p.tiles + m.matrix_tiles), kMostLargeSlices), 4);
    const int64_t pieces = s.batch * (p.tiles ? m.weight_pieces : m.tiles).count();
    p.slices = int(pieces < wanted ? (pieces > 0 ? pieces : 1) : wanted);
    if (m.matrix_tiles) choose_matrix_pieces(s, p.slices, &m);
    if (takes("the weight gradient", most(int(m.shared_weights), int(m.shared_matrix_weights)))) return;
    p.slice_images = (s.batch * m.weight_pieces.count() + p.slices - 1) / p.slices;
    m.matrix_slice = (s.batch * m.matrix_pieces.count() + p.slices - 1) / p.slices;
  }
  p.fits = p.large = true;
}

// How a problem would run on a device whose thread blocks may have `limit` bytes of shared memory. Of the device
// nothing else counts, so sums have the same order on all GPUs with as much; how tensor cores round their products is
// the architecture's.
inline Plan make_plan(const Sizes& s, int64_t limit, int64_t most_partials = kMostPartials) {
  // The planner multiplies the batch by what an image has: in 64 bits, for tensors that the operators take.
  const double image = double(most(s.in, s.out)) * s.height * s.width;
  if (double(s.batch) * (image > s.hidden ? image : s.hidden) > double(kMaxElements)) {
    Plan refused{};
    refused.reason = "a tensor has over 2^40 elements";
    return refused;
  }
  Plan p = make_small_plan(s, limit, most_partials);
  if (!p.fits) make_large_plan(s, limit, &p);
  return p;
}

// Those of a direction of the convolution on large maps.
inline void add_convolutions(const Sizes& s, const Plan& p, bool backward, std::vector<std::string>* all) {
  const Units& units = backward ? p.maps.units_backward : p.maps.units;
  if (units.of_launch(s, backward, false).count) all->push_back("LargeConvolution");
  if (units.of_launch(s, backward, true).count) all->push_back("LargeMatrixConvolution");
}

// The kernels of a whole call, in order; `backward` with all gradients.
inline std::vector<std::string> launches(const Sizes& s, const Plan& p, bool backward) {
  const bool convolution = s.branch_count > 0, attention = s.hidden > 0;
  const std::string matrix = p.matrices ? "Matrix" : "";
  if (!p.large && !backward) return {matrix + "Forward"};
  std::vector<std::string> all;
  if (!p.large) {
    all = {matrix + "Backward"};
    if (convolution && !p.weights_in_backward) all.push_back(matrix + "WeightGradient");
  } else if (!backward) {
    add_convolutions(s, p, false, &all);
    if (attention) all.insert(all.end(), {"ChannelGates", "PoolChannels", "GateMap"});
    return all;
  } else {
    if (attention) all = {"ChannelGates", "PixelGradient", "ChannelGradient", "MlpBackward", "MapGradient"};
    if (convolution) {
      add_convolutions(s, p, true, &all);
      if (p.tiles) all.push_back("LargeWeightGradient");
      if (p.maps.matrix_tiles) all.push_back("LargeMatrixWeightGradient");
    }
  }
  all.push_back("Sums");
  return all;
}

// --- scratch ----------------------------------------------------------------------------------

// What decides on scratch beside the problem: whether a forward saves y, and of which parameters a backward has the
// gradients; a bias is the convolution's.
struct Wanted {
  bool save = true, parameters = true, bias = false;
};

// The room that a call has beside its tensors while it runs, in elements: y in the tensors' type, all others in float32
// or int32. Names are those of BlockArgs.
struct Scratch {
  int64_t y, tile_sums, tile_tops, tile_places;                  // large maps, forward
  int64_t gate, pooled;                                          // large maps
  int64_t grad_mean, grad_max, grad_pooled, grad_spatial, dots;  // large maps, backward
  int64_t dy;
  int64_t logit, hidden_sum, hidden_mean, hidden_max, spatial, channel_sums, weights;  // for parameters' gradients

  Scratch(const Sizes& s, const Plan& p, bool backward, const Wanted& wanted) : Scratch() {
    const int64_t n = s.batch, channels = n * s.out, pixels = n * s.pixels(), map = channels * s.pixels();
    const bool convolution = s.branch_count > 0, attention = s.hidden > 0;
    const int64_t blocks = p.large ? n * p.maps.pieces.count() : (n + p.images - 1) / p.images;
    if (p.large && attention) {
      gate = channels;
      pooled = 2 * pixels;
      if (!backward) {
        if (convolution && !wanted.save) y = map;
        tile_sums = tile_tops = tile_places = channels * p.maps.tiles.count();
      } else {
        grad_mean = grad_max = channels;
        grad_pooled = 2 * pixels;
        grad_spatial = pixels;
        dots = blocks * s.out;
        if (convolution) dy = map;
      }
    }
    if (!backward || !wanted.parameters) return;
    if (attention) {
      logit = channels;
      hidden_sum = hidden_mean = hidden_max = n * s.hidden;
      spatial = blocks * 2 * s.spatial_k * s.spatial_k;
      if (convolution && !p.weights_in_backward) dy = map;
    }
    if (convolution) weights = p.slices * first_sum(s, s.branch_count);
    if (wanted.bias) channel_sums = channels * (p.large ? p.maps.tiles.count() : 1);
  }

  int64_t bytes(const Sizes& s) const {
    const int64_t floats = tile_sums + tile_tops + tile_places + gate + pooled + grad_mean + grad_max + grad_pooled +
                           grad_spatial + dots + dy + logit + hidden_sum + hidden_mean + hidden_max + spatial +
                           channel_sums + weights;
    return 4 * floats + element_bytes(s.element) * y;
  }

 private:
  Scratch() = default;
};

// What the large-map kernels read beside the problem: their plan, scratch, and the maps of the launch. All in float32
// but what has an Element; null data: not there or not wanted.
struct LargeArgs {
  Cover tiles, pieces, weight_pieces, matrix_pieces;
  int matrix_tiles, matrix_buffers;
  int64_t matrix_slice;
  int reduce_parts;
  Units units;  // of this launch's direction
  bool backward;
  Map source, dest;  // of the convolution
  Element source_element;
  Map dy;  // gradient of y: what the convolutions' backward reads and that of the attention writes
  Element dy_element;
  float *tile_sums, *tile_tops;  // (N, tiles, channels)
  int32_t* tile_places;
  float *gate, *grad_mean, *grad_max;  // (N, out)
  float *pooled, *grad_pooled;         // (N, 2, H, W), maximum and mean
  float* grad_spatial;                 // (N, H, W), of the spatial gate's logit
  float* dots;                         // (N, pieces, out)
};

// What a launch gets: the problem, where its tensors are, and what the kernels read of the plan.
struct BlockArgs {
  Element element;
  Sizes sizes;
  Parameter conv_weights[kMaxBranches];                  // (out, in / groups, full_k, full_k)
  Parameter bias;                                        // (out)
  Parameter fc1_weight, fc1_bias, fc2_weight, fc2_bias;  // (hidden, out), (hidden), (out, hidden), (out)
  Parameter spatial_weight;                              // (1, 2, k, k), channels maximum and mean

  Map x, y, result;  // y: the convolution's output, null where nobody wants it; without a convolution result reads x
  Map grad_result, grad_x;
  // What the attention saves: (N, out) and (N, H, W), contiguous; null where nobody wants it.
  float *mean, *max, *spatial_gate;
  int32_t* max_index;      // first h * W + w of the maximum
  int32_t* channel_index;  // lowest channel of the maximum
  Gradients grads;

  // Of the plan, what the kernels read.
  int images, step, weights;
  Stages stages;
  int64_t blocks;  // of images, of large maps: pieces of images; the grid may be smaller
  bool weights_in_backward;
  int tiles, slices, pass_images, matrix_tiles, matrix_images;
  int64_t slice_images;
  int64_t bias_terms;  // vectors in grads.channel_sums
  int64_t outputs;     // of the last launch: elements of all parameters' gradients
  LargeArgs large;
};

}  // namespace mfef::cuda
