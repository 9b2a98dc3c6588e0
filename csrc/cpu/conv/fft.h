// A grouped convolution of one packed map by FFT: forward, data gradient and weight gradient.
//
// For the images plan, on square maps that fft_table() has. Direct sums multiply every tap with every pixel that it
// meets: 2704 products for a 9 x 9 kernel on 8 x 8 pixels, for each pair of an input and an output channel. The
// transforms of both on 12 x 12 have 74 complex bins, 296 products; a transform is paid once per channel.
//
// A transform mixes all pixels of a map: one that is not finite reaches every output of its group, and one that is very
// large leaves rounding errors in all of them. fft_guard.h finds the results that this would spoil, and they are summed
// directly here. So the caller gets results that hold, and a tolerance within which values of a map count as equal.
#pragma once

#include "cpu/conv/fft_guard.h"

namespace mfef::cpu::MFEF_ISA {

// Elements of the packed weights of one direction, and the tasks of packing them.
template <class T>
MFEF_INLINE int64_t fft_packed_elements(const ConvShape<T>& shape, int64_t n) {
  return shape.groups * (packed_fft_group(shape, n) + guard_elements(shape));
}
template <class T>
MFEF_INLINE int64_t fft_pack_tasks(const ConvShape<T>& shape, int64_t n) {
  return shape.groups + packed_fft_blocks(shape, n);
}
template <class T, class E>
MFEF_INLINE void fft_pack(const ConvShape<T>& shape, const FftTable<T>& table, bool flipped,
                          const WeightView<const E>& view, T* packed, int64_t begin, int64_t end) {
  T* guard = packed + shape.groups * packed_fft_group(shape, table.n);
  weigh_inputs(shape, table.n, view, guard, begin, min(end, shape.groups));
  pack_fft_weights(shape, table, flipped, view, packed, max<int64_t>(0, begin - shape.groups), end - shape.groups);
}

// Sums outputs of one group directly where they need it, an input channel at a time; x and y: the channels of the
// group, those of y y_step apart; weights: the first tap. Several output channels share a load of x.
template <class T, class E>
void recompute_direct(const ConvShape<T>& shape, const NeedsDirect<T>& direct, const T* x,
                      const WeightView<const E>& view, const E* weights, const T* bias, T* y, int64_t y_step) {
  constexpr int L = kLanes<T>;
  const int radius = shape.k / 2;
  auto pixel = [&]<int kCount>(int64_t h, int64_t w, int64_t o, Index<kCount>) {
    const int64_t ky_begin = max<int64_t>(0, radius - h), ky_end = min<int64_t>(shape.k, shape.height + radius - h);
    const int64_t kx_begin = max<int64_t>(0, radius - w), kx_end = min<int64_t>(shape.k, shape.width + radius - w);
    const int64_t p = h * shape.width + w;
    Vec<T> sum[kCount] = {};
    for (int64_t i = 0; i < shape.in_group() && !direct.vacant[p]; ++i) {
      Vec<T> part[kCount] = {};
      for (int64_t ky = ky_begin; ky < ky_end; ++ky) {
        const T* row = x + i * shape.channel + ((h + ky - radius) * shape.width + w - radius) * L;
        const E* from = weights + o * view.out + i * view.in + ky * view.row;
        for (int64_t kx = kx_begin; kx < kx_end; ++kx) {
          const Vec<T> v = load(row + kx * L);
          static_for<kCount>(
              [&]<int r>() { part[r] += v * splat(T(to_compute(from[r * view.out + kx * view.column]))); });
        }
      }
      static_for<kCount>([&]<int r>() { sum[r] += part[r]; });
    }
    static_for<kCount>([&]<int r>() {
      if (bias) sum[r] += splat(bias[o + r]);
      T* to = y + (o + r) * y_step + p * L;
      store(to, direct.lanes[p] ? sum[r] : load(to));
    });
  };
  constexpr int kMany = kRegisters == 32 ? 8 : 4;
  for (int64_t h = 0; h < shape.height; ++h) {
    for (int64_t w = 0; w < shape.width; ++w) {
      if (!any_lane<T>(direct.lanes[h * shape.width + w])) continue;
      int64_t o = 0;
      for (; o + kMany <= shape.out_group(); o += kMany) pixel(h, w, o, Index<kMany>{});
      for (; o < shape.out_group(); ++o) pixel(h, w, o, Index<1>{});
    }
  }
}

// The tolerance of an output map, in units of rounding of the root mean square of the transforms of its group. Pixels
// whose sums are equal were seen to differ by 15 such units, and by 38 in the worst of a million.
constexpr int kToleranceUnits = 16;

// The root mean square of the output map of a group in which it is largest.
template <class T>
Vec<T> largest_rms(int64_t channels, int64_t n, const T* transforms) {
  Vec<T> largest{};
  for (int64_t c = 0; c < channels; ++c) {
    const Vec<T> sum = sum_of_squares(transforms + c * fft_vectors(n) * kLanes<T>, 2 * fft_bins(n));
    largest = sum > largest ? sum : largest;
  }
  for (int i = 0; i < kLanes<T>; ++i) largest[i] = std::sqrt(2 * largest[i]);  // bins are half of a transform
  return largest;
}

// A branch in one direction.
template <class T, class E>
struct FftConvolution {
  const ConvShape<T> shape;
  const FftTable<T>& table;
  const bool flipped;  // of the data gradient, whose shape this is
  const WeightView<const E> weights;
  const T* const packed;  // what fft_pack() wrote

