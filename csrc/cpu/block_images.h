// The images plan: kLanes images at a time through the whole operator, everything between load and
// store in a thread's scratch.
//
// Forward, per block of images: branch by branch pack x (transposition into lanes), convolve, save y, pool over
// pixels; then MLP and gates, and unpack. Reads x once, writes the result once, and y once if it is saved.
// Backward: attention on (y, grad); then branch by branch the rest of dy, pack x, weight gradient, data gradient,
// unpack.
#pragma once

#include "attention.h"
#include "conv_fourier.h"

namespace mfef::cpu::MFEF_ISA {

template <class T>
MFEF_INLINE ConvMap<T> branch_map(const BlockArgs& a, const Branch& b, bool backward) {
  auto make = a.plan == Plan::kPixels ? pixels_map<T> : b.spectrum ? spectra_map<T> : images_map<T>;
  if (backward) return make(b.out, b.in, b.groups, b.k, a.height, a.width);
  ConvMap<T> map = make(b.in, b.out, b.groups, b.k, a.height, a.width);
  // x and the weights are bfloat16; dy is not, so the gradients have no dot products.
  map.dot = a.element == Element::kBFloat16 && a.plan == Plan::kImages && !b.spectrum && has_dot_tiles<T>(b.k);
  return map;
}

// That of the weight gradient.
template <class T>
MFEF_INLINE ConvMap<T> gradient_map(const BlockArgs& a, const Branch& b) {
  auto make = a.plan == Plan::kPixels ? pixels_map<T> : b.spectral_weights ? spectra_map<T> : images_map<T>;
  return make(b.in, b.out, b.groups, b.k, a.height, a.width);
}

// Widest branch, in channels; longest bordered map, and what the weight gradient and spectra need, in elements.
template <class T>
MFEF_INLINE void branch_extents(const BlockArgs& a, bool backward, int64_t* channels, int64_t* padded, int64_t* outputs,
                                int64_t* sums) {
  *channels = *padded = *outputs = *sums = 0;
  for (int i = 0; i < a.branch_count; ++i) {
    const Branch& b = a.branches[i];
    const ConvMap<T> map = branch_map<T>(a, b, false);
    const int64_t widest = most(b.in, b.out);
    *channels = most(*channels, widest);
    // Weight gradients by way of spectra are in part direct.
    const int64_t bordered = images_map<T>(b.in, b.out, b.groups, b.k, a.height, a.width).channel;
    *padded = most(*padded, widest * (b.spectral_weights ? bordered
                                      : backward         ? gradient_map<T>(a, b).channel
                                                         : map.channel));
    *outputs = most(*outputs, widest * map.out_channel);
    if (b.spectrum) *sums = most(*sums, fourier_scratch(map, b.spectrum, b.spectral_weights));
    if (backward) *sums = most(*sums, weight_grad_scratch<T>(int(b.k)));
  }
}

template <class T>
struct BlockImages {
  const BlockArgs& args;
  int64_t pixels;
  int64_t step;     // from channel to channel of a map, in elements
  bool branchwise;  // x holds one branch's channels at a time
  T *x, *y, *grad, *padded, *padded_grad, *sums;
  Carver carver, branch_carver;
  AttentionImages<T> attention;

  BlockImages(const BlockArgs& a, Scratch scratch, bool backward)
      : args(a),
        pixels(a.height * a.width),
        step(channel_vectors(pixels) * kLanes<T>),
        carver{static_cast<char*>(scratch.unit)},
        branch_carver{static_cast<char*>(scratch.branch)},
        attention(a, carver, backward) {
    int64_t channels, longest, outputs, sums_count;
    branch_extents<T>(a, backward, &channels, &longest, &outputs, &sums_count);
    // All channels in every branch need x whole. So does channels_last where a branch is less than two cache lines
    // of a pixel; else one branch's channels at a time stay nearer.
    const int64_t piece = channels * element_bytes(a.element);
    branchwise = a.split && (a.staged || !(is_channels_last(a.x) && piece < 128));
    y = carver.take<T>(a.out * step);
    x = branch_carver.take<T>((branchwise ? channels : a.in) * step);
    padded = branch_carver.take<T>(longest);
    sums = branch_carver.take<T>(sums_count);
    if (!backward) return;
    grad = carver.take<T>(a.out * step);
    padded_grad = branch_carver.take<T>(longest);
  }

