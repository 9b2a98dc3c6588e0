// Channel and spatial attention of one unit of work: a block of kLanes images (ImageLanes), or one image (PixelLanes).
//
// The passes over a map are written once. A map is [channel][vector], its channels `step` elements apart; a vector
// holds one pixel of kLanes images, or kLanes neighbouring pixels of an image, rounded up with zeros. What a channel or
// a hidden unit has is one Value: a vector with an element per image, or a single number.
//
// Sums are taken in runs of kRun vectors, then over the runs, which keeps the rounding error near that of a pairwise
// sum.
#pragma once

#include "cpu/conv/direct.h"
#include "cpu/conv/weight_gradient.h"
#include "cpu/pack.h"

namespace mfef::cpu::MFEF_ISA {

constexpr int64_t kRun = 16;

// Hands out pieces of a thread's scratch, each aligned to a cache line. With a null base it only counts.
struct Carver {
  char* base;
  int64_t used = 0;
  // `count` elements for each of the pointers.
  template <class... P>
  void take(int64_t count, P*&... pieces) {
    ((pieces = base ? reinterpret_cast<P*>(base + used) : nullptr, used += round_up(count * int64_t(sizeof(P)), 64)),
     ...);
  }
};

// Whether v replaces the maximum m: it is greater, or the first NaN (as in torch.max). Of equal values the first stays.
template <class T>
MFEF_INLINE IVec<T> beats(Vec<T> v, Vec<T> m) {
  return ~(v <= m) & (m == m);
}

// What is kept of the place of a maximum: nothing where no gradient will ask for it.
//
// kTolerant: sums that are equal come out of an FFT with different rounding, so values that differ by no more than both
// their tolerances count as equal. The place moves only to a value that is greater than the one there by more than
// that, and so ends at the first of those that are equal to the maximum.
enum class Argmax { kNone, kFirst, kTolerant };

// A running maximum, which is the same for all of these, and the place of its first occurrence.
template <class T, Argmax kArgmax>
struct Maximum {
  Vec<T> value, edge;  // edge: the value at the place, plus its tolerance
  IVec<T> place;

  void begin(Vec<T> first, IVec<T> at, Vec<T> tolerance) {
    value = first;
    edge = first + tolerance;
    place = at;
  }
  // allowed: the lanes in which v counts.
  void meet(Vec<T> v, IVec<T> at, Vec<T> tolerance, IVec<T> allowed) {
    const IVec<T> greater = beats<T>(v, value) & allowed;
    if constexpr (kArgmax == Argmax::kFirst) place = greater ? at : place;
    if constexpr (kArgmax == Argmax::kTolerant) {
      const IVec<T> better = beats<T>(v, edge + tolerance) & allowed;
      place = better ? at : place;
      edge = better ? v + tolerance : edge;
    }
    value = greater ? v : value;
  }
};

// sum[j] += what f(i, run) adds to run[j], for i in [0, count): in runs of kRun, then over the runs.
template <class T, int kCount, class F>
MFEF_INLINE void sum_in_runs(int64_t count, Vec<T> (&sum)[kCount], const F& f) {
  for (int64_t begin = 0; begin < count; begin += kRun) {
    Vec<T> run[kCount] = {};
    const int64_t end = min(begin + kRun, count);
    for (int64_t i = begin; i < end; ++i) f(i, run);
    static_for<kCount>([&]<int j>() { sum[j] += run[j]; });
  }
}

template <class T>
MFEF_INLINE IVec<T> load_index(const typename IntOf<T>::type* p) {
  IVec<T> v;
  __builtin_memcpy(&v, p, sizeof(v));
  return v;
}
template <class T>
MFEF_INLINE void store_index(typename IntOf<T>::type* p, IVec<T> v) {
  __builtin_memcpy(p, &v, sizeof(v));
}

// 0, 1, 2, ...
template <class T>
MFEF_INLINE IVec<T> lane_numbers() {
  IVec<T> lane;
  for (int r = 0; r < kLanes<T>; ++r) lane[r] = r;
  return lane;
}

// --- lanes are images -------------------------------------------------------------------------------
//
// Every reduction is lane-wise: nothing is shuffled, and images never meet.

// to[j] = (init ? scale * init[j] : 0) + sum over i of weights[j * row + i * col] * v[i], lane-wise.
template <class T>
void dense_layer(const T* weights, int64_t rows, int64_t cols, int64_t row, int64_t col, const T* v, const T* init,
                 T scale, T* to) {
  constexpr int L = kLanes<T>;
  auto block = [&]<int kCount>(int64_t j, Index<kCount>) {
    Vec<T> acc[kCount];
    static_for<kCount>([&]<int r>() { acc[r] = init ? splat(scale * init[j + r]) : Vec<T>{}; });
    for (int64_t i = 0; i < cols; ++i) {
      Vec<T> x = load(v + i * L);
      static_for<kCount>([&]<int r>() { acc[r] += splat(weights[(j + r) * row + i * col]) * x; });
    }
    static_for<kCount>([&]<int r>() { store(to + (j + r) * L, acc[r]); });
  };
  int64_t j = 0;
  for (; j + 8 <= rows; j += 8) block(j, Index<8>{});
  in_fours(j, rows, block);
}

template <class T>
struct ImageLanes {
  static constexpr int L = kLanes<T>;
  using Int = typename IntOf<T>::type;
  using Value = Vec<T>;
  static constexpr int kValue = L;  // elements of a Value
  // The spatial convolution reads a map without borders where its tiles clip, and writes one without gaps.
  static constexpr bool kGaps = false;

