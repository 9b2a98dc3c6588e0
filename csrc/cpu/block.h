// One call of an operator on the CPU as plain data: what ops_cpu.cpp fills in from checked tensors and
// what the kernels of every instruction set read. No tensors, no standard library.
#pragma once

#include "common/types.h"

namespace mfef::cpu {

// Where the lanes of a vector come from.
enum class Plan : int {
  kImages = 0,  // one pixel of kLanes images: batches
  kPixels = 1,  // kLanes neighbouring pixels of one image: few images, large maps
};

// How a branch is convolved in the images plan.
enum class Convolution : int {
  kByShape = 0,
  kDirect = 1,  // taps times pixels
  kFft = 2,     // products of transforms, where there are transforms for the map; elsewhere direct
};

constexpr int kMaxBranches = 64;

struct Branch : BranchShape<int64_t> {
  const void* weights;  // (out, in / groups, full_k, full_k)
  int64_t weight_stride[4];

  // Set by choose(), for one direction. fft_size: side of the transforms of the forward or of the data gradient, 0
  // where that is direct. fft_gradient: the gradient of the weights comes from the same transforms.
  int fft_size;
  bool fft_gradient;
  int64_t packed_first;  // of its packed weights among those of all branches

  // Backward, set by lay_out(). by_channels: the weight gradient is computed after all units, from what they
  // leave in kept_x and kept_grad, into channel_sums; else unit by unit, into the slot's partial sums.
  bool by_channels;
  int64_t grad_first;  // of the sums: in channel_sums, or after PartialLayout's conv
  int64_t kept_x_first, kept_grad_first;
};

// Offsets of the parameters' gradients in one slot of partial sums, in elements of the compute type. Those of
// the convolutions are in the order in which they are computed (see conv/weight_gradient.h).
struct PartialLayout {
  int64_t conv, bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias, spatial;
  int64_t total;
};

// Memory of one unit of work from its first step to its last, and of a thread for one branch.
struct Scratch {
  void *unit, *branch;
};

// The steps of a unit: kWhole runs all of them. Where threads outnumber the units, each branch (by its number) is a
// step, in the forward before kAttention and in the backward after it.
constexpr int kWhole = -1;
constexpr int kAttention = kMaxBranches;

struct BlockArgs {
  Element element;
  Plan plan;
  Convolution convolution;
  bool staged;  // the steps of a unit are separate calls
  int64_t batch, in, out, height, width;

  // Convolution: absent when branch_count is 0 (then in == out). The compute type is float, or double
  // for double.
  bool split;
  int branch_count;
  Branch branches[kMaxBranches];
  const void* bias;       // (out) or null
  void* packed;           // forward tiles of the weights, written by pack()
  void* packed_backward;  // tiles of the flipped weights, written by pack()

  // Attention: absent when hidden is 0. All in the compute type, contiguous.
  int64_t hidden;
  int64_t spatial_k;
  const void *fc1_weight, *fc1_bias, *fc2_weight, *fc2_bias;  // biases may be null
  const void* spatial_weight;                                 // (2, k, k)

  Map x, y, result;         // y: the convolution's output; data null where nobody wants it
  Map grad_result, grad_x;  // backward; grad_x.data null where nobody wants it
  // What the attention saves, in the compute type: (N, C) and (N, H, W), contiguous.
  void *mean, *max, *spatial_gate;
  int32_t* max_index;      // (N, C): first h * W + w of the maximum
  int32_t* channel_index;  // (N, H, W): lowest channel of the maximum
  bool save;

  // Backward: the work is divided into `slots` runs of units; each has one set of partial sums.
  bool need_parameters;
  int64_t slots;
  PartialLayout partial;
  void* partials;
  // Of the branches whose weight gradient is computed after all units; sizes in elements.
  int64_t kept_x_elements, kept_grad_elements, channel_sum_elements;
  void *kept_x, *kept_grad, *channel_sums;
};

// The kernels of one instruction set.
struct Kernels {
  const char* name;
  int vector_bytes;
  // Chooses FFT or direct for each branch in one direction, by the shape alone. Returns the elements of the compute
  // type that `packed` or `packed_backward` needs.
  int64_t (*choose)(BlockArgs&, bool backward);
  // Packing of weights: how many tasks, and some of them.
  int64_t (*pack_tasks)(const BlockArgs&, bool backward);
  void (*pack)(const BlockArgs&, bool backward, int64_t task_begin, int64_t task_end);
  // Sets the places of the weights' gradients and the sizes of the buffers for them; returns the elements that the
  // convolutions need in a slot of partial sums.
  int64_t (*lay_out)(BlockArgs&);
  // The weight gradients that are computed after all units: how many tasks, and one of them.
  int64_t (*channel_tasks)(const BlockArgs&);
  void (*channel_task)(const BlockArgs&, int64_t task);
  // Writes the gradient of one group of a branch into a tensor of the shape of the branch's weights, of which the
  // inner k x k are written.
  void (*read_weight_grad)(const BlockArgs&, int branch, int64_t group, void* to, const int64_t stride[4]);
  // Number of independent units of work: blocks of images, or images.
  int64_t (*units)(const BlockArgs&);
  // Bytes of scratch.
  int64_t (*unit_scratch)(const BlockArgs&, bool backward);
  int64_t (*branch_scratch)(const BlockArgs&, bool backward);
  void (*forward)(const BlockArgs&, int64_t unit, int step, Scratch);
  void (*backward)(const BlockArgs&, int64_t slot, int step, Scratch);
  // Runs `iterations` rounds of independent multiply-adds in registers; returns the operations done.
  int64_t (*fma_chain)(int64_t iterations);
};

}  // namespace mfef::cpu