  template <class E>
  void forward(int64_t unit, int at_step) {
    constexpr int L = kLanes<T>;
    const int64_t image = unit * L;
    const int images = int(least<int64_t>(L, args.batch - image));
    if (at_step == kWhole && args.branch_count == 0) {
      pack_images<E, T>(args.x, image, images, 0, args.in, args.height, args.width, step, y);
    } else if (at_step == kWhole && !branchwise) {
      pack_images<E, T>(args.x, image, images, 0, args.in, args.height, args.width, step, x);
    }
    for (int i = 0; i < args.branch_count; ++i) {
      if (at_step == kWhole || at_step == i) forward_branch<E>(args.branches[i], image, images);
    }
    if (at_step != kWhole && at_step != kAttention) return;
    if (!branchwise) unpack_y<E>(image, images, 0, args.out);
    if (!args.hidden) return;
    if (args.branch_count == 0) attention.template pool_pixels<false>(y, 0, args.out);
    attention.forward(y, any_spectra());
    if (args.save) attention.save(image, images);
    unpack_images<E, T>(args.result, image, images, 0, args.out, args.height, args.width, [&](int64_t c, int64_t p) {
      return load(y + c * step + p * L) * load(attention.gate + c * L) * load(attention.spatial_gate + p * L);
    });
  }

  template <class E>
  void forward_branch(const Branch& b, int64_t image, int images) {
    const ConvMap<T> map = branch_map<T>(args, b, false);
    const T* input = conv_input<E>(b, map, image, images);
    const T* bias = static_cast<const T*>(args.bias);
    if (bias) bias += b.out_first;
    const T* packed = static_cast<const T*>(args.packed) + b.packed_first;
    T* to = y + b.out_first * step;
    if (b.spectrum) {
      T* slack = args.hidden ? attention.tolerance + b.out_first * kLanes<T> : nullptr;
      fourier_map<T, false>(map, table(b), input, packed, static_cast<const E*>(b.weights), b.full_k, b.weight_stride,
                            bias, false, to, slack, sums);
    } else {
      if constexpr (sizeof(T) == sizeof(float)) {
        if (map.dot) {
          pair_pixels(map, b.in, input, padded);
          input = padded;
        }
      }
      conv_map<T>(map, input, packed, bias, false, to);
    }
    // While the branch's y is still near.
    if (branchwise) unpack_y<E>(image, images, b.out_first, b.out);
    if (args.hidden && b.spectrum) attention.template pool_pixels<true>(y, b.out_first, b.out_first + b.out);
    if (args.hidden && !b.spectrum) attention.template pool_pixels<false>(y, b.out_first, b.out_first + b.out);
  }

  // The convolution's output to where it is wanted: saved for the backward, or the result itself.
  template <class E>
  void unpack_y(int64_t image, int images, int64_t first, int64_t channels) {
    auto value = [&](int64_t c, int64_t p) { return load(y + (first + c) * step + p * kLanes<T>); };
    const Map* const maps[] = {&args.y, args.hidden ? nullptr : &args.result};
    for (const Map* to : maps) {
      if (to && to->data) unpack_images<E, T>(*to, image, images, first, channels, args.height, args.width, value);
    }
  }