  static int64_t vectors(int64_t pixels) { return pixels; }
  static int64_t step(int64_t pixels) { return channel_vectors(pixels) * L; }
  static ConvShape<T> shape(int64_t in, int64_t out, int64_t k, int64_t height, int64_t width) {
    return images_shape<T>(in, out, 1, k, height, width);
  }

  MFEF_INLINE static Value get(const T* values, int64_t i) { return load(values + i * L); }
  MFEF_INLINE static void set(T* values, int64_t i, Value v) { store(values + i * L, v); }
  // A Value as the lanes of a map meet it.
  MFEF_INLINE static Vec<T> spread(const T* values, int64_t i) { return load(values + i * L); }
  MFEF_INLINE static Value sum(Vec<T> v) { return v; }

  // The places of the pixels of a vector, and the lanes that hold a pixel.
  MFEF_INLINE static IVec<T> places(int64_t vector) { return isplat<T>(vector); }
  MFEF_INLINE static IVec<T> inside(IVec<T>, int64_t) { return ~IVec<T>{}; }
  template <Argmax kArgmax>
  static void set_max(const Maximum<T, kArgmax>& found, int64_t /*pixels*/, int64_t c, T* max, Int* max_index) {
    store(max + c * L, found.value);
    if (kArgmax != Argmax::kNone) store_index<T>(max_index + c * L, found.place);
  }

  static IVec<T> valid(int images) { return lane_numbers<T>() < isplat<T>(images); }
  // Sets values to zero in the lanes beyond the last image, whatever the parameters made of them.
  static void clear_unused(T* values, int64_t count, int images) {
    for (int64_t i = 0; i < count; ++i) set(values, i, valid(images) ? get(values, i) : Vec<T>{});
  }

  static void fc1(const T* weights, int64_t hidden, int64_t channels, const T* v, const T* bias, T* to) {
    dense_layer<T>(weights, hidden, channels, channels, 1, v, bias, T(1), to);
  }
  static void fc2(const T* weights, int64_t channels, int64_t hidden, const T* v, const T* bias, T* to) {
    dense_layer<T>(weights, channels, hidden, hidden, 1, v, bias, T(2), to);
  }
  // to = the transposed weights (cols, rows) times v.
  static void transposed(const T* weights, int64_t rows, int64_t cols, const T* v, T* to) {
    dense_layer<T>(weights, rows, cols, 1, rows, v, nullptr, T(0), to);
  }

