// What the blocks of both plans ask of a branch: its shapes, the room that it needs, the gradient of the bias.
#pragma once

#include "cpu/attention.h"
#include "cpu/conv/fft.h"

namespace mfef::cpu::MFEF_ISA {

// Of the forward, or of the data gradient.
template <class T>
MFEF_INLINE ConvShape<T> branch_shape(const BlockArgs& a, const Branch& b, bool backward) {
  auto make = a.plan == Plan::kPixels ? pixels_shape<T> : b.fft_size ? fft_shape<T> : images_shape<T>;
  if (backward) return make(b.out, b.in, b.groups, b.k, a.height, a.width);
  ConvShape<T> shape = make(b.in, b.out, b.groups, b.k, a.height, a.width);
  // x and the weights are bfloat16; dy is not, so the gradients have no dot products.
  shape.dot = a.element == Element::kBFloat16 && a.plan == Plan::kImages && !b.fft_size && has_dot_tiles<T>(b.k);
  return shape;
}

// Of the weight gradient.
template <class T>
MFEF_INLINE ConvShape<T> gradient_shape(const BlockArgs& a, const Branch& b) {
  auto make = a.plan == Plan::kPixels ? pixels_shape<T> : b.fft_gradient ? fft_shape<T> : images_shape<T>;
  return make(b.in, b.out, b.groups, b.k, a.height, a.width);
}

// The largest of all branches, in elements except for the channels.
struct BranchExtents {
  int64_t channels = 0;  // of x or y
  int64_t padded = 0;    // a bordered map
  int64_t output = 0;    // a convolution's output
  int64_t scratch = 0;   // of FFTs and of the weight gradient
};
template <class T>
MFEF_INLINE BranchExtents branch_extents(const BlockArgs& a, bool backward) {
  BranchExtents e;
  for (int i = 0; i < a.branch_count; ++i) {
    const Branch& b = a.branches[i];
    const ConvShape<T> shape = branch_shape<T>(a, b, false);
    const int64_t widest = max(b.in, b.out);
    e.channels = max(e.channels, widest);
    e.output = max(e.output, widest * shape.out_channel);
    int64_t channel = backward ? gradient_shape<T>(a, b).channel : shape.channel;
    // Weight gradients by FFT are in part direct.
    if (b.fft_gradient) channel = images_shape<T>(b.in, b.out, b.groups, b.k, a.height, a.width).channel;
    e.padded = max(e.padded, widest * channel);
    if (b.fft_size) e.scratch = max(e.scratch, fft_scratch(shape, b.fft_size, b.fft_gradient));
    if (backward) e.scratch = max(e.scratch, weight_grad_scratch<T>(int(b.k)));
  }
  return e;
}

// grad: maps of `vectors` vectors, `step` elements apart.
template <class T>
void add_bias_gradient(const BlockArgs& a, const T* grad, int64_t vectors, int64_t step, T* partials) {
  for (int64_t c = 0; c < a.out; ++c) {
    Vec<T> sum[1] = {};
    sum_in_runs<T>(vectors, sum, [&](int64_t p, Vec<T>(&run)[1]) { run[0] += load(grad + c * step + p * kLanes<T>); });
    partials[a.partial.bias + c] += sum_of_lanes<T>(sum[0]);
  }
}

}  // namespace mfef::cpu::MFEF_ISA