  int64_t step() const { return fft_vectors(table.n) * kLanes<T>; }  // from channel to channel of transforms

  // y = conv(x), or y += conv(x), both [channel][pixel][lane] without borders. x and y are not the same. tolerance:
  // for each output channel, written unless it is null.
  void run(const T* x, const T* bias, bool accumulate, T* y, T* tolerance, T* scratch) const {
    T* y_bins = scratch + shape.in_group() * step();
    for (int64_t g = 0; g < shape.groups; ++g) run_group(g, x, scratch, false, bias, accumulate, y, tolerance, y_bins);
  }

  // One group. The transforms of its x go to x_bins, unless they are there already: `transformed`.
  void run_group(int64_t g, const T* x, T* x_bins, bool transformed, const T* bias, bool accumulate, T* y, T* tolerance,
                 T* y_bins) const {
    const int64_t in_group = shape.in_group(), out_group = shape.out_group();
    const int64_t packed_group = packed_fft_group(shape, table.n);
    const T* guard = packed + shape.groups * packed_group + g * guard_elements(shape);
    x += g * in_group * shape.channel;
    y += g * out_group * shape.out_channel;
    if (bias) bias += g * out_group;
    NeedsDirect<T> direct;
    find_needs_direct(shape, table.n, x, guard, direct);
    Vec<T> gap{};
    // What is added to y first takes the place of its transforms.
    T* to = accumulate ? y_bins : y;
    const int64_t to_step = accumulate ? step() : shape.out_channel;
    if (!direct.all) {
      for (int64_t i = 0; i < in_group && !transformed; ++i) table.map(x + i * shape.channel, x_bins + i * step());
      (flipped ? multiply_bins<T, false> : multiply_bins<T, true>)(shape, table.n, x_bins, packed + g * packed_group,
                                                                   y_bins);
      if (tolerance) {
        gap = largest_rms(out_group, table.n, y_bins) * splat(kToleranceUnits * std::numeric_limits<T>::epsilon());
        gap = direct.whole ? Vec<T>{} : gap;  // direct sums that are equal are equal
      }
      for (int64_t o = 0; o < out_group; ++o) {
        table.inverse_map(y_bins + o * step(), bias ? bias + o : nullptr, to + o * to_step);
      }
    }
    if (direct.any) recompute_direct(shape, direct, x, weights, weights.at(g, 0, 0), bias, to, to_step);
    for (int64_t o = 0; o < out_group; ++o) {
      if (tolerance) store(tolerance + (g * out_group + o) * kLanes<T>, gap);
      if (!accumulate) continue;
      T* sum = y + o * shape.out_channel;
      for (int64_t p = 0; p < shape.height * shape.width; ++p) {
        const int64_t at = p * kLanes<T>;
        store(sum + at, load(sum + at) + load(to + o * to_step + at));
      }
    }
  }
};

// Elements of scratch of FftGradients, or of FftConvolution where the weights' gradient is direct.
template <class T>
MFEF_INLINE int64_t fft_scratch(const ConvShape<T>& shape, int64_t n, bool weights) {
  constexpr int L = kLanes<T>;
  const int64_t channels = shape.in_group() + shape.out_group(), step = fft_vectors(n) * L;
  if (!weights) return channels * step;
  const int64_t rest = (outputs_in_lanes(shape) ? L + kLaneInputs : 1) * 2 * fft_bins(n) * L;
  return groups_at_once(shape) * channels * step + max(rest, weight_grad_scratch<T>(shape.k)) +
         round_up(shape.in_group(), L) + shape.out_group() * L;
}

// The gradient of the weights of a branch, and of its x out of the same transforms of dy.
template <class T>
struct FftGradients {
  static constexpr int L = kLanes<T>;
  const ConvShape<T> shape;  // of the forward
  const FftTable<T>& table;
  const int images;
  T *padded_x, *padded_dy;  // room for a group with borders
  T* sums;                  // fft_grad_elements()
  T* scratch;               // transforms of x and dy of the groups at once, then what is below