  // Values as [image][count]; `to` is room for them.
  static const T* by_image(const T* values, int64_t count, int images, T* to) {
    scatter_rows<T>(values, 0, images, count, to);
    return to;
  }
  // grads[j][i] += sum over images r of a[j][r] * b[r][i]; a is [rows][lane], b is [image][cols].
  static void add_outer_products(const T* a, int64_t rows, const T* b, int64_t cols, int images, T* grads) {
    auto row_block = [&]<int kRows>(int64_t j, Index<kRows>) {
      auto block = [&]<int kVecs>(int64_t i, Index<kVecs>) {
        Vec<T> acc[kRows][kVecs] = {};
        for (int r = 0; r < images; ++r) {
          static_for<kVecs>([&]<int v>() {
            const Vec<T> right = load(b + r * cols + i + v * L);
            static_for<kRows>([&]<int k>() { acc[k][v] += splat(a[(j + k) * L + r]) * right; });
          });
        }
        static_for<kRows>([&]<int k>() {
          static_for<kVecs>([&]<int v>() {
            T* grad = grads + (j + k) * cols + i + v * L;
            store(grad, load(grad) + acc[k][v]);
          });
        });
      };
      int64_t i = 0;
      for (; i + 2 * L <= cols; i += 2 * L) block(i, Index<2>{});
      for (; i + L <= cols; i += L) block(i, Index<1>{});
      for (; i < cols; ++i) {
        for (int64_t k = j; k < j + kRows; ++k) {
          T sum = T(0);
          for (int r = 0; r < images; ++r) sum += a[k * L + r] * b[r * cols + i];
          grads[k * cols + i] += sum;
        }
      }
    };
    in_fours(0, rows, row_block);
  }

  template <class Memory, class Lane>
  static void save(const Lane* from, int64_t image, int images, int64_t count, Memory* to) {
    scatter_rows<T>(from, image, images, count, to);
  }
  template <class Memory, class Lane>
  static void restore(const Memory* from, int64_t image, int images, int64_t count, int64_t /*room*/, Lane* to) {
    gather_rows<T>(from, image, images, count, to);
  }

  // The maps that a convolution reads: themselves, or a copy with borders.
  static const T* bordered(const ConvShape<T>& shape, int64_t count, const T* from, int64_t /*step*/, T* padded) {
    if (shape.layout == kClip) return from;
    pad_images(shape, count, from, padded);
    return padded;
  }

  // The last step of the backward, through the pooling over pixels, for channels [begin, end). The result goes to `to`,
  // channels `to_step` elements apart, with `gap` vectors left out after every row (in place: grad + begin * step,
  // step, 0). The lanes beyond the last image are set to zero, since the weight gradient adds up all lanes. With pixels
  // in the lanes all that is different, so this pass has two forms.
  template <class A>
  static void finish_backward(const A& a, const T* grad, int64_t begin, int64_t end, int images, T* to, int64_t to_step,
                              int64_t gap) {
    const IVec<T> in_use = valid(images);
    const int64_t rows = gap == 0 ? 1 : a.args.height, width = a.pixels / rows;
    for (int64_t i = begin; i < end; ++i, to += to_step) {
      const Vec<T> from_mean = load(a.grad_mean + i * L) / splat(T(a.pixels)), from_max = load(a.grad_max + i * L);
      const IVec<T> at = load_index<T>(a.max_index + i * L);
      for (int64_t h = 0; h < rows; ++h) {
        T* row = to + h * (width + gap) * L;
        for (int64_t q = h * width; q < (h + 1) * width; ++q, row += L) {
          const Vec<T> d = load(grad + i * a.step + q * L) + from_mean + (at == isplat<T>(q) ? from_max : Vec<T>{});
          store(row, in_use ? d : Vec<T>{});
        }
      }
    }
  }
};

// --- lanes are pixels -------------------------------------------------------------------------------

template <class T>
MFEF_INLINE void add_scaled(T* to, const T* from, T scale, int64_t count) {
  int64_t i = 0;
  for (; i + kLanes<T> <= count; i += kLanes<T>) store(to + i, load(to + i) + splat(scale) * load(from + i));
  for (; i < count; ++i) to[i] += scale * from[i];
}

template <class T>
MFEF_INLINE T dot(const T* a, const T* b, int64_t count) {
  Vec<T> acc[4] = {};
  int64_t i = 0;
  for (; i + 4 * kLanes<T> <= count; i += 4 * kLanes<T>) {
    static_for<4>([&]<int j>() { acc[j] += load(a + i + j * kLanes<T>) * load(b + i + j * kLanes<T>); });
  }
  T sum = sum_of_lanes<T>((acc[0] + acc[1]) + (acc[2] + acc[3]));
  for (; i < count; ++i) sum += a[i] * b[i];
  return sum;
}

// The functions of ImageLanes for one image. A channel has only one value here, so the MLP has vectors along the
// channels, and its sums are divided differently.
template <class T>
struct PixelLanes {
  static constexpr int L = kLanes<T>;
  using Int = typename IntOf<T>::type;
  using Value = T;
  static constexpr int kValue = 1;
  static constexpr bool kGaps = true;

