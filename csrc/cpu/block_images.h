// The images plan: kLanes images at a time through the whole operator, everything between load and store in a thread's
// scratch.
//
// Forward, per block of images: branch by branch pack x (transposition into lanes), convolve, save y, pool over pixels;
// then MLP and gates, and unpack. Reads x once, writes the result once, and y once if it is saved.
// Backward: attention on (y, grad); then branch by branch the rest of dy, pack x, weight gradient, data gradient,
// unpack.
#pragma once

#include "cpu/branch.h"

namespace mfef::cpu::MFEF_ISA {

template <class T>
struct BlockImages {
  static constexpr int L = kLanes<T>;
  const BlockArgs& args;
  int64_t pixels;
  int64_t step;     // from channel to channel of a map, in elements
  bool branchwise;  // x holds one branch's channels at a time
  T *x, *y, *grad, *padded, *padded_grad, *sums;
  Carver carver, branch_carver;
  AttentionImages<T> attention;
  int64_t image = 0;  // the first of this unit
  int images = 0;

  BlockImages(const BlockArgs& a, Scratch scratch, bool backward)
      : args(a),
        pixels(a.height * a.width),
        step(channel_vectors(pixels) * L),
        carver{static_cast<char*>(scratch.unit)},
        branch_carver{static_cast<char*>(scratch.branch)},
        attention(a, carver, backward) {
    const BranchExtents most = branch_extents<T>(a, backward);
    // Branches that read all channels need the whole of x. So does channels_last where a branch has less than two cache
    // lines of a pixel. Otherwise packing one branch at a time keeps its channels in the cache.
    const int64_t piece = most.channels * element_bytes(a.element);
    branchwise = a.split && (a.staged || !(is_channels_last(a.x) && piece < 128));
    carver.take(a.out * step, y);
    branch_carver.take((branchwise ? most.channels : a.in) * step, x);
    branch_carver.take(most.padded, padded);
    branch_carver.take(most.scratch, sums);
    if (!backward) return;
    carver.take(a.out * step, grad);
    branch_carver.take(most.padded, padded_grad);
  }

  void set_unit(int64_t unit) {
    image = unit * L;
    images = int(min<int64_t>(L, args.batch - image));
  }

  template <class E>
  void pack(const Map& from, int64_t first, int64_t channels, T* to) {
    pack_images<E, T>(from, image, images, first, channels, args.height, args.width, step, to);
  }
  template <class E>
  void pack_bordered(const ConvShape<T>& shape, const Map& from, int64_t first, int64_t channels, T* to) {
    zero_borders(shape, channels, to);
    pack_images<E, T>(from, image, images, first, channels, args.height, args.width, shape.channel, to + shape.lead,
                      shape.pitch - shape.width);
  }
  template <class E, class Value>
  void unpack(const Map& to, int64_t first, int64_t channels, const Value& value) {
    unpack_images<E, T>(to, image, images, first, channels, args.height, args.width, value);
  }
  // The values of `maps`, channels step apart.
  auto values(const T* maps) const {
    return [maps, step = step](int64_t c, int64_t p) { return load(maps + c * step + p * L); };
  }

  T* branch_x(const Branch& b) { return branchwise ? x : x + b.in_first * step; }
  T* branch_dy(const Branch& b) { return grad + b.out_first * step; }
  const T* packed(const Branch& b, bool backward) const {
    return static_cast<const T*>(backward ? args.packed_backward : args.packed) + b.packed_first;
  }
  template <class E>
  FftConvolution<T, E> fft(const Branch& b, bool backward) const {
    const ConvShape<T> shape = branch_shape<T>(args, b, backward);
    return {shape, *fft_table<T>(args.height, b.k), backward, {shape, backward, b}, packed(b, backward)};
  }