  template <class E>
  void backward(int64_t unit, int at_step, T* partials) {
    const int64_t image = unit * kLanes<T>;
    const int images = int(least<int64_t>(kLanes<T>, args.batch - image));
    if (at_step == kWhole || at_step == kAttention) backward_attention<E>(image, images, partials);
    if (at_step == kAttention || args.branch_count == 0) return;
    if (!branchwise && args.need_parameters) {
      pack_images<E, T>(args.x, image, images, 0, args.in, args.height, args.width, step, x);
    }
    // With all channels in every branch, dx is a sum over branches: weight gradients first, then dx in
    // the place of x.
    for (int i = 0; i < args.branch_count; ++i) {
      if (at_step != kWhole && at_step != i) continue;
      const Branch& b = args.branches[i];
      const bool data = args.split && args.grad_x.data;
      if (b.spectral_weights && args.need_parameters) {
        spectral_gradients<E>(b, image, images, partials, data);
        continue;
      }
      if (args.need_parameters) weight_gradient<E>(b, unit, image, images, partials);
      if (!data) continue;
      if (!args.need_parameters) finish(b, images, true);
      data_gradient<E>(b, image, images, false);
    }
    if (!args.grad_x.data) return;
    for (int i = 0; i < args.branch_count && !args.split; ++i) {
      const Branch& b = args.branches[i];
      finish(b, images, !args.need_parameters);
      data_gradient<E>(b, image, images, i > 0);
    }
    if (!branchwise) unpack_grad_x<E>(image, images, 0, args.in);
  }

  // From the result's gradient to dy, except for finish().
  template <class E>
  void backward_attention(int64_t image, int images, T* partials) {
    constexpr int L = kLanes<T>;
    pack_images<E, T>(args.grad_result, image, images, 0, args.out, args.height, args.width, step, grad);
    if (args.hidden) {
      pack_images<E, T>(args.y, image, images, 0, args.out, args.height, args.width, step, y);
      attention.restore(image, images);
      attention.backward(y, grad, image, images, partials);
    }
    if (args.branch_count == 0) {
      if (args.hidden) attention.finish_backward(grad, 0, args.out, images, grad, step, 0);
      if (args.grad_x.data) {
        unpack_images<E, T>(args.grad_x, image, images, 0, args.in, args.height, args.width,
                            [&](int64_t c, int64_t p) { return load(grad + c * step + p * L); });
      }
    }
    if (args.bias && args.need_parameters) {
      for (int64_t c = 0; c < args.out; ++c) {
        Vec<T> sum{};
        for (int64_t p0 = 0; p0 < pixels; p0 += kRun) {
          Vec<T> run{};
          for (int64_t p = p0; p < least(p0 + kRun, pixels); ++p) run += load(grad + c * step + p * L);
          sum += run;
        }
        partials[args.partial.bias + c] += sum_of_lanes<T>(sum);
      }
    }
  }

  template <class E>
  void weight_gradient(const Branch& b, int64_t unit, int64_t image, int images, T* partials) {
    const ConvMap<T> map = gradient_map<T>(args, b);
    finish(b, images, true);
    if (b.by_channels) {
      if (branchwise) pack_images<E, T>(args.x, image, images, b.in_first, b.in, args.height, args.width, step, x);
      keep(b, map, unit);
      return;
    }
    const T* input = conv_input<E>(b, map, image, images);
    T* to = partials + args.partial.conv + b.grad_first;
    if (!map.bordered()) {
      weight_grad_map<T>(map, input, grad + b.out_first * step, step, to, sums);
    } else {
      weight_grad_map<T>(map, input, padded_grad + map.lead, map.channel, to, sums, map.pitch - map.width);
    }
  }

  // The gradient of the weights and, if asked for, of x, by way of spectra.
  template <class E>
  void spectral_gradients(const Branch& b, int64_t image, int images, T* partials, bool data) {
    finish(b, images, true);
    conv_input<E>(b, gradient_map<T>(args, b), image, images);
    fourier_gradients(gradient_map<T>(args, b), branch_map<T>(args, b, true), table(b), images, branch_x(b),
                      grad + b.out_first * step, partials + args.partial.conv + b.grad_first,
                      data ? static_cast<const T*>(args.packed_backward) + b.packed_first : nullptr,
                      static_cast<const E*>(b.weights), b.full_k, b.weight_stride, padded, padded_grad, sums);
    if (data && branchwise) unpack_grad_x<E>(image, images, b.in_first, b.in);
  }