  static int64_t vectors(int64_t pixels) { return (pixels + L - 1) / L; }
  static int64_t step(int64_t pixels) { return round_up(pixels, L); }
  static ConvShape<T> shape(int64_t in, int64_t out, int64_t k, int64_t height, int64_t width) {
    return pixels_shape<T>(in, out, 1, k, height, width);
  }

  MFEF_INLINE static Value get(const T* values, int64_t i) { return values[i]; }
  MFEF_INLINE static void set(T* values, int64_t i, Value v) { values[i] = v; }
  MFEF_INLINE static Vec<T> spread(const T* values, int64_t i) { return splat(values[i]); }
  MFEF_INLINE static Value sum(Vec<T> v) { return sum_of_lanes<T>(v); }

  MFEF_INLINE static IVec<T> places(int64_t vector) { return lane_numbers<T>() + isplat<T>(vector * L); }
  MFEF_INLINE static IVec<T> inside(IVec<T> places, int64_t pixels) { return places < isplat<T>(pixels); }
  // The maximum of the lanes, and of equal ones the place that comes first.
  template <Argmax kArgmax>
  static void set_max(const Maximum<T, kArgmax>& found, int64_t pixels, int64_t c, T* max, Int* max_index) {
    T values[L];
    Int places[L];
    store(values, found.value);
    store_index<T>(places, found.place);
    T best = values[0];
    Int place = places[0];
    for (int r = 1; r < min<int64_t>(L, pixels); ++r) {
      const bool is_nan = values[r] != values[r], best_nan = best != best;
      const bool greater = is_nan ? !best_nan : values[r] > best;
      const bool equal = is_nan ? best_nan : values[r] == best;
      if (greater || (equal && places[r] < place)) {
        best = values[r];
        place = places[r];
      }
    }
    max[c] = best;
    max_index[c] = place;
  }

  static void clear_unused(T*, int64_t, int) {}

  static void fc1(const T* weights, int64_t hidden, int64_t channels, const T* v, const T* bias, T* to) {
    for (int64_t h = 0; h < hidden; ++h) to[h] = (bias ? bias[h] : T(0)) + dot(weights + h * channels, v, channels);
  }
  static void fc2(const T* weights, int64_t channels, int64_t hidden, const T* v, const T* bias, T* to) {
    for (int64_t c = 0; c < channels; ++c) {
      T sum = bias ? 2 * bias[c] : T(0);
      for (int64_t h = 0; h < hidden; ++h) sum += weights[c * hidden + h] * v[h];
      to[c] = sum;
    }
  }
  static void transposed(const T* weights, int64_t rows, int64_t cols, const T* v, T* to) {
    for (int64_t j = 0; j < rows; ++j) to[j] = T(0);
    for (int64_t i = 0; i < cols; ++i) add_scaled(to, weights + i * rows, v[i], rows);
  }

  static const T* by_image(const T* values, int64_t, int, T*) { return values; }
  static void add_outer_products(const T* a, int64_t rows, const T* b, int64_t cols, int, T* grads) {
    for (int64_t j = 0; j < rows; ++j) add_scaled(grads + j * cols, b, a[j], cols);
  }

  template <class Memory, class Lane>
  static void save(const Lane* from, int64_t image, int, int64_t count, Memory* to) {
    for (int64_t i = 0; i < count; ++i) to[image * count + i] = Memory(from[i]);
  }
  template <class Memory, class Lane>
  static void restore(const Memory* from, int64_t image, int, int64_t count, int64_t room, Lane* to) {
    for (int64_t i = 0; i < count; ++i) to[i] = Lane(from[image * count + i]);
    for (int64_t i = count; i < room; ++i) to[i] = 0;
  }

  static const T* bordered(const ConvShape<T>& shape, int64_t count, const T* from, int64_t step, T* padded) {
    pad_pixels(shape, count, from, step, padded);
    return padded;
  }

