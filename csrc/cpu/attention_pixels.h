// Channel + spatial attention of one image, lanes over neighbouring pixels: for few images or large maps.
//
// Maps are [channel][row], a row being the pixels of a channel rounded up to whole vectors; the rest of
// a row is zero and stays without influence.
#pragma once

#include "attention_images.h"

namespace mfef::cpu::MFEF_ISA {

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
    static_for<4>([&](auto j) {
      constexpr int64_t at = decltype(j)::value * kLanes<T>;
      acc[decltype(j)::value] += load(a + i + at) * load(b + i + at);
    });
  }
  T sum = sum_of_lanes<T>((acc[0] + acc[1]) + (acc[2] + acc[3]));
  for (; i < count; ++i) sum += a[i] * b[i];
  return sum;
}

template <class T>
struct AttentionPixels {
  const BlockArgs& args;
  int64_t channels, pixels, row;
  ConvMap<T> spatial, spatial_back;
  T *mean, *max, *gate, *hidden_mean, *hidden_max, *hidden_sum;
  typename IntOf<T>::type *max_index, *channel_index;
  T *pooled, *padded, *raw, *spatial_gate, *packed;
  T *packed_back, *grad_gate, *padded_grad, *grad_pooled, *grad_logit, *grad_hidden_mean, *grad_hidden_max;
  T *grad_mean, *grad_max, *sums, *spatial_sums;

  AttentionPixels(const BlockArgs& a, Carver& carver, bool backward) : args(a) {
    channels = a.out;
    pixels = a.height * a.width;
    row = round_up(pixels, kLanes<T>);
    spatial = pixels_map<T>(2, 1, 1, a.spatial_k, a.height, a.width);
    spatial_back = pixels_map<T>(1, 2, 1, a.spatial_k, a.height, a.width);
    mean = carver.take<T>(channels);
    max = carver.take<T>(channels);
    gate = carver.take<T>(channels);
    max_index = carver.take<typename IntOf<T>::type>(channels);
    hidden_mean = carver.take<T>(a.hidden);
    hidden_max = carver.take<T>(a.hidden);
    hidden_sum = carver.take<T>(a.hidden);
    pooled = carver.take<T>(2 * row);
    padded = carver.take<T>(2 * spatial.channel);
    raw = carver.take<T>(2 * spatial.out_channel);
    spatial_gate = carver.take<T>(row);
    channel_index = carver.take<typename IntOf<T>::type>(row);
    packed = carver.take<T>(spatial.weight_count());
    if (!backward) return;
    packed_back = carver.take<T>(spatial.weight_count());
    grad_gate = carver.take<T>(row);
    padded_grad = carver.take<T>(spatial_back.channel);
    grad_pooled = carver.take<T>(2 * row);
    grad_logit = carver.take<T>(channels);
    grad_hidden_mean = carver.take<T>(a.hidden);
    grad_hidden_max = carver.take<T>(a.hidden);
    grad_mean = carver.take<T>(channels);
    grad_max = carver.take<T>(channels);
    sums = carver.take<T>(weight_grad_scratch<T>(int(a.spatial_k)));
    spatial_sums = carver.take<T>(weight_grad_elements(spatial));
  }

  void pool_pixels(const T* y, int64_t begin, int64_t end) {
    constexpr int L = kLanes<T>;
    using I = typename IntOf<T>::type;
    IVec<T> lane;
    for (int r = 0; r < L; ++r) lane[r] = I(r);
    for (int64_t c = begin; c < end; ++c) {
      const T* map = y + c * row;
      Vec<T> sum{}, top = load(map);
      IVec<T> at = lane;
      for (int64_t p0 = 0; p0 < row; p0 += kRun * L) {
        Vec<T> part{};
        const int64_t run_end = least(p0 + kRun * L, row);
        for (int64_t p = p0; p < run_end; p += L) {
          Vec<T> v = load(map + p);
          IVec<T> place = lane + isplat<T>(p);
          part += v;
          IVec<T> better = beats<T>(v, top) & (place < isplat<T>(pixels));
          top = better ? v : top;
          at = better ? place : at;
        }
        sum += part;
      }
      T tops[L];
      I places[L];
      store(tops, top);
      __builtin_memcpy(places, &at, sizeof(at));
      T best = tops[0];
      I place = places[0];
      for (int r = 1; r < least<int64_t>(L, pixels); ++r) {
        const bool is_nan = tops[r] != tops[r], best_nan = best != best;
        const bool greater = is_nan ? !best_nan : tops[r] > best;
        const bool equal = is_nan ? best_nan : tops[r] == best;
        if (greater || (equal && places[r] < place)) {
          best = tops[r];
          place = places[r];
        }
      }
      mean[c] = sum_of_lanes<T>(sum) / T(pixels);
      max[c] = best;
      max_index[c] = place;
    }
  }