  int64_t step() const { return fft_vectors(table.n) * L; }
  T* x_bins(int64_t r) const { return scratch + r * shape.in_group() * step(); }
  T* dy_bins(int64_t r) const { return x_bins(groups_at_once(shape)) + r * shape.out_group() * step(); }
  T* needs_direct() const { return dy_bins(groups_at_once(shape)); }
  T* unit() const { return needs_direct() + round_up(shape.in_group(), L); }
  T* rest() const { return unit() + shape.out_group() * L; }

  // sums += the gradient of the weights, and dx in the place of x if there is a `back`.
  template <class E>
  void run(T* x, const T* dy, const FftConvolution<T, E>* back) const {
    const int64_t at_once = groups_at_once(shape);
    for (int64_t first = 0; first < shape.groups; first += at_once) {
      const int64_t groups = min(at_once, shape.groups - first);
      bool transformed[L], any = false;
      for (int64_t r = 0; r < groups; ++r) {
        transformed[r] = transform_group(first + r, r, x, dy);
        any |= transformed[r];
      }
      T* to = sums + weight_blocks(shape, first) * shape.taps() * L;
      if (any && outputs_in_lanes(shape)) {
        fft_grad_by_outputs(shape, table, images, x_bins(0), dy_bins(0), to, rest());
      } else if (any) {
        fft_grad_by_pairs(shape, table, groups, x_bins(0), dy_bins(0), to, rest());
      }
      for (int64_t r = 0; r < groups && back; ++r) {
        back->run_group(first + r, dy, dy_bins(r), transformed[r], nullptr, false, x, nullptr, x_bins(r));
      }
    }
  }

  // Transforms x and dy of group g, the r-th of those at once. Input channels that must not come from an FFT are summed
  // directly and stay zero; of a group with more than half of such channels, all do. Returns whether it was not so.
  bool transform_group(int64_t g, int64_t r, const T* x, const T* dy) const {
    const int64_t in_group = shape.in_group(), out_group = shape.out_group();
    x += g * in_group * shape.channel;
    dy += g * out_group * shape.out_channel;
    T* const direct = needs_direct();
    Levels<T> levels;
    find_levels(shape, dy, unit(), levels);
    int64_t count = 0;
    for (int64_t i = 0; i < in_group; ++i) {
      const bool needs = gradient_needs_direct(shape, table.n, x + i * shape.channel, dy, unit(), levels);
      direct[i] = needs ? T(1) : T(0);
      count += needs;
    }
    const bool transformed = 2 * count <= in_group;
    auto transform = [&](const T* map, T* to, bool wanted) {
      if (wanted) return table.map(map, to);
      for (int64_t at = 0; at < step(); at += L) store(to + at, Vec<T>{});
    };
    for (int64_t i = 0; i < in_group; ++i) {
      if (!transformed) direct[i] = T(1);
      transform(x + i * shape.channel, x_bins(r) + i * step(), direct[i] == T(0));
    }
    for (int64_t o = 0; o < out_group; ++o) {
      transform(dy + o * shape.out_channel, dy_bins(r) + o * step(), transformed);
    }
    if (count) add_direct(g, x, dy, direct);
    return transformed;
  }

