// The pixels plan: one image at a time through the whole operator, lanes over neighbouring pixels.
// It serves single images, small batches, and maps so large that a block of images leaves the caches.
#pragma once

#include "cpu/branch.h"

namespace mfef::cpu::MFEF_ISA {

template <class T>
struct BlockPixels {
  const BlockArgs& args;
  int64_t pixels, row;
  T *x, *y, *grad, *padded, *padded_grad, *raw, *sums;
  T* total;  // dx summed over branches that share their input
  Carver carver, branch_carver;
  AttentionPixels<T> attention;

  BlockPixels(const BlockArgs& a, Scratch scratch, bool backward)
      : args(a),
        pixels(a.height * a.width),
        row(round_up(pixels, kLanes<T>)),
        carver{static_cast<char*>(scratch.unit)},
        branch_carver{static_cast<char*>(scratch.branch)},
        attention(a, carver, backward) {
    const BranchExtents most = branch_extents<T>(a, backward);
    carver.take(a.out * row, y);
    branch_carver.take((a.split ? most.channels : a.in) * row, x);
    branch_carver.take(most.padded, padded);
    branch_carver.take(most.output, raw);
    if (!backward) return;
    carver.take(a.out * row, grad);
    branch_carver.take(most.padded, padded_grad);
    branch_carver.take(most.scratch, sums);
    branch_carver.take(a.split ? 0 : a.in * row, total);
  }

  template <class E>
  void pack(const Map& from, int64_t image, int64_t first, int64_t channels, T* to) {
    pack_pixels<E, T>(from, image, first, channels, args.height, args.width, to, row);
    if (row == pixels) return;
    for (int64_t c = 0; c < channels; ++c) {
      for (int64_t p = pixels; p < row; ++p) to[c * row + p] = T(0);
    }
  }
  template <class E>
  void unpack(const Map& to, int64_t image, int64_t first, int64_t channels, const T* from) {
    unpack_pixels<E, T>(to, image, first, channels, args.height, args.width, from, row);
  }

  template <class E>
  void forward(int64_t image, int step) {
    constexpr int L = kLanes<T>;
    if (step == kWhole && args.branch_count == 0) {
      pack<E>(args.x, image, 0, args.in, y);
    } else if (step == kWhole && !args.split) {
      pack<E>(args.x, image, 0, args.in, x);
    }
    for (int i = 0; i < args.branch_count; ++i) {
      if (step == kWhole || step == i) forward_branch<E>(args.branches[i], image);
    }
    if (step != kWhole && step != kAttention) return;
    if (args.y.data) unpack<E>(args.y, image, 0, args.out, y);
    if (args.hidden) {
      if (args.branch_count == 0) attention.pool_pixels(y, 0, args.out, false);
      attention.forward(y, false);
      if (args.save) attention.save(image, 1);
      for (int64_t c = 0; c < args.out; ++c) {
        const Vec<T> g = splat(attention.gate[c]);
        for (int64_t p = 0; p < row; p += L) {
          T* e = y + c * row + p;
          store(e, load(e) * g * load(attention.spatial_gate + p));
        }
      }
    }
    unpack<E>(args.result, image, 0, args.out, y);
  }

  template <class E>
  void forward_branch(const Branch& b, int64_t image) {
    const ConvShape<T> shape = branch_shape<T>(args, b, false);
    if (args.split) pack<E>(args.x, image, b.in_first, b.in, x);
    pad_pixels(shape, b.in, x, row, padded);
    const T* bias = static_cast<const T*>(args.bias);
    convolve_direct<T>(shape, padded, static_cast<const T*>(args.packed) + b.packed_first,
                       bias ? bias + b.out_first : nullptr, false, raw);
    unpad_pixels(shape, b.out, raw, y + b.out_first * row, row);
    if (args.hidden) attention.pool_pixels(y, b.out_first, b.out_first + b.out, false);
  }

  template <class E>
  void backward(int64_t image, int step, T* partials) {
    if (step == kWhole || step == kAttention) backward_attention<E>(image, partials);
    if (step == kAttention || args.branch_count == 0) return;
    if (!args.split && args.need_parameters) pack<E>(args.x, image, 0, args.in, x);
    for (int i = 0; i < args.branch_count; ++i) {
      if (step == kWhole || step == i) backward_branch<E>(args.branches[i], image, i == 0, partials);
    }
    if (!args.split && args.grad_x.data) unpack<E>(args.grad_x, image, 0, args.in, total);
  }

  // Turns the gradient of the result into dy, in `grad`.
  template <class E>
  void backward_attention(int64_t image, T* partials) {
    pack<E>(args.grad_result, image, 0, args.out, grad);
    if (args.hidden) {
      pack<E>(args.y, image, 0, args.out, y);
      attention.restore(image, 1);
      attention.backward(y, grad, image, 1, partials);
      PixelLanes<T>::finish_backward(attention, grad);
    }
    if (args.branch_count == 0) {
      if (args.grad_x.data) unpack<E>(args.grad_x, image, 0, args.in, grad);
      return;
    }
    if (args.bias && args.need_parameters) add_bias_gradient(args, grad, row / kLanes<T>, row, partials);
  }

  template <class E>
  void backward_branch(const Branch& b, int64_t image, bool first, T* partials) {
    const ConvShape<T> shape = branch_shape<T>(args, b, true);
    pad_pixels(shape, b.out, grad + b.out_first * row, row, padded_grad);
    if (args.need_parameters) {
      const ConvShape<T> forward_shape = branch_shape<T>(args, b, false);
      if (args.split) pack<E>(args.x, image, b.in_first, b.in, x);
      pad_pixels(forward_shape, b.in, x, row, padded);
      weight_grad_direct<T>(forward_shape, padded, padded_grad + shape.lead, shape.channel,
                            partials + args.partial.conv + b.grad_first, sums);
    }
    if (!args.grad_x.data) return;
    convolve_direct<T>(shape, padded_grad, static_cast<const T*>(args.packed_backward) + b.packed_first, nullptr, false,
                       raw);
    if (args.split) {
      unpad_pixels(shape, b.in, raw, x, row);
      unpack<E>(args.grad_x, image, b.in_first, b.in, x);
    } else if (first) {
      unpad_pixels(shape, b.in, raw, total, row);
    } else {
      unpad_pixels(shape, b.in, raw, padded, row);
      add_scaled(total, padded, T(1), b.in * row);
    }
  }
};

}  // namespace mfef::cpu::MFEF_ISA