  // In place, and only one pixel of a channel has the maximum.
  template <class A>
  static void finish_backward(const A& a, T* grad) {
    for (int64_t c = 0; c < a.channels; ++c) {
      const Vec<T> from_mean = splat(a.grad_mean[c] / T(a.pixels));
      T* map = grad + c * a.step;
      for (int64_t q = 0; q < a.step; q += L) store(map + q, load(map + q) + from_mean);
      // The index comes from a saved tensor; a foreign one must not make this write elsewhere.
      const int64_t at = a.max_index[c];
      if (at >= 0 && at < a.pixels) map[at] += a.grad_max[c];
    }
  }
};

// --- the attention ----------------------------------------------------------------------------------

// grads += the gradient of the spatial convolution's weights, (2, k, k); `ordered` and `scratch` are room.
template <class T>
void spatial_weight_grad(const ConvShape<T>& shape, const T* x, const T* dy, int64_t dy_channel, T* ordered, T* scratch,
                         T* grads) {
  const int64_t taps = shape.taps(), row = round_up(taps, kLanes<T>);  // one output channel: tiles of one
  for (int64_t i = 0; i < 2 * row; ++i) ordered[i] = T(0);
  weight_grad_direct<T>(shape, x, dy, dy_channel, ordered, scratch);
  for (int64_t i = 0; i < 2; ++i) {
    for (int64_t t = 0; t < taps; ++t) grads[i * taps + t] += ordered[i * row + t];
  }
}

template <class T, class Lanes>
struct Attention {
  static constexpr int L = kLanes<T>;
  using Int = typename IntOf<T>::type;
  using Value = typename Lanes::Value;

  const BlockArgs& args;
  int64_t channels, pixels, vectors, step;
  ConvShape<T> spatial, spatial_back;
  // Values of channels. tolerance: see Maximum.
  T *mean, *max, *gate, *tolerance;
  Int* max_index;
  // Values of hidden units: before the ReLU for the mean and the maximum; after it, their sum.
  T *hidden_mean, *hidden_max, *hidden_sum;
  // Maps: (max, mean) over channels and the gate. raw: a convolution's output that has gaps between rows.
  T *pooled, *padded, *raw, *spatial_gate;
  Int* channel_index;
  T* packed;  // weights of the spatial convolution
  // Backward.
  T *grad_gate, *padded_grad, *grad_pooled, *grad_logit, *grad_hidden_mean, *grad_hidden_max, *grad_mean, *grad_max;
  T *grad_rows, *sums, *spatial_sums;

  Attention(const BlockArgs& a, Carver& carver, bool backward)
      : args(a),
        channels(a.out),
        pixels(a.height * a.width),
        vectors(Lanes::vectors(pixels)),
        step(Lanes::step(pixels)),
        spatial(Lanes::shape(2, 1, a.spatial_k, a.height, a.width)),
        spatial_back(Lanes::shape(1, 2, a.spatial_k, a.height, a.width)) {
    constexpr int kValue = Lanes::kValue;
    carver.take(channels * kValue, mean, max, max_index);
    carver.take(round_up(channels * kValue, L), gate);
    carver.take(channels * L, tolerance);
    carver.take(a.hidden * kValue, hidden_mean, hidden_max, hidden_sum);
    carver.take(2 * step, pooled);
    carver.take(2 * spatial.channel, padded);
    carver.take(Lanes::kGaps ? 2 * spatial.out_channel : 0, raw);
    carver.take(step, spatial_gate, channel_index);
    carver.take(spatial.weight_count(), packed);
    if (!backward) return;
    carver.take(channels * kValue, grad_logit, grad_mean, grad_max);
    carver.take(channels * L, grad_rows);
    carver.take(a.hidden * kValue, grad_hidden_mean, grad_hidden_max);
    carver.take(2 * step, grad_pooled);
    carver.take(step, grad_gate);
    carver.take(spatial_back.channel, padded_grad);
    carver.take(weight_grad_scratch<T>(int(a.spatial_k)), sums);
    carver.take(weight_grad_elements(spatial), spatial_sums);
  }

  static const T* real(const void* p) { return static_cast<const T*>(p); }

