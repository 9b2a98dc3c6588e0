// One call of an operator on CUDA as plain data: what ops_cuda.cu fills in from checked tensors, what the
// planner reads and what the kernels get as their parameter. No tensors, no CUDA: module.cpp plans with it too.
#pragma once

#include "common/types.h"

namespace mfef::cuda {

constexpr int kSide = 8;  // rows and columns of a map that tensor cores take on the chip, and channels of a matrix
constexpr int kMaxBranches = 16;  // kernel parameters are copied for every launch

// A parameter with up to four dimensions, of the input's dtype. Null data: absent.
struct Parameter {
  const void* data;
  int64_t stride[4];
};

using Branch = BranchShape<int>;

// What the planner reads.
struct Sizes {
  Element element;
  bool tf32;  // float32 that convolutions may round to TF32 before they multiply
  int64_t batch;
  int in, out, height, width;
  bool split;
  int branch_count;  // 0: no convolution, and in == out
  Branch branches[kMaxBranches];
  int hidden;                   // 0: no attention
  int spatial_k, spatial_full;  // live taps per side of the spatial convolution, and all

  MFEF_HD int pixels() const { return height * width; }
  // Whether tensor cores take the elements: 16 bits, or float32 that may be rounded.
  MFEF_HD bool suit_tensor_cores() const { return element != Element::kFloat || tf32; }
  bool operator==(const Sizes&) const = default;
};

MFEF_HD int ceil_div(int a, int b) { return (a + b - 1) / b; }
MFEF_HD int least(int a, int b) { return a < b ? a : b; }
MFEF_HD int most(int a, int b) { return a > b ? a : b; }

// --- the directions of a branch ----------------------------------------------------------------

// Products that one register accumulates before its sum is added to the map: longer chains round more.
constexpr int kChain = 100;

// One direction of a branch: forward it goes from x to y, backward from the gradient of y to that of x.
struct Way {
  int source_first, source_per_group, dest_first, dest_per_group, groups, k;

  MFEF_HD Way(const Branch& b, bool backward)
      : source_first(backward ? b.out_first : b.in_first),
        source_per_group(backward ? b.out_per_group() : b.in_per_group()),
        dest_first(backward ? b.in_first : b.out_first),
        dest_per_group(backward ? b.in_per_group() : b.out_per_group()),
        groups(b.groups),
        k(b.k) {}

  MFEF_HD int dest() const { return groups * dest_per_group; }
  // Floats from tap to tap of the weights in shared memory; odd, so that neither order of access has conflicts.
  MFEF_HD int weight_step() const { return dest() | 1; }
  MFEF_HD int chain() const { return kChain / (k * k) > 1 ? kChain / (k * k) : 1; }
  // The way to `count` of its destination channels from `first` on, all of one group or those of whole groups.
  MFEF_HD Way part(int first, int count) const {
    Way way = *this;
    way.source_first += first / dest_per_group * source_per_group;
    way.dest_first += first;
    way.groups = most(count / dest_per_group, 1);
    way.dest_per_group = least(count, dest_per_group);
    return way;
  }
};

// Whether tensor cores compute a branch of a map on the chip (conv_matrices.cuh): 16-bit elements or TF32, groups that
// fill at least a matrix, and maps whose rows and columns are those of the matrices. Narrower groups would be mostly
// zeros.
MFEF_HD bool by_matrices(const Sizes& s, const Branch& b) {
  return s.suit_tensor_cores() && s.width > kSide / 2 && s.width <= kSide && s.height <= kSide &&
         (b.k == 3 || b.k == 5 || b.k == 7 || b.k == 9) && b.in_per_group() >= kSide && b.out_per_group() >= kSide;
}

// A direction of such a branch. Groups are filled up to whole matrices. A word has two 16-bit source channels, or one
// in TF32; four words are a chunk.
struct MatrixWay {
  bool tf32;
  int groups, k, source_first, source_per_group, dest_per_group;
  int sources, dests;  // of a group, filled up

  MFEF_HD static int filled(int n) { return ceil_div(n, kSide) * kSide; }
  MFEF_HD MatrixWay(const Sizes& s, const Branch& b, bool backward)
      : tf32(s.tf32),
        groups(b.groups),
        k(b.k),
        source_first(backward ? b.out_first : b.in_first),
        source_per_group(backward ? b.out_per_group() : b.in_per_group()),
        dest_per_group(backward ? b.in_per_group() : b.out_per_group()),
        sources(filled(source_per_group)),
        dests(filled(dest_per_group)) {}

  // What a stage is cut by: the taps above one another of a chunk, in the order (chunk, kx).
  MFEF_HD int columns() const { return sources / (tf32 ? 4 : 8) * k; }
  // A stage has whole chains of columns. In TF32 a register accumulates one before its sum is added to the map's; of
  // 16-bit elements, which the result is rounded to, all of a stage.
  MFEF_HD static constexpr int tf32_chain(int k) { return kChain / (4 * k); }
  MFEF_HD int chain() const { return tf32 ? tf32_chain(k) : 1; }
  // The source channel of a word, or the first. In TF32 a chunk is every second one of 8: as the map has them in shared
  // memory, 8 pixels of 4 such channels are all banks.
  MFEF_HD static int source(bool tf32, int word) {
    return tf32 ? word / 8 * 8 + word % 4 * 2 + word / 4 % 2 : 2 * word;
  }
  MFEF_HD int tiles() const { return groups * (dests / 8); }  // of 8 destination channels
  // Words from tap to tap and from column to column of the weights in shared memory, [column][ky][dest][source]. What
  // tensor cores read of a tap are 32 neighbours; neighbours that write are at neighbouring taps, or sources of one,
  // and by these steps fewest of them write to the same bank.
  MFEF_HD int tap_step() const { return tiles() * 32 + (k == 3 ? 3 : 1); }
  MFEF_HD int column_step() const { return k * tap_step() + (k >= 7 ? 16 : 0); }

  // Channels of the sources' copy that the branches before `branch` have; all of them: `branch_count`. TF32 has none:
  // the map itself is rounded.
  MFEF_HD static int first(const Sizes& s, bool backward, int branch) {
    int channels = 0;
    for (int b = 0; b < branch; ++b) {
      const MatrixWay way(s, s.branches[b], backward);
      if (by_matrices(s, s.branches[b]) && !s.tf32) channels += way.groups * way.sources;
    }
    return channels;
  }
  // Words from pixel to pixel of the copy: 4 more than a multiple of 8, so that 8 neighbours read all banks.
  MFEF_HD static int pixel_step(const Sizes& s, bool backward) {
    const int words = first(s, backward, s.branch_count) / 2;
    return words ? words / 4 % 2 ? words : words + 4 : 0;
  }
};

// Whether several branches write the same channels: the gradient of x in pyramid mode is a sum over branches.
MFEF_HD bool summed(const Sizes& s, bool backward) { return backward && !s.split; }

// What a backward leaves for its last launch, and that launch writes. All in float32; null data: not wanted.
struct Gradients {
  float* dy;  // (N, out, H * W): what the weight gradient reads where the gradient of y is not given
  float *logit, *hidden_sum, *hidden_mean, *hidden_max;  // (N, out), (N, hidden) three times
  float* spatial;                                        // (blocks of images, 2, live taps)
  float* channel_sums;                                   // (bias_terms, out), for the gradient of the bias
  float* weights;                                        // (slices, live taps of all branches)
  Parameter branches[kMaxBranches], bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias, spatial_weight;
};

}  // namespace mfef::cuda
