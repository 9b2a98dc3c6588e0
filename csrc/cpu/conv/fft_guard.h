// Which results of an FFT are accurate, and which must be summed directly.
//
// Rounding in a transform leaves errors of one size all over a map, so an output, or a gradient of a weight, may come
// from an FFT only where its own sum is known to be large enough.
#pragma once

#include <cmath>
#include <limits>

#include "cpu/conv/fft_products.h"

namespace mfef::cpu::MFEF_ISA {

constexpr int64_t kMaxFftSide = 16;  // of a map that has transforms

// A sum of squares is trusted in this range: below it squares vanish, above it they overflow.
template <class T>
constexpr T kMinSquare = std::numeric_limits<T>::min() * T(1e6);
template <class T>
constexpr T kInfinity = std::numeric_limits<T>::infinity();

// The sum of f over the pixels, or bins, of one channel, in four chains.
template <class T, class F>
MFEF_INLINE Vec<T> sum_over_pixels(const T* x, int64_t pixels, const F& f) {
  constexpr int L = kLanes<T>;
  Vec<T> sum[4] = {};
  int64_t p = 0;
  for (; p + 4 <= pixels; p += 4) {
    static_for<4>([&]<int j>() { sum[j] += f(load(x + (p + j) * L)); });
  }
  for (; p < pixels; ++p) sum[0] += f(load(x + p * L));
  return sum[0] + sum[1] + (sum[2] + sum[3]);
}
template <class T>
MFEF_INLINE Vec<T> sum_of_squares(const T* x, int64_t pixels) {
  return sum_over_pixels(x, pixels, [](Vec<T> v) { return v * v; });
}
template <class T>
MFEF_INLINE Vec<T> sum_of_magnitudes(const T* x, int64_t pixels) {
  return sum_over_pixels(x, pixels, [](Vec<T> v) { return absolute<T>(v); });
}

// --- outputs ----------------------------------------------------------------------------------------
//
// The error of an output map is at most kError eps times
//
//   R = sqrt(sum over input channels i of |w_i|^2 |x_i|^2) / n        |.|: the root of the sum of the squares
//
// A direct sum errs by a multiple of eps S, S being the sum over its own taps of |w| |x|, which is small where large
// pixels or weights are out of reach. So an output may come from an FFT only where S is known to be at least
// R kError / kAllowed. Let the weights of an output channel be u b_i v, where u belongs to the output channel and b_i
// to the input channel, and let v_min be the sum of the M smallest |v|. However the pixels are spread over the taps, if
//
//   sum over its taps of min(b_i |x|, limit) >= M limit,  then  S >= u limit v_min
//
// because S is smallest where all of them meet the smallest weights. `limit` is as large as the R of the most demanding
// output channel requires. Kernels of few taps have v_min = 0 and are always summed directly.

// For maps of one row, one column or one pixel, constant, random or with outliers, no output was ever off by more than
// 4 eps R.
constexpr double kError = 4;
// What an output may be off by, in units of eps S.
constexpr double kAllowed = 256;

// M: the number for which the sum above exceeds M limit most often, for random maps and weights.
template <class T>
MFEF_INLINE T guard_terms(const ConvShape<T>& shape, int64_t n) {
  const double taps = double(shape.taps()), in = double(shape.in_group());
  const double share = kError / kAllowed * std::sqrt(in * taps) * double(shape.height) / double(n);
  return T(int64_t(std::sqrt(3.2 * share * in * taps)) + 1);
}

// What the guard knows of a group's weights: for each input channel b (`scale`); the largest square of
// |w| / (u v_min) over the output channels (`reach`); and |w|^2 of each pair, which only weigh_inputs() needs.
template <class T>
MFEF_INLINE int64_t guard_elements(const ConvShape<T>& shape) {
  return shape.in_group() * (2 + shape.out_group());
}

// Writes |w| * unit of the taps of a pair of channels, in any order; returns where they end.
template <class T, class E>
MFEF_INLINE T* read_magnitudes(const WeightView<const E>& view, int k, const E* from, T unit, T* to) {
  constexpr int L = kLanes<T>;
  const int64_t forward = view.column < 0 ? -1 : 1, taps = int64_t(k) * k;
  if (view.column == forward && view.row == forward * k) {  // without gaps
    if (forward < 0) from -= taps - 1;
    T* const end = to + taps;
    for (; to + L <= end; to += L, from += L) store(to, absolute<T>(load_elements(from)) * unit);
    for (; to < end; ++to, ++from) *to = std::fabs(to_compute(*from)) * unit;
    return to;
  }
  for (int ky = 0; ky < k; ++ky, from += view.row) {
    for (int kx = 0; kx < k; ++kx) *to++ = std::fabs(to_compute(from[kx * view.column])) * unit;
  }
  return to;
}

// A lower bound of the sum of the `terms` smallest |v| of one output channel, `unit` being u.
//
// Of the smallest, those below a bound are added, and the others are no smaller than the bound. The higher the bound,
// the larger the sum, as long as no more than `terms` are below it. The smallest of random weights lie about 1 / their
// number apart, and `terms` of them below the first bound.
template <class T, class E>
T sum_of_smallest(const ConvShape<T>& shape, const WeightView<const E>& view, const E* from, const T* scale, T unit,
                  T terms) {
  constexpr int L = kLanes<T>;
  constexpr int kBounds = 3;
  const int64_t in = shape.in_group(), taps = shape.taps();
  alignas(64) T magnitudes[kLongestFft * kLongestFft + L];
  T bound = terms / T(in * taps);
  for (int j = 0; j < kBounds; ++j, bound /= 2) {
    Vec<T> count{}, sum{};
    for (int64_t i = 0; i < in; ++i) {
      if (scale[i] == T(0)) continue;  // all its transforms are zero
      store(read_magnitudes(view, shape.k, from + i * view.in, T(1) / (unit * scale[i]), magnitudes),
            splat(kInfinity<T>));
      for (int64_t t = 0; t < taps; t += L) {
        const Vec<T> v = load(magnitudes + t);
        const IVec<T> below = v < splat(bound);
        count += below ? splat(T(1)) : Vec<T>{};
        sum += below ? v : Vec<T>{};
      }
    }
    const T below = sum_of_lanes<T>(count);
    if (below <= terms) return sum_of_lanes<T>(sum) + (terms - below) * bound;
  }
  return T(0);
}

// Writes what the guard knows of groups [begin, end).
template <class T, class E>
void weigh_inputs(const ConvShape<T>& shape, int64_t n, const WeightView<const E>& view, T* guard, int64_t begin,
                  int64_t end) {
  constexpr int L = kLanes<T>;
  const int64_t in = shape.in_group(), out = shape.out_group(), taps = shape.taps();
  const T terms = guard_terms(shape, n);
  alignas(64) T magnitudes[kLongestFft * kLongestFft + L];  // and what a vector has beyond the last tap
  for (int64_t g = begin; g < end; ++g) {
    T *scale = guard + g * guard_elements(shape), *reach = scale + in, *squares = reach + in;
    auto mean_square = [&](int64_t o) {
      T sum = 0;
      for (int64_t i = 0; i < in; ++i) sum += squares[o * in + i];
      return sum / T(in * taps);
    };
    for (int64_t i = 0; i < in; ++i) scale[i] = reach[i] = T(0);
    for (int64_t o = 0; o < out; ++o) {
      for (int64_t i = 0; i < in; ++i) {
        store(read_magnitudes(view, shape.k, view.at(g, o, i), T(1), magnitudes), Vec<T>{});
        Vec<T> square{}, magnitude{};
        for (int64_t t = 0; t < taps; t += L) {
          square += load(magnitudes + t) * load(magnitudes + t);
          magnitude += load(magnitudes + t);
        }
        // Not zero where the squares vanish.
        const T smallest = sum_of_lanes<T>(magnitude) == T(0) ? T(0) : std::numeric_limits<T>::min();
        squares[o * in + i] = max(sum_of_lanes<T>(square), smallest);
      }
      const T u2 = mean_square(o);
      for (int64_t i = 0; i < in && u2 > T(0); ++i) scale[i] += squares[o * in + i] / u2;
    }
    for (int64_t i = 0; i < in; ++i) scale[i] = std::sqrt(scale[i] / T(out * taps));
    for (int64_t o = 0; o < out; ++o) {
      const T u2 = mean_square(o);
      const T smallest = sum_of_smallest(shape, view, view.at(g, o, 0), scale, T(std::sqrt(u2)), terms);
      const T unit = u2 * smallest * smallest;
      for (int64_t i = 0; i < in; ++i) {
        const T of_pair = squares[o * in + i];
        // What is not finite, or so small that squares vanish, is trusted nowhere.
        const bool trusted = u2 > kMinSquare<T> && u2 < kInfinity<T>;
        if (trusted && of_pair > T(0)) reach[i] = max(reach[i], of_pair / unit);
        if (!trusted && u2 != T(0)) reach[i] = kInfinity<T>;
      }
    }
  }
}

// Where some outputs have less than 1 / kSevere of what they need, all of their map is summed directly: its maximum
// must not be taken with the tolerance that results of an FFT have.
template <class T>
constexpr T kSevere = 4;

// v[j] = the sum of v[i], |i - j| <= radius, for a line of `side` vectors, `step` elements apart. Nothing is
// subtracted, so a small sum beside large values stays right.
template <class T>
MFEF_INLINE void sum_windows(T* v, int64_t side, int64_t step, int64_t radius) {
  Vec<T> line[kMaxFftSide], before[kMaxFftSide], after[kMaxFftSide];
  for (int64_t i = 0; i < side; ++i) {
    line[i] = load(v + i * step);
    before[i] = i ? before[i - 1] + line[i] : line[i];
  }
  for (int64_t i = side - 1; i >= 0; --i) after[i] = i < side - 1 ? after[i + 1] + line[i] : line[i];
  for (int64_t i = 0; i < side; ++i) {
    const int64_t first = i - radius, last = i + radius;
    Vec<T> sum;
    if (first <= 0) {
      sum = before[min(last, side - 1)];
    } else if (last >= side - 1) {
      sum = after[first];
    } else {
      sum = line[first];
      for (int64_t j = first + 1; j <= last; ++j) sum += line[j];
    }
    store(v + i * step, sum);
  }
}

// The smallest sum over any of some squares of radius + 1 pixels a side, chosen so that each window contains one.
template <class T>
MFEF_INLINE Vec<T> min_over_squares(const ConvShape<T>& shape, const T* sums) {
  const int64_t side = shape.height, square = shape.k / 2 + 1, last = side - square;
  Vec<T> smallest = splat(kInfinity<T>);
  auto next = [&](int64_t at) { return at < last ? min(at + square, last) : side; };
  for (int64_t top = 0; top < side; top = next(top)) {
    Vec<T> columns[kMaxFftSide];
    for (int64_t w = 0; w < side; ++w) {
      columns[w] = load(sums + (top * side + w) * kLanes<T>);
      for (int64_t h = 1; h < square; ++h) columns[w] += load(sums + ((top + h) * side + w) * kLanes<T>);
    }
    for (int64_t left = 0; left < side; left = next(left)) {
      Vec<T> sum = columns[left];
      for (int64_t w = 1; w < square; ++w) sum += columns[left + w];
      smallest = sum < smallest ? sum : smallest;
    }
  }
  return smallest;
}

// The outputs of one group that must be summed directly, the same for all its output channels.
template <class T>
struct NeedsDirect {
  alignas(64) IVec<T> lanes[kMaxFftSide * kMaxFftSide];  // for each pixel
  bool vacant[kMaxFftSide * kMaxFftSide];                // nothing but zeros meets a tap in those lanes
  IVec<T> whole;                                         // lanes in which all pixels must be
  bool any, all;                                         // any output, all of them
};

// sums[p] = the sum over input channels of min(b |x|, limit).
template <class T>
void sum_clipped(const ConvShape<T>& shape, const T* x, const T* scale, Vec<T> limit, T* sums) {
  constexpr int L = kLanes<T>;
  const int64_t pixels = shape.height * shape.width;
  auto add = [&]<int kCount, bool kFirst>(int64_t i) {
    Vec<T> factor[kCount], clip[kCount];
    static_for<kCount>([&]<int j>() {
      factor[j] = splat(scale[i + j]);
      clip[j] = limit / factor[j];
    });
    auto pixel = [&](int64_t p) {
      Vec<T> sum = kFirst ? Vec<T>{} : load(sums + p * L);
      static_for<kCount>([&]<int j>() {
        const Vec<T> size = absolute<T>(load(x + (i + j) * shape.channel + p * L));
        sum += (size < clip[j] ? size : clip[j]) * factor[j];
      });
      store(sums + p * L, sum);
    };
    int64_t p = 0;
    for (; p + 4 <= pixels; p += 4) static_for<4>([&]<int j>() { pixel(p + j); });
    for (; p < pixels; ++p) pixel(p);
  };
  const int64_t in = shape.in_group();
  if (in == 1) return add.template operator()<1, true>(0);
  int64_t i = 2;
  add.template operator()<2, true>(0);
  for (; i + 4 <= in; i += 4) add.template operator()<4, false>(i);
  for (; i + 2 <= in; i += 2) add.template operator()<2, false>(i);
  if (i < in) add.template operator()<1, false>(i);
}

// x: the channels of the group; guard: what weigh_inputs() wrote for it.
template <class T>
void find_needs_direct(const ConvShape<T>& shape, int64_t n, const T* x, const T* guard, NeedsDirect<T>& direct) {
  constexpr int L = kLanes<T>;
  const int64_t in = shape.in_group(), pixels = shape.height * shape.width;
  const T *scale = guard, *reach = guard + in;
  Vec<T> square{};
  for (int64_t i = 0; i < in; ++i) square += sum_of_squares(x + i * shape.channel, pixels) * splat(reach[i]);
  Vec<T> limit;
  for (int lane = 0; lane < L; ++lane) limit[lane] = std::sqrt(square[lane]);
  limit *= splat(T(kError / kAllowed / double(n)));
  // What is not finite, or so small that its square vanishes, is trusted nowhere; but a map of zeros is.
  const IVec<T> trusted = (square > splat(kMinSquare<T>)) & (square < splat(kInfinity<T>));
  limit = trusted ? limit : splat(kInfinity<T>);
  alignas(64) T sums[kMaxFftSide * kMaxFftSide * L];
  sum_clipped(shape, x, scale, limit, sums);
  IVec<T> blank{};
  if (any_lane<T>(~trusted)) {
    Vec<T> total{};
    for (int64_t p = 0; p < pixels; ++p) total += load(sums + p * L);
    blank = total == Vec<T>{};
  }
  const Vec<T> wanted = limit * splat(guard_terms(shape, n));
  const IVec<T> passed = blank | (trusted & (min_over_squares(shape, sums) >= wanted));
  direct.any = direct.all = false;
  direct.whole = IVec<T>{};
  if (!any_lane<T>(~passed)) return;
  for (int64_t h = 0; h < shape.height; ++h) sum_windows(sums + h * shape.width * L, shape.width, L, shape.k / 2);
  for (int64_t w = 0; w < shape.width; ++w) sum_windows(sums + w * L, shape.height, shape.width * L, shape.k / 2);
  direct.whole = ~trusted;
  for (int64_t p = 0; p < pixels; ++p) {
    const Vec<T> sum = load(sums + p * L);
    direct.lanes[p] = ~(sum >= wanted) & ~passed;
    direct.whole |= direct.lanes[p] & (sum != Vec<T>{}) & (sum * splat(kSevere<T>) < wanted);
  }
  direct.whole &= ~blank;
  direct.any = direct.all = !any_lane<T>(~(direct.whole | blank));
  direct.whole |= direct.all ? blank : IVec<T>{};
  for (int64_t p = 0; p < pixels; ++p) {
    direct.lanes[p] |= direct.whole;
    const bool some = any_lane<T>(direct.lanes[p]);
    direct.any |= some;
    direct.vacant[p] = some && !any_lane<T>(direct.lanes[p] & (load(sums + p * L) != Vec<T>{}));
  }
}

// --- gradients of weights ---------------------------------------------------------------------------
//
// Here S is the sum of |dy| |x| over the pairs of pixels that a tap joins, in all images of a block, and an FFT leaves
// errors of at most kError eps / n times the sum over images of |x| |dy|, |.| over all pixels of an image. Both factors
// are data, and S has to be bounded for every pair of channels before anything is multiplied.
//
// Gradients of some images are much larger than those of others. Let g be the size of dy of an image, all channels
// together, and h = g / the largest g: what follows is said of dy / g, and all sums over images are weighted with h.
//
// For each tap there is a square of w = side - k / 2 pixels a side, which it moves from one of the corners of dy to one
// of (k / 2 + 1)^2 places of x. Let the sum of min(|x|, t) over that square in x be C t or more wherever it lies, and
// at most N_j pixels of dy be below level d_j in any corner. In however unfortunate places those are,
//
//   S >= t sum over j of (d_j - d_(j-1)) max(0, C - N_j)
//
// With levels that are multiples of the root mean square of dy, of its own channel, one set of N_j serves all output
// channels of a group, and by the Cauchy-Schwarz inequality their magnitudes cancel. Input channels for which the sum
// is not enough are summed directly.

constexpr double kGradAllowed = 128;
constexpr int kLevels = 3;
constexpr double kLevel[kLevels + 1] = {0, 0.02, 0.1, 0.4};
// One level alone, with the pixels below it counted in all columns rather than in a corner, clears nearly all channels.
// All levels are counted where it does not.
constexpr double kOneLevel = kLevel[2];

// A side is cut into three parts, of which a corner covers the first two or the last two, or one of them where corners
// do not overlap.
struct Cuts {
  int64_t at[4];
  bool overlap;
};
template <class T>
MFEF_INLINE Cuts cuts_of(const ConvShape<T>& shape) {
  const int64_t side = shape.height, radius = shape.k / 2, window = side - radius;
  return {{0, min(window, radius), max(window, radius), side}, radius < window};
}

// Of the output channels of a group.
template <class T>
struct Levels {
  Vec<T> weight;        // h
  T images;             // the sum of h
  T missing_of_one;     // of kOneLevel, N_j or more
  T missing[kLevels];   // N_j
  bool all;             // whether they are there
  T smallest, largest;  // |dy| of the channels that are not zero
  bool trusted;         // everything is finite, and so are the squares
};

// Comparisons that hold are -1 in a lane.
template <class T>
MFEF_INLINE Vec<T> weighted_count(IVec<T> count, const Levels<T>& levels) {
  return __builtin_convertvector(-count, Vec<T>) * levels.weight;
}

// count[j] += the number of pixels that are below level[j], negative; in two chains.
template <int kCount, class T>
MFEF_INLINE void count_below(const T* x, int64_t pixels, const Vec<T> (&level)[kCount], IVec<T> (&count)[kCount]) {
  IVec<T> odd[kCount] = {};
  auto add = [&](int64_t p, IVec<T>(&to)[kCount]) {
    const Vec<T> v = absolute<T>(load(x + p * kLanes<T>));
    static_for<kCount>([&]<int j>() { to[j] += v < level[j]; });
  };
  int64_t p = 0;
  for (; p + 2 <= pixels; p += 2) {
    add(p, count);
    add(p + 1, odd);
  }
  if (p < pixels) add(p, count);
  static_for<kCount>([&]<int j>() { count[j] += odd[j]; });
}

// N_j of all levels; unit: what level 1 is in each image, for each output channel.
template <class T>
void count_missing(const ConvShape<T>& shape, const T* dy, const T* unit, Levels<T>& levels) {
  constexpr int L = kLanes<T>;
  const Cuts cuts = cuts_of(shape);
  for (int64_t o = 0; o < shape.out_group(); ++o, dy += shape.out_channel) {
    Vec<T> level[kLevels];
    static_for<kLevels>([&]<int j>() { level[j] = load(unit + o * L) * splat(T(kLevel[j + 1])); });
    IVec<T> part[3][3][kLevels] = {};
    for (int a = 0; a < 3; ++a) {
      for (int b = 0; b < 3; ++b) {
        for (int64_t h = cuts.at[a]; h < cuts.at[a + 1]; ++h) {
          const T* row = dy + (h * shape.width + cuts.at[b]) * L;
          count_below<kLevels, T>(row, cuts.at[b + 1] - cuts.at[b], level, part[a][b]);
        }
      }
    }
    constexpr int kCounts = 4 * kLevels;
    alignas(64) T counts[kCounts + L];
    for (int first = 0; first < kCounts; first += L) {
      Vec<T> rows[L] = {};
      for (int r = 0; r < L && first + r < kCounts; ++r) {
        const int corner = (first + r) / kLevels, j = (first + r) % kLevels, a = corner / 2 * 2, b = corner % 2 * 2;
        IVec<T> count = part[a][b][j];
        if (cuts.overlap) count += part[1][b][j] + part[a][1][j] + part[1][1][j];
        rows[r] = weighted_count(count, levels);
      }
      store(counts + first, sums_of_lanes<T>(rows));
    }
    for (int r = 0; r < kCounts; ++r) levels.missing[r % kLevels] = max(levels.missing[r % kLevels], counts[r]);
  }
  levels.all = true;
}

// missing_of_one for one output channel.
template <class T>
MFEF_INLINE T count_missing_of_one(const ConvShape<T>& shape, const T* dy, Vec<T> unit, const Levels<T>& levels) {
  const Cuts cuts = cuts_of(shape);
  const Vec<T> level[1] = {unit * splat(T(kOneLevel))};
  IVec<T> rows[3][1] = {};
  for (int i = 0; i < 3; ++i) {
    count_below<1, T>(dy + cuts.at[i] * shape.width * kLanes<T>, (cuts.at[i + 1] - cuts.at[i]) * shape.width, level,
                      rows[i]);
  }
  const IVec<T> middle = cuts.overlap ? rows[1][0] : IVec<T>{};
  return max(sum_of_lanes<T>(weighted_count<T>(rows[0][0] + middle, levels)),
             sum_of_lanes<T>(weighted_count<T>(rows[2][0] + middle, levels)));
}

// unit: a vector for each output channel is written, see above.
template <class T>
void find_levels(const ConvShape<T>& shape, const T* dy, T* unit, Levels<T>& levels) {
  constexpr int L = kLanes<T>;
  const int64_t pixels = shape.height * shape.width, out = shape.out_group();
  levels = Levels<T>{};
  levels.smallest = kInfinity<T>;
  levels.trusted = true;
  Vec<T> size{};
  for (int64_t o = 0; o < out; ++o) {
    const Vec<T> sum = sum_of_squares(dy + o * shape.out_channel, pixels);
    store(unit + o * L, sum);
    size += sum;
  }
  const IVec<T> there = (size > splat(kMinSquare<T>)) & (size < splat(kInfinity<T>));
  if (any_lane<T>(~there)) {
    Vec<T> sum{};
    for (int64_t o = 0; o < out; ++o) sum += sum_of_magnitudes(dy + o * shape.out_channel, pixels);
    levels.trusted = !any_lane<T>(~there & ~(sum == Vec<T>{}));
    if (!levels.trusted) return;
  }
  T largest = 0;
  for (int lane = 0; lane < L; ++lane) {
    size[lane] = there[lane] ? std::sqrt(size[lane]) : T(0);
    largest = max(largest, T(size[lane]));
  }
  if (largest == T(0)) return;
  levels.weight = size / splat(largest);
  levels.images = sum_of_lanes<T>(levels.weight);
  const Vec<T> inverse = there ? T(1) / (there ? size : splat(T(1))) : Vec<T>{};
  for (int64_t o = 0; o < out; ++o) {
    const T* channel = dy + o * shape.out_channel;
    const Vec<T> square = load(unit + o * L);
    const T sum = sum_of_lanes<T>(square);
    if (!(sum > kMinSquare<T>)) {
      store(unit + o * L, Vec<T>{});  // nothing is below it
      // Either all zero, or nothing is known.
      levels.trusted = !any_lane<T>(~(sum_of_magnitudes(channel, pixels) == Vec<T>{}));
      if (!levels.trusted) return;
      continue;
    }
    levels.smallest = min(levels.smallest, T(std::sqrt(sum)));
    levels.largest = max(levels.largest, T(std::sqrt(sum)));
    // The root mean square of dy / g; a multiple of g is what a pixel is compared with.
    const T mean = std::sqrt(sum_of_lanes<T>(square * inverse) / largest / (T(pixels) * levels.images));
    store(unit + o * L, size * splat(mean));
    levels.missing_of_one =
        max(levels.missing_of_one, count_missing_of_one(shape, channel, load(unit + o * L), levels));
  }
}

// The smallest sum of min(|x|, limit), weighted over images, over a square of side - k / 2 pixels a side.
template <class T>
T min_over_windows(const ConvShape<T>& shape, const T* x, T limit, const Levels<T>& levels) {
  constexpr int L = kLanes<T>;
  constexpr int64_t kParts = (kMaxFftSide + L - 1) / L;
  const int64_t side = shape.height, radius = shape.k / 2, window = side - radius, pixels = side * side;
  alignas(64) T at[(kMaxFftSide * kMaxFftSide / L + 2) * L], line[(2 * kParts + 1) * L];
  auto sum_images = [&]<int kWhole>(int64_t p, Index<kWhole>) {
    Vec<T> rows[L];
    static_for<L>([&]<int r>() {
      if (!kWhole && p + r >= pixels) {
        rows[r] = Vec<T>{};
      } else {
        const Vec<T> v = absolute<T>(load(x + (p + r) * L));
        rows[r] = (v < splat(limit) ? v : splat(limit)) * levels.weight;
      }
    });
    store(at + p, sums_of_lanes<T>(rows));
  };
  int64_t p = 0;
  for (; p + L <= pixels; p += L) sum_images(p, Index<1>{});
  if (p < pixels) sum_images(p, Index<0>{});
  store(at + round_up(pixels, L), Vec<T>{});
  // Sums over the rows of a window, a vector being a part of a row, then over its columns, a vector being windows.
  Vec<T> columns[kParts] = {}, smallest[kParts];
  for (auto& s : smallest) s = splat(kInfinity<T>);
  for (int64_t c = kParts; c <= 2 * kParts; ++c) store(line + c * L, Vec<T>{});
  const int64_t parts = divide_up(side, L);
  for (int64_t h = 0; h < side; ++h) {
    for (int64_t c = 0; c < parts; ++c) {
      columns[c] += load(at + h * side + c * L);
      if (h >= window) columns[c] -= load(at + (h - window) * side + c * L);
      store(line + c * L, columns[c]);
    }
    if (h < window - 1) continue;
    for (int64_t c = 0; c * L <= radius; ++c) {
      Vec<T> sum{};
      for (int64_t w = 0; w < window; ++w) sum += load(line + c * L + w);
      smallest[c] = sum < smallest[c] ? sum : smallest[c];
    }
  }
  T found = kInfinity<T>;
  for (int64_t w = 0; w <= radius; ++w) found = min(found, T(smallest[w / L][w % L]));
  return found;
}

// Whether the gradients of the weights of input channel x must be summed directly; dy and unit: those of the levels.
template <class T>
bool gradient_needs_direct(const ConvShape<T>& shape, int64_t n, const T* x, const T* dy, const T* unit,
                           Levels<T>& levels) {
  if (!levels.trusted) return true;
  const int64_t pixels = shape.height * shape.width;
  const Vec<T> squares = sum_of_squares(x, pixels), magnitudes = sum_of_magnitudes(x, pixels);
  if (sum_of_lanes<T>(magnitudes) == T(0)) return false;
  const T of_all = sum_of_lanes<T>(squares);
  if (!(of_all > kMinSquare<T> && of_all < kInfinity<T>)) return true;
  if (levels.largest == T(0)) return false;  // dy is zero
  // Products of all with all must stay within the range, too.
  const T product = std::sqrt(of_all) * levels.smallest;
  if (!(product > kMinSquare<T> && std::sqrt(of_all) * levels.largest * T(1e6) < kInfinity<T>)) return true;
  const T square = sum_of_lanes<T>(squares * levels.weight), sum = sum_of_lanes<T>(magnitudes * levels.weight);
  if (!(square > kMinSquare<T>)) return true;
  const T limit = square / sum;  // the usual size of what is not zero
  // What min_over_windows() adds and subtracts leaves errors.
  const T pairs = min_over_windows(shape, x, limit, levels) / limit - T(0.01);
  const T needed = std::sqrt(square * T(pixels) * levels.images) * T(kError / kGradAllowed) / T(n);
  if (T(kOneLevel) * (pairs - levels.missing_of_one) * limit >= needed) return false;
  if (!levels.all) count_missing(shape, dy, unit, levels);
  T found = 0;
  for (int j = 0; j < kLevels; ++j) found += T(kLevel[j + 1] - kLevel[j]) * max(T(0), pairs - levels.missing[j]);
  return !(found * limit >= needed);
}

}  // namespace mfef::cpu::MFEF_ISA