  // Whether a gradient will ask for the places of maxima. Across the lanes of PixelLanes they decide between zeros of
  // either sign.
  bool needs_argmax() const { return args.save || Lanes::kValue == 1; }

  // Mean, maximum and the place of its first occurrence over the pixels of channels [begin, end). tolerant: the
  // tolerance of these channels has been set; otherwise it is set to zero.
  void pool_pixels(const T* y, int64_t begin, int64_t end, bool tolerant) {
    if (!needs_argmax()) return pool_pixels<Argmax::kNone>(y, begin, end);
    if (Lanes::kValue > 1 && tolerant) return pool_pixels<Argmax::kTolerant>(y, begin, end);
    for (int64_t c = begin; c < end; ++c) store(tolerance + c * L, Vec<T>{});
    pool_pixels<Argmax::kFirst>(y, begin, end);
  }
  template <Argmax kArgmax>
  void pool_pixels(const T* y, int64_t begin, int64_t end) {
    in_fours(begin, end, [&]<int kCount>(int64_t c, Index<kCount>) {
      Vec<T> sum[kCount] = {}, gap[kCount];
      Maximum<T, kArgmax> found[kCount];
      const T* map[kCount];
      static_for<kCount>([&]<int j>() {
        map[j] = y + (c + j) * step;
        gap[j] = kArgmax == Argmax::kTolerant ? load(tolerance + (c + j) * L) : Vec<T>{};
        found[j].begin(load(map[j]), Lanes::places(0), gap[j]);
      });
      sum_in_runs<T>(vectors, sum, [&](int64_t p, Vec<T>(&run)[kCount]) {
        const IVec<T> places = Lanes::places(p);
        static_for<kCount>([&]<int j>() {
          const Vec<T> v = load(map[j] + p * L);
          run[j] += v;
          found[j].meet(v, places, gap[j], Lanes::inside(places, pixels));
        });
      });
      static_for<kCount>([&]<int j>() {
        Lanes::set(mean, c + j, Lanes::sum(sum[j]) / T(pixels));
        Lanes::set_max(found[j], pixels, c + j, max, max_index);
      });
    });
  }

  // The gate of every channel, and the hidden layer, out of mean and maximum.
  void channel_gate() {
    Lanes::fc1(real(args.fc1_weight), args.hidden, channels, mean, real(args.fc1_bias), hidden_mean);
    Lanes::fc1(real(args.fc1_weight), args.hidden, channels, max, real(args.fc1_bias), hidden_max);
    for (int64_t h = 0; h < args.hidden; ++h) {
      const Value m = Lanes::get(hidden_mean, h), x = Lanes::get(hidden_max, h), zero{};
      // Not (v > 0 ? v : 0), so that NaN passes as it does through torch.relu.
      Lanes::set(hidden_sum, h, (m <= zero ? zero : m) + (x <= zero ? zero : x));
    }
    // MLP(mean) + MLP(max) = fc2 (relu(...) + relu(...)) + 2 bias.
    Lanes::fc2(real(args.fc2_weight), channels, args.hidden, hidden_sum, real(args.fc2_bias), gate);
    for (int64_t i = 0; i < channels * Lanes::kValue; i += L) store(gate + i, sigmoid<T>(load(gate + i)));
  }

  // Maximum (and its lowest channel) and mean over channels of z = y * gate, for each pixel.
  template <Argmax kArgmax>
  void pool_channels(const T* y) {
    constexpr bool kTolerant = kArgmax == Argmax::kTolerant;
    in_fours(0, vectors, [&]<int kCount>(int64_t p, Index<kCount>) {
      Vec<T> sum[kCount] = {};
      Maximum<T, kArgmax> found[kCount];
      const Vec<T> first = Lanes::spread(gate, 0), first_gap = kTolerant ? load(tolerance) * first : Vec<T>{};
      static_for<kCount>([&]<int j>() { found[j].begin(load(y + (p + j) * L) * first, IVec<T>{}, first_gap); });
      sum_in_runs<T>(channels, sum, [&](int64_t c, Vec<T>(&run)[kCount]) {
        const Vec<T> g = Lanes::spread(gate, c), gap = kTolerant ? load(tolerance + c * L) * g : Vec<T>{};
        static_for<kCount>([&]<int j>() {
          const Vec<T> z = load(y + c * step + (p + j) * L) * g;
          run[j] += z;
          found[j].meet(z, isplat<T>(c), gap, ~IVec<T>{});
        });
      });
      static_for<kCount>([&]<int j>() {
        store(pooled + (p + j) * L, found[j].value);
        store(pooled + step + (p + j) * L, sum[j] / splat(T(channels)));
        if (kArgmax != Argmax::kNone) store_index<T>(channel_index + (p + j) * L, found[j].place);
      });
    });
  }