  // sums += the gradient of group g, whose x and dy these are, for the input channels whose `direct` is not 0.
  void add_direct(int64_t g, const T* x, const T* dy, const T* direct) const {
    const int64_t in_group = shape.in_group(), out_group = shape.out_group(), taps = shape.taps();
    const ConvShape<T> one = images_shape<T>(in_group, out_group, 1, shape.k, shape.height, shape.width);
    int64_t dy_step = shape.out_channel, dy_gap = 0;
    if (one.bordered()) {
      pad_images(one, in_group, x, padded_x);
      pad_images(one, out_group, dy, padded_dy);
      x = padded_x;
      dy = padded_dy + one.lead;
      dy_step = one.channel;
      dy_gap = one.pitch - one.width;
    }
    weight_grad_tiles<T>(
        one, x, dy, dy_step, rest(), dy_gap, [&](int64_t i) { return direct[i] != T(0); },
        [&](int64_t o, int out, int64_t i, int64_t t, Vec<T> sum) {
          for (int j = 0; j < L && t + j < out * taps; ++j) {
            sums[fft_grad_at(shape, g, o + (t + j) / taps, i) + (t + j) % taps * L] += sum[j];
          }
        });
  }
};

// --- choice -----------------------------------------------------------------------------------------

// Estimated cycles for a block of images, fitted to the times of 94 branches on each instruction set
// (docs/decisions/fft-convolution.md). For each bin: of a transform; of a pair's product, the weights' transform
// included; of a pair's product in the weight gradient with pairs in the lanes; of transposing dy. And of a direct
// product, and of a sum over the lanes.
#if defined(MFEF_ISA_avx512) || defined(MFEF_ISA_avx512_bf16)
constexpr double kTransformCost = 16, kMultiplyCost = 4.2, kPairCost = 5;
#elif defined(MFEF_ISA_avx2)
constexpr double kTransformCost = 12, kMultiplyCost = 2.8, kPairCost = 3;
#else
constexpr double kTransformCost = 4.5, kMultiplyCost = 3, kPairCost = 6;
#endif
constexpr double kTransposeCost = 6, kDirectCost = 0.575, kLaneSumCost = 1.4;

// Products of a pixel and a tap along one side of a map: those that meet.
MFEF_INLINE int64_t meeting(int64_t side, int64_t k) {
  int64_t count = 0;
  for (int64_t d = -(k / 2); d <= k / 2; ++d) count += max<int64_t>(0, side - (d < 0 ? -d : d));
  return count;
}

// Products of all pairs of channels by direct sums.
template <class T>
MFEF_INLINE double direct_products(const BlockArgs& a, const Branch& b) {
  const double pairs = double(b.out) * double(b.in / b.groups), line = double(meeting(a.height, b.k));
  const bool clips = images_shape<T>(b.in, b.out, b.groups, b.k, a.height, a.width).layout == kClip;
  return pairs * line * (clips ? line : double(a.height) * double(b.k));
}

// Side of the transforms of a branch, 0 for a direct convolution: whichever should take fewer cycles, in either
// direction. The number of images does not count: an image has the same result alone or among others.
template <class T>
MFEF_INLINE int choose_fft(const BlockArgs& a, const Branch& b) {
  if (a.plan != Plan::kImages || a.convolution == Convolution::kDirect || a.height != a.width || a.height < 1) return 0;
  const FftTable<T>* table = fft_table<T>(a.height, b.k);
  if (!table) return 0;
  if (a.convolution == Convolution::kFft) return table->n;
  const double pairs = double(b.out) * double(b.in / b.groups), bins = double(fft_bins(table->n));
  const double fft = double(b.in + b.out) * bins * kTransformCost + pairs * bins * kMultiplyCost;
  return fft < direct_products<T>(a, b) * kDirectCost ? table->n : 0;
}

// Whether the weight gradient comes from an FFT as the data gradient does, which has the transforms of dy already.
template <class T>
MFEF_INLINE bool choose_fft_gradient(const BlockArgs& a, const Branch& b) {
  if (a.convolution == Convolution::kFft) return true;
  const double pairs = double(b.out) * double(b.in / b.groups), bins = double(fft_bins(b.fft_size));
  const double transform = bins * kTransformCost, inverse = pairs / kLanes<T> * transform;
  double fft = double(b.in) * transform;
  if (outputs_in_lanes(fft_shape<T>(b.in, b.out, b.groups, b.k, a.height, a.width))) {
    const double used = double(b.out / b.groups) / double(round_up(b.out / b.groups, kLanes<T>));
    fft += (pairs * bins * kMultiplyCost + inverse) / used + double(b.out) * bins * kTransposeCost;
  } else {
    fft += pairs * bins * kPairCost + inverse;
  }
  return fft < direct_products<T>(a, b) * kDirectCost + pairs * double(b.k * b.k) * kLaneSumCost;
}

}  // namespace mfef::cpu::MFEF_ISA