  template <class E>
  void forward(int64_t unit, int at_step) {
    set_unit(unit);
    if (at_step == kWhole && (args.branch_count == 0 || !branchwise)) {
      pack<E>(args.x, 0, args.in, args.branch_count ? x : y);
    }
    bool any_fft = false;
    for (int i = 0; i < args.branch_count; ++i) {
      if (at_step == kWhole || at_step == i) forward_branch<E>(args.branches[i]);
      any_fft |= args.branches[i].fft_size != 0;
    }
    if (at_step != kWhole && at_step != kAttention) return;
    if (!branchwise) unpack_y<E>(0, args.out);
    if (!args.hidden) return;
    if (args.branch_count == 0) attention.pool_pixels(y, 0, args.out, false);
    attention.forward(y, any_fft);
    if (args.save) attention.save(image, images);
    unpack<E>(args.result, 0, args.out, [&](int64_t c, int64_t p) {
      return load(y + c * step + p * L) * load(attention.gate + c * L) * load(attention.spatial_gate + p * L);
    });
  }

  template <class E>
  void forward_branch(const Branch& b) {
    const ConvShape<T> shape = branch_shape<T>(args, b, false);
    const T* input = conv_input<E>(b, shape);
    const T* bias = static_cast<const T*>(args.bias);
    if (bias) bias += b.out_first;
    T* to = y + b.out_first * step;
    if (b.fft_size) {
      T* tolerance = args.hidden && attention.needs_argmax() ? attention.tolerance + b.out_first * L : nullptr;
      fft<E>(b, false).run(input, bias, false, to, tolerance, sums);
    } else {
      if constexpr (sizeof(T) == sizeof(float)) {
        if (shape.dot) {
          pair_pixels(shape, b.in, input, padded);
          input = padded;
        }
      }
      convolve_direct<T>(shape, input, packed(b, false), bias, false, to);
    }
    // The branch's y is still in the cache.
    if (branchwise) unpack_y<E>(b.out_first, b.out);
    if (args.hidden) attention.pool_pixels(y, b.out_first, b.out_first + b.out, b.fft_size != 0);
  }

  // The convolution's output to where it is wanted: saved for the backward, or the result itself.
  template <class E>
  void unpack_y(int64_t first, int64_t channels) {
    if (args.y.data) unpack<E>(args.y, first, channels, values(y + first * step));
    if (!args.hidden && args.result.data) unpack<E>(args.result, first, channels, values(y + first * step));
  }

  template <class E>
  void backward(int64_t unit, int at_step, T* partials) {
    set_unit(unit);
    if (at_step == kWhole || at_step == kAttention) backward_attention<E>(partials);
    if (at_step == kAttention || args.branch_count == 0) return;
    if (!branchwise && args.need_parameters) pack<E>(args.x, 0, args.in, x);
    // With all channels in every branch, dx is a sum over branches: weight gradients first, then dx in the place of x.
    for (int i = 0; i < args.branch_count; ++i) {
      if (at_step != kWhole && at_step != i) continue;
      const Branch& b = args.branches[i];
      const bool data = args.split && args.grad_x.data;
      if (b.fft_gradient && args.need_parameters) {
        fft_gradients<E>(b, partials, data);
        continue;
      }
      if (args.need_parameters) weight_gradient<E>(b, unit, partials);
      if (!data) continue;
      if (!args.need_parameters) finish_dy(b, true);
      data_gradient<E>(b, false);
    }
    if (!args.grad_x.data) return;
    for (int i = 0; i < args.branch_count && !args.split; ++i) {
      finish_dy(args.branches[i], !args.need_parameters);
      data_gradient<E>(args.branches[i], i > 0);
    }
    if (!branchwise) unpack<E>(args.grad_x, 0, args.in, values(x));
  }

  // Turns the gradient of the result into dy, in `grad`, except for finish_dy().
  template <class E>
  void backward_attention(T* partials) {
    pack<E>(args.grad_result, 0, args.out, grad);
    if (args.hidden) {
      pack<E>(args.y, 0, args.out, y);
      attention.restore(image, images);
      attention.backward(y, grad, image, images, partials);
    }
    if (args.branch_count == 0) {
      if (args.hidden) ImageLanes<T>::finish_backward(attention, grad, 0, args.out, images, grad, step, 0);
      if (args.grad_x.data) unpack<E>(args.grad_x, 0, args.in, values(grad));
    }
    if (args.bias && args.need_parameters) add_bias_gradient(args, grad, pixels, step, partials);
  }