  // to = the convolution of `from`, flipped for the data gradient. Returns `from` as a convolution reads it.
  const T* convolve(const ConvShape<T>& shape, bool flipped, const T* from, T* with_borders, T* to) {
    pack_weights<T>(shape, flipped, real(args.spatial_weight), packed);
    const T* input = Lanes::bordered(shape, shape.in, from, step, with_borders);
    convolve_direct<T>(shape, input, packed, nullptr, false, Lanes::kGaps ? raw : to);
    if (Lanes::kGaps) unpad_pixels(shape, shape.out, raw, to, step);
    return input;
  }

  // After pool_pixels() of all channels. tolerant: some of them have a tolerance.
  void forward(const T* y, bool tolerant) {
    channel_gate();
    if (!needs_argmax()) {
      pool_channels<Argmax::kNone>(y);
    } else if (Lanes::kValue > 1 && tolerant) {
      pool_channels<Argmax::kTolerant>(y);
    } else {
      pool_channels<Argmax::kFirst>(y);
    }
    convolve(spatial, false, pooled, padded, spatial_gate);
    for (int64_t i = 0; i < vectors * L; i += L) store(spatial_gate + i, sigmoid<T>(load(spatial_gate + i)));
  }

  void save(int64_t image, int images) {
    Lanes::save(mean, image, images, channels, static_cast<T*>(args.mean));
    Lanes::save(max, image, images, channels, static_cast<T*>(args.max));
    Lanes::save(max_index, image, images, channels, args.max_index);
    Lanes::save(spatial_gate, image, images, pixels, static_cast<T*>(args.spatial_gate));
    Lanes::save(channel_index, image, images, pixels, args.channel_index);
  }

  void restore(int64_t image, int images) {
    Lanes::restore(real(args.mean), image, images, channels, channels, mean);
    Lanes::restore(real(args.max), image, images, channels, channels, max);
    Lanes::restore(args.max_index, image, images, channels, channels, max_index);
    Lanes::restore(real(args.spatial_gate), image, images, pixels, step, spatial_gate);
    Lanes::restore(args.channel_index, image, images, pixels, step, channel_index);
  }

  // The gradient of the spatial gate's logit, and the pooled maps again, which the forward did not save.
  void backward_spatial_gate(const T* y, const T* grad) {
    in_fours(0, vectors, [&]<int kCount>(int64_t p, Index<kCount>) {
      Vec<T> sum[2 * kCount] = {}, top[kCount] = {};  // of grad * z, then of z
      IVec<T> at[kCount];
      static_for<kCount>([&]<int j>() { at[j] = load_index<T>(channel_index + (p + j) * L); });
      sum_in_runs<T>(channels, sum, [&](int64_t c, Vec<T>(&run)[2 * kCount]) {
        const Vec<T> g = Lanes::spread(gate, c);
        static_for<kCount>([&]<int j>() {
          const int64_t e = c * step + (p + j) * L;
          const Vec<T> z = load(y + e) * g;
          run[j] += load(grad + e) * z;
          run[kCount + j] += z;
          top[j] = at[j] == isplat<T>(c) ? z : top[j];
        });
      });
      static_for<kCount>([&]<int j>() {
        const int64_t e = (p + j) * L;
        const Vec<T> s = load(spatial_gate + e);
        store(grad_gate + e, sum[j] * (s * (T(1) - s)));
        store(pooled + e, top[j]);
        store(pooled + step + e, sum[kCount + j] / splat(T(channels)));
      });
    });
  }