  bool any_spectra() const {
    for (int i = 0; i < args.branch_count; ++i) {
      if (args.branches[i].spectrum) return true;
    }
    return false;
  }

  const DftTable<T>& table(const Branch& b) { return *dft_table<T>(args.height, b.k); }

  T* branch_x(const Branch& b) { return branchwise ? x : x + b.in_first * step; }

  // x of a branch as its convolution reads it.
  template <class E>
  const T* conv_input(const Branch& b, const ConvMap<T>& map, int64_t image, int images) {
    if (!map.bordered()) {
      if (branchwise) pack_images<E, T>(args.x, image, images, b.in_first, b.in, args.height, args.width, step, x);
      return branch_x(b);
    }
    if (branchwise) {
      zero_borders(map, b.in, padded);
      pack_images<E, T>(args.x, image, images, b.in_first, b.in, args.height, args.width, map.channel,
                        padded + map.lead, map.pitch - map.width);
    } else {
      pad_images(map, b.in, branch_x(b), padded);
    }
    return padded;
  }

  // dy of a branch as the gradients of its convolution read it: in `grad`, or with borders in `padded_grad`, which
  // holds one branch at a time; both where the data gradient is by way of spectra and the weight gradient needs
  // borders. first: the first time for this branch.
  void finish(const Branch& b, int images, bool first) {
    const ConvMap<T> map = images_map<T>(b.out, b.in, b.groups, b.k, args.height, args.width);
    T* dy = grad + b.out_first * step;
    if (!map.bordered() || b.by_channels || b.spectrum) {
      if (args.hidden && first) {
        attention.finish_backward(grad, b.out_first, b.out_first + b.out, images, dy, step, 0);
      }
      const bool by_taps = !b.spectrum || (first && args.need_parameters && !b.spectral_weights);
      if (map.bordered() && by_taps) pad_images(map, b.out, dy, padded_grad);
    } else if (args.hidden) {
      zero_borders(map, b.out, padded_grad);
      attention.finish_backward(grad, b.out_first, b.out_first + b.out, images, padded_grad + map.lead, map.channel,
                                map.pitch - map.width);
    } else {
      pad_images(map, b.out, dy, padded_grad);
    }
  }

  // Leaves x and dy of a branch for the weight gradient after all units.
  void keep(const Branch& b, const ConvMap<T>& map, int64_t unit) {
    constexpr int L = kLanes<T>;
    const T* from = branch_x(b);
    T* to = static_cast<T*>(args.kept_x) + b.kept_x_first + unit * b.in * map.channel;
    if (map.bordered()) {
      pad_images(map, b.in, from, to);
    } else {
      for (int64_t i = 0; i < b.in * map.channel; i += L) store(to + i, load(from + i));
    }
    channels_to_lanes<T>(
        grad + b.out_first * step, b.out, pixels, step,
        static_cast<T*>(args.kept_grad) + b.kept_grad_first + unit * L * pixels * channel_row<T>(b.out));
  }

  // After finish().
  template <class E>
  void data_gradient(const Branch& b, int64_t image, int images, bool accumulate) {
    const ConvMap<T> map = branch_map<T>(args, b, true);
    const T* input = map.bordered() ? padded_grad : grad + b.out_first * step;
    const T* packed = static_cast<const T*>(args.packed_backward) + b.packed_first;
    if (b.spectrum) {
      fourier_map<T, true>(map, table(b), input, packed, static_cast<const E*>(b.weights), b.full_k, b.weight_stride,
                           nullptr, accumulate, branch_x(b), nullptr, sums);
    } else {
      conv_map<T>(map, input, packed, nullptr, accumulate, branch_x(b));
    }
    if (branchwise) unpack_grad_x<E>(image, images, b.in_first, b.in);
  }

  template <class E>
  void unpack_grad_x(int64_t image, int images, int64_t first, int64_t channels) {
    unpack_images<E, T>(args.grad_x, image, images, first, channels, args.height, args.width,
                        [&](int64_t c, int64_t p) { return load(x + c * step + p * kLanes<T>); });
  }
};

}  // namespace mfef::cpu::MFEF_ISA