  template <class E>
  void weight_gradient(const Branch& b, int64_t unit, T* partials) {
    const ConvShape<T> shape = gradient_shape<T>(args, b);
    finish_dy(b, true);
    if (b.by_channels) {
      if (branchwise) pack<E>(args.x, b.in_first, b.in, x);
      keep(b, shape, unit);
      return;
    }
    const T* input = conv_input<E>(b, shape);
    T* to = partials + args.partial.conv + b.grad_first;
    if (!shape.bordered()) {
      weight_grad_direct<T>(shape, input, branch_dy(b), step, to, sums);
    } else {
      weight_grad_direct<T>(shape, input, padded_grad + shape.lead, shape.channel, to, sums, shape.pitch - shape.width);
    }
  }

  // The gradient of the weights and, if asked for, of x, by FFT.
  template <class E>
  void fft_gradients(const Branch& b, T* partials, bool data) {
    finish_dy(b, true);
    const ConvShape<T> shape = gradient_shape<T>(args, b);
    conv_input<E>(b, shape);
    const FftConvolution<T, E> back = fft<E>(b, true);
    const FftGradients<T> gradients{
        shape, back.table, images, padded, padded_grad, partials + args.partial.conv + b.grad_first, sums};
    gradients.run(branch_x(b), branch_dy(b), data ? &back : nullptr);
    if (data && branchwise) unpack<E>(args.grad_x, b.in_first, b.in, values(x));
  }

  // x of a branch as its convolution reads it.
  template <class E>
  const T* conv_input(const Branch& b, const ConvShape<T>& shape) {
    if (!shape.bordered()) {
      if (branchwise) pack<E>(args.x, b.in_first, b.in, x);
      return branch_x(b);
    }
    if (branchwise) {
      pack_bordered<E>(shape, args.x, b.in_first, b.in, padded);
    } else {
      pad_images(shape, b.in, branch_x(b), padded);
    }
    return padded;
  }

  // dy of a branch as the gradients of its convolution read it: in `grad`, or with borders in `padded_grad`, which
  // holds one branch at a time; both where the data gradient is by FFT and the weight gradient needs borders. first:
  // the first time for this branch.
  void finish_dy(const Branch& b, bool first) {
    const ConvShape<T> shape = images_shape<T>(b.out, b.in, b.groups, b.k, args.height, args.width);
    const int64_t end = b.out_first + b.out;
    if (!shape.bordered() || b.by_channels || b.fft_size) {
      if (args.hidden && first)
        ImageLanes<T>::finish_backward(attention, grad, b.out_first, end, images, branch_dy(b), step, 0);
      const bool direct = !b.fft_size || (first && args.need_parameters && !b.fft_gradient);
      if (shape.bordered() && direct) pad_images(shape, b.out, branch_dy(b), padded_grad);
    } else if (args.hidden) {
      zero_borders(shape, b.out, padded_grad);
      ImageLanes<T>::finish_backward(attention, grad, b.out_first, end, images, padded_grad + shape.lead, shape.channel,
                                     shape.pitch - shape.width);
    } else {
      pad_images(shape, b.out, branch_dy(b), padded_grad);
    }
  }

  // Leaves x and dy of a branch for the weight gradient after all units.
  void keep(const Branch& b, const ConvShape<T>& shape, int64_t unit) {
    const T* from = branch_x(b);
    T* to = static_cast<T*>(args.kept_x) + b.kept_x_first + unit * b.in * shape.channel;
    if (shape.bordered()) {
      pad_images(shape, b.in, from, to);
    } else {
      for (int64_t i = 0; i < b.in * shape.channel; i += L) store(to + i, load(from + i));
    }
    channels_to_lanes<T>(
        branch_dy(b), b.out, pixels, step,
        static_cast<T*>(args.kept_grad) + b.kept_grad_first + unit * L * pixels * channel_row<T>(b.out));
  }

  // After finish_dy().
  template <class E>
  void data_gradient(const Branch& b, bool accumulate) {
    const ConvShape<T> shape = branch_shape<T>(args, b, true);
    const T* input = shape.bordered() ? padded_grad : branch_dy(b);
    if (b.fft_size) {
      fft<E>(b, true).run(input, nullptr, accumulate, branch_x(b), nullptr, sums);
    } else {
      convolve_direct<T>(shape, input, packed(b, true), nullptr, accumulate, branch_x(b));
    }
    if (branchwise) unpack<E>(args.grad_x, b.in_first, b.in, values(x));
  }
};

}  // namespace mfef::cpu::MFEF_ISA