  void hidden_layer() {
    const T* w = static_cast<const T*>(args.fc1_weight);
    const T* b = static_cast<const T*>(args.fc1_bias);
    for (int64_t h = 0; h < args.hidden; ++h) {
      const T start = b ? b[h] : T(0);
      const T m = hidden_mean[h] = start + dot(w + h * channels, mean, channels);
      const T x = hidden_max[h] = start + dot(w + h * channels, max, channels);
      hidden_sum[h] = (m <= T(0) ? T(0) : m) + (x <= T(0) ? T(0) : x);
    }
  }

  void channel_gate() {
    constexpr int L = kLanes<T>;
    hidden_layer();
    const T* w = static_cast<const T*>(args.fc2_weight);
    const T* b = static_cast<const T*>(args.fc2_bias);
    for (int64_t c0 = 0; c0 < channels; c0 += L) {
      const int count = int(least<int64_t>(L, channels - c0));
      T logit[L] = {};
      for (int r = 0; r < count; ++r) {
        T sum = b ? 2 * b[c0 + r] : T(0);
        for (int64_t h = 0; h < args.hidden; ++h) sum += w[(c0 + r) * args.hidden + h] * hidden_sum[h];
        logit[r] = sum;
      }
      store(logit, sigmoid<T>(load(logit)));
      for (int r = 0; r < count; ++r) gate[c0 + r] = logit[r];
    }
  }

  void pool_channels(const T* y) {
    constexpr int L = kLanes<T>;
    auto block = [&](int64_t p, auto count) {
      constexpr int kCount = decltype(count)::value;
      Vec<T> sum[kCount], top[kCount];
      IVec<T> at[kCount];
      static_for<kCount>([&](auto j) {
        constexpr int j_ = decltype(j)::value;
        sum[j_] = Vec<T>{};
        top[j_] = load(y + p + j_ * L) * splat(gate[0]);
        at[j_] = IVec<T>{};
      });
      for (int64_t c0 = 0; c0 < channels; c0 += kRun) {
        Vec<T> part[kCount] = {};
        const int64_t end = least(c0 + kRun, channels);
        for (int64_t c = c0; c < end; ++c) {
          static_for<kCount>([&](auto j) {
            constexpr int j_ = decltype(j)::value;
            Vec<T> z = load(y + c * row + p + j_ * L) * splat(gate[c]);
            part[j_] += z;
            IVec<T> better = beats<T>(z, top[j_]);
            top[j_] = better ? z : top[j_];
            at[j_] = better ? isplat<T>(c) : at[j_];
          });
        }
        static_for<kCount>([&](auto j) { sum[decltype(j)::value] += part[decltype(j)::value]; });
      }
      static_for<kCount>([&](auto j) {
        constexpr int j_ = decltype(j)::value;
        store(pooled + p + j_ * L, top[j_]);
        store(pooled + row + p + j_ * L, sum[j_] / splat(T(channels)));
        __builtin_memcpy(channel_index + p + j_ * L, &at[j_], sizeof(at[j_]));
      });
    };
    int64_t p = 0;
    for (; p + 4 * L <= row; p += 4 * L) block(p, Index<4>{});
    for (; p < row; p += L) block(p, Index<1>{});
  }