  // Through z = y * gate: grad becomes the part of dy that does not come through the pooling over pixels.
  void backward_product(const T* y, T* grad) {
    in_fours(0, channels, [&]<int kCount>(int64_t c, Index<kCount>) {
      Vec<T> sum[kCount] = {};
      sum_in_runs<T>(vectors, sum, [&](int64_t p, Vec<T>(&run)[kCount]) {
        const Vec<T> s = load(spatial_gate + p * L), from_max = load(grad_pooled + p * L);
        const Vec<T> from_mean = load(grad_pooled + step + p * L) / splat(T(channels));
        const IVec<T> at = load_index<T>(channel_index + p * L);
        static_for<kCount>([&]<int j>() {
          const int64_t e = (c + j) * step + p * L;
          Vec<T> dz = load(grad + e) * s + from_mean;
          dz += at == isplat<T>(c + j) ? from_max : Vec<T>{};
          run[j] += dz * load(y + e);
          store(grad + e, dz * Lanes::spread(gate, c + j));
        });
      });
      static_for<kCount>([&]<int j>() {
        const Value g = Lanes::get(gate, c + j);
        Lanes::set(grad_logit, c + j, Lanes::sum(sum[j]) * (g * (T(1) - g)));
      });
    });
  }

  // Through the MLP, whose hidden layer channel_gate() has left.
  void backward_mlp() {
    Lanes::transposed(real(args.fc2_weight), args.hidden, channels, grad_logit, grad_hidden_mean);
    for (int64_t h = 0; h < args.hidden; ++h) {
      const Value g = Lanes::get(grad_hidden_mean, h), zero{};
      Lanes::set(grad_hidden_mean, h, Lanes::get(hidden_mean, h) <= zero ? zero : g);
      Lanes::set(grad_hidden_max, h, Lanes::get(hidden_max, h) <= zero ? zero : g);
    }
    Lanes::transposed(real(args.fc1_weight), channels, args.hidden, grad_hidden_mean, grad_mean);
    Lanes::transposed(real(args.fc1_weight), channels, args.hidden, grad_hidden_max, grad_max);
  }

  void add_mlp_gradients(int64_t image, int images, T* partials) {
    const PartialLayout& to = args.partial;
    const T* logits = Lanes::by_image(grad_logit, channels, images, grad_rows);
    const T *means = real(args.mean) + image * channels, *maxima = real(args.max) + image * channels;
    Lanes::add_outer_products(hidden_sum, args.hidden, logits, channels, images, partials + to.fc2_weight);
    Lanes::add_outer_products(grad_hidden_mean, args.hidden, means, channels, images, partials + to.fc1_weight);
    Lanes::add_outer_products(grad_hidden_max, args.hidden, maxima, channels, images, partials + to.fc1_weight);
    for (int r = 0; r < images; ++r) {
      for (int64_t i = 0; i < channels; ++i) partials[to.fc2_bias + i] += 2 * logits[r * channels + i];
      for (int64_t h = 0; h < args.hidden; ++h) {
        const int64_t at = h * Lanes::kValue + r;
        partials[to.fc1_bias + h] += grad_hidden_mean[at] + grad_hidden_max[at];
      }
    }
  }

  // grad holds d loss / d result on entry, and d loss / d y after Lanes::finish_backward(), which is left to the
  // caller: it may finish some channels at a time. Parameter gradients are added to `partials`.
  void backward(const T* y, T* grad, int64_t image, int images, T* partials) {
    channel_gate();
    Lanes::clear_unused(gate, channels, images);
    backward_spatial_gate(y, grad);
    const T* dy = convolve(spatial_back, true, grad_gate, padded_grad, grad_pooled);
    if (args.need_parameters) {
      // In the images plan the tiles take dy without borders.
      const T* x = Lanes::bordered(spatial, 2, pooled, step, padded);
      spatial_weight_grad<T>(spatial, x, Lanes::kGaps ? dy + spatial_back.lead : grad_gate,
                             Lanes::kGaps ? spatial_back.channel : step, spatial_sums, sums,
                             partials + args.partial.spatial);
    }
    backward_product(y, grad);
    backward_mlp();
    if (args.need_parameters) add_mlp_gradients(image, images, partials);
  }
};

template <class T>
using AttentionImages = Attention<T, ImageLanes<T>>;
template <class T>
using AttentionPixels = Attention<T, PixelLanes<T>>;

}  // namespace mfef::cpu::MFEF_ISA