  void spatial_gates() {
    constexpr int L = kLanes<T>;
    pack_weights<T>(spatial, false, static_cast<const T*>(args.spatial_weight), packed);
    pad_pixels(spatial, 2, pooled, row, padded);
    conv_map<T>(spatial, padded, packed, nullptr, false, raw);
    unpad_pixels(spatial, 1, raw, spatial_gate, row);
    for (int64_t p = 0; p < row; p += L) store(spatial_gate + p, sigmoid<T>(load(spatial_gate + p)));
  }

  // After pool_pixels() of all channels.
  void forward(const T* y) {
    channel_gate();
    pool_channels(y);
    spatial_gates();
  }

  void save(int64_t image) {
    auto copy = [image](auto* from, int64_t count, auto* to) {
      for (int64_t i = 0; i < count; ++i) {
        to[image * count + i] = static_cast<__typeof__(to[0] + 0)>(from[i]);
      }
    };
    copy(mean, channels, static_cast<T*>(args.mean));
    copy(max, channels, static_cast<T*>(args.max));
    copy(max_index, channels, args.max_index);
    copy(spatial_gate, pixels, static_cast<T*>(args.spatial_gate));
    copy(channel_index, pixels, args.channel_index);
  }

  void restore(int64_t image) {
    auto copy = [image](const auto* from, int64_t count, int64_t room, auto* to) {
      for (int64_t i = 0; i < count; ++i) to[i] = static_cast<__typeof__(to[0] + 0)>(from[image * count + i]);
      for (int64_t i = count; i < room; ++i) to[i] = 0;
    };
    copy(static_cast<const T*>(args.mean), channels, channels, mean);
    copy(static_cast<const T*>(args.max), channels, channels, max);
    copy(args.max_index, channels, channels, max_index);
    copy(static_cast<const T*>(args.spatial_gate), pixels, row, spatial_gate);
    copy(args.channel_index, pixels, row, channel_index);
  }

  MFEF_INLINE IVec<T> index_at(const typename IntOf<T>::type* p) {
    IVec<T> v;
    __builtin_memcpy(&v, p, sizeof(v));
    return v;
  }

  // As AttentionImages::backward.
  void backward(const T* y, T* grad, T* partials) {
    constexpr int L = kLanes<T>;
    channel_gate();  // again; it leaves the hidden layer too
    auto gate_block = [&](int64_t p, auto count) {
      constexpr int kCount = decltype(count)::value;
      Vec<T> product[kCount], sum[kCount], top[kCount];
      IVec<T> at[kCount];
      static_for<kCount>([&](auto j) {
        constexpr int j_ = decltype(j)::value;
        product[j_] = sum[j_] = top[j_] = Vec<T>{};
        at[j_] = index_at(channel_index + p + j_ * L);
      });
      for (int64_t c0 = 0; c0 < channels; c0 += kRun) {
        Vec<T> product_part[kCount] = {}, sum_part[kCount] = {};
        const int64_t end = least(c0 + kRun, channels);
        for (int64_t c = c0; c < end; ++c) {
          static_for<kCount>([&](auto j) {
            constexpr int j_ = decltype(j)::value;
            const int64_t e = c * row + p + j_ * L;
            Vec<T> z = load(y + e) * splat(gate[c]);
            product_part[j_] += load(grad + e) * z;
            sum_part[j_] += z;
            top[j_] = at[j_] == isplat<T>(c) ? z : top[j_];
          });
        }
        static_for<kCount>([&](auto j) {
          product[decltype(j)::value] += product_part[decltype(j)::value];
          sum[decltype(j)::value] += sum_part[decltype(j)::value];
        });
      }
      static_for<kCount>([&](auto j) {
        constexpr int j_ = decltype(j)::value;
        Vec<T> s = load(spatial_gate + p + j_ * L);
        store(grad_gate + p + j_ * L, product[j_] * (s * (T(1) - s)));
        store(pooled + p + j_ * L, top[j_]);
        store(pooled + row + p + j_ * L, sum[j_] / splat(T(channels)));
      });
    };
    int64_t p = 0;
    for (; p + 4 * L <= row; p += 4 * L) gate_block(p, Index<4>{});
    for (; p < row; p += L) gate_block(p, Index<1>{});

    pack_weights<T>(spatial_back, true, static_cast<const T*>(args.spatial_weight), packed_back);
    pad_pixels(spatial_back, 1, grad_gate, row, padded_grad);
    conv_map<T>(spatial_back, padded_grad, packed_back, nullptr, false, raw);
    unpad_pixels(spatial_back, 2, raw, grad_pooled, row);
    if (args.need_parameters) {
      pad_pixels(spatial, 2, pooled, row, padded);
      spatial_weight_grad<T>(spatial, padded, padded_grad + spatial_back.lead, spatial_back.channel, spatial_sums, sums,
                             partials + args.partial.spatial);
    }

    for (int64_t c = 0; c < channels; ++c) {
      Vec<T> sum{}, g = splat(gate[c]);
      for (int64_t p0 = 0; p0 < row; p0 += kRun * L) {
        Vec<T> part{};
        const int64_t end = least(p0 + kRun * L, row);
        for (int64_t q = p0; q < end; q += L) {
          T* e = grad + c * row + q;
          Vec<T> dz = load(e) * load(spatial_gate + q) + load(grad_pooled + row + q) / splat(T(channels));
          dz += index_at(channel_index + q) == isplat<T>(c) ? load(grad_pooled + q) : Vec<T>{};
          part += dz * load(y + c * row + q);
          store(e, dz * g);
        }
        sum += part;
      }
      grad_logit[c] = sum_of_lanes<T>(sum) * (gate[c] * (T(1) - gate[c]));
    }

    const T* fc1 = static_cast<const T*>(args.fc1_weight);
    const T* fc2 = static_cast<const T*>(args.fc2_weight);
    for (int64_t h = 0; h < args.hidden; ++h) grad_hidden_mean[h] = T(0);
    for (int64_t c = 0; c < channels; ++c) {
      for (int64_t h = 0; h < args.hidden; ++h) grad_hidden_mean[h] += fc2[c * args.hidden + h] * grad_logit[c];
    }
    for (int64_t c = 0; c < channels; ++c) grad_mean[c] = grad_max[c] = T(0);
    for (int64_t h = 0; h < args.hidden; ++h) {
      const T g = grad_hidden_mean[h];
      grad_hidden_mean[h] = hidden_mean[h] <= T(0) ? T(0) : g;
      grad_hidden_max[h] = hidden_max[h] <= T(0) ? T(0) : g;
      add_scaled(grad_mean, fc1 + h * channels, grad_hidden_mean[h], channels);
      add_scaled(grad_max, fc1 + h * channels, grad_hidden_max[h], channels);
    }
    if (args.need_parameters) {
      for (int64_t h = 0; h < args.hidden; ++h) {
        add_scaled(partials + args.partial.fc2_weight + h * channels, grad_logit, hidden_sum[h], channels);
        T* grads = partials + args.partial.fc1_weight + h * channels;
        add_scaled(grads, mean, grad_hidden_mean[h], channels);
        add_scaled(grads, max, grad_hidden_max[h], channels);
        partials[args.partial.fc1_bias + h] += grad_hidden_mean[h] + grad_hidden_max[h];
      }
      add_scaled(partials + args.partial.fc2_bias, grad_logit, T(2), channels);
    }
    for (int64_t c = 0; c < channels; ++c) {
      const Vec<T> from_mean = splat(grad_mean[c] / T(pixels));
      T* map = grad + c * row;
      for (int64_t q = 0; q < row; q += L) store(map + q, load(map + q) + from_mean);
      // The index was saved by the forward; a call with a foreign tensor must not write elsewhere.
      const int64_t at = max_index[c];
      if (at >= 0 && at < pixels) map[at] += grad_max[c];
    }
  }
};

}  // namespace mfef::cpu::MFEF_ISA
