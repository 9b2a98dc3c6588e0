// Channel + spatial attention of a block of kLanes images: every reduction over channels or pixels is
// lane-wise, so there is no shuffle, and one image never meets another.
//
// Maps are [channel][pixel][lane], channels `step` elements apart; vectors per channel [channel][lane]; per pixel
// [pixel][lane]. Sums have two levels (runs of kRun, then the runs), which keeps the rounding error near that of a
// pairwise sum.
#pragma once

#include "conv_map.h"
#include "maps.h"

namespace mfef::cpu::MFEF_ISA {

constexpr int64_t kRun = 16;

// Hands out pieces of a thread's scratch, each aligned to a cache line. With a null base it only counts.
struct Carver {
  char* base;
  int64_t used = 0;
  template <class T>
  T* take(int64_t count) {
    T* at = base ? reinterpret_cast<T*>(base + used) : nullptr;
    used += round_up(count * int64_t(sizeof(T)), 64);
    return at;
  }
};

// v beats m as a maximum: greater, or the first NaN (as torch.max has it). Ties keep the first.
template <class T>
MFEF_INLINE IVec<T> beats(Vec<T> v, Vec<T> m) {
  return ~(v <= m) & (m == m);
}

// A running maximum and its first place. kSlack: values are right to `slack` only, since by way of spectra equal sums
// come out different, and are equal where their slacks meet. The place then goes on only to what beats the value there
// by more, so that it ends at the first of those that are equal to the maximum.
template <class T, bool kSlack>
struct Maximum {
  Vec<T> value, edge;  // edge: the value at the place and its slack
  IVec<T> place{};

  void begin(Vec<T> first, Vec<T> slack) {
    value = first;
    edge = first + slack;
  }
  void meet(Vec<T> v, int64_t p, Vec<T> slack) {
    const IVec<T> better = beats<T>(v, kSlack ? edge + slack : value);
    place = better ? isplat<T>(p) : place;
    if constexpr (kSlack) {
      edge = better ? v + slack : edge;
      value = beats<T>(v, value) ? v : value;
    } else {
      value = better ? v : value;
    }
  }
};

// to[j] = (init ? scale * init[j] : 0) + sum_i weights[j * row + i * col] * v[i], lane-wise.
template <class T>
void dense_layer(const T* weights, int64_t rows, int64_t cols, int64_t row, int64_t col, const T* v, const T* init,
                 T scale, T* to) {
  constexpr int L = kLanes<T>;
  auto block = [&](int64_t j, auto count) {
    constexpr int kCount = decltype(count)::value;
    Vec<T> acc[kCount];
    static_for<kCount>([&](auto r) {
      constexpr int r_ = decltype(r)::value;
      acc[r_] = init ? splat(scale * init[j + r_]) : Vec<T>{};
    });
    for (int64_t i = 0; i < cols; ++i) {
      Vec<T> x = load(v + i * L);
      static_for<kCount>([&](auto r) {
        constexpr int r_ = decltype(r)::value;
        acc[r_] += splat(weights[(j + r_) * row + i * col]) * x;
      });
    }
    static_for<kCount>([&](auto r) { store(to + (j + decltype(r)::value) * L, acc[decltype(r)::value]); });
  };
  int64_t j = 0;
  for (; j + 8 <= rows; j += 8) block(j, Index<8>{});
  for (; j + 4 <= rows; j += 4) block(j, Index<4>{});
  for (; j < rows; ++j) block(j, Index<1>{});
}

// grads[j][i] += sum over images r of a[j][r] * b[r][i]; a is [rows][lane], b is [image][cols].
template <class T>
void outer_products(const T* a, int64_t rows, const T* b, int64_t cols, int images, T* grads) {
  constexpr int L = kLanes<T>;
  auto block = [&](int64_t j, int64_t i, auto row_count, auto vec_count) {
    constexpr int kRows = decltype(row_count)::value, kVecs = decltype(vec_count)::value;
    Vec<T> acc[kRows][kVecs] = {};
    for (int r = 0; r < images; ++r) {
      static_for<kVecs>([&](auto v) {
        constexpr int v_ = decltype(v)::value;
        const Vec<T> right = load(b + r * cols + i + v_ * L);
        static_for<kRows>([&](auto k) {
          constexpr int k_ = decltype(k)::value;
          acc[k_][v_] += splat(a[(j + k_) * L + r]) * right;
        });
      });
    }
    static_for<kRows>([&](auto k) {
      static_for<kVecs>([&](auto v) {
        constexpr int k_ = decltype(k)::value, v_ = decltype(v)::value;
        T* grad = grads + (j + k_) * cols + i + v_ * L;
        store(grad, load(grad) + acc[k_][v_]);
      });
    });
  };
  auto row_block = [&](int64_t j, auto row_count) {
    int64_t i = 0;
    for (; i + 2 * L <= cols; i += 2 * L) block(j, i, row_count, Index<2>{});
    for (; i + L <= cols; i += L) block(j, i, row_count, Index<1>{});
    for (; i < cols; ++i) {
      for (int64_t k = j; k < j + decltype(row_count)::value; ++k) {
        T sum = T(0);
        for (int r = 0; r < images; ++r) sum += a[k * L + r] * b[r * cols + i];
        grads[k * cols + i] += sum;
      }
    }
  };
  int64_t j = 0;
  for (; j + 4 <= rows; j += 4) row_block(j, Index<4>{});
  for (; j < rows; ++j) row_block(j, Index<1>{});
}

// grads += the gradient of the spatial convolution's weights, (2, k, k); `ordered` and `scratch` are room.
template <class T>
void spatial_weight_grad(const ConvMap<T>& map, const T* x, const T* dy, int64_t dy_channel, T* ordered, T* scratch,
                         T* grads) {
  const int64_t taps = int64_t(map.k) * map.k, row = round_up(taps, kLanes<T>);  // one output channel: tiles of one
  for (int64_t i = 0; i < 2 * row; ++i) ordered[i] = T(0);
  weight_grad_map<T>(map, x, dy, dy_channel, ordered, scratch);
  for (int64_t i = 0; i < 2; ++i) {
    for (int64_t t = 0; t < taps; ++t) grads[i * taps + t] += ordered[i * row + t];
  }
}

template <class T>
struct AttentionImages {
  const BlockArgs& args;
  int64_t channels, pixels;
  int64_t step;  // from channel to channel of a map, in elements
  ConvMap<T> spatial, spatial_back;
  // Per channel.
  T *mean, *max, *gate, *slack;
  typename IntOf<T>::type* max_index;
  // Per hidden unit: before the ReLU for the mean and the maximum; after it, their sum.
  T *hidden_mean, *hidden_max, *hidden_sum;
  // Per pixel: (max, mean) over channels, its padded copy, the gate.
  T *pooled, *padded, *spatial_gate;
  typename IntOf<T>::type* channel_index;
  T *packed, *packed_back;
  // Backward.
  T *grad_gate, *grad_pooled, *grad_logit, *grad_hidden_mean, *grad_hidden_max, *grad_mean, *grad_max;
  T *rows, *sums, *spatial_sums;

  AttentionImages(const BlockArgs& a, Carver& carver, bool backward) : args(a) {
    constexpr int L = kLanes<T>;
    channels = a.out;
    pixels = a.height * a.width;
    spatial = images_map<T>(2, 1, 1, a.spatial_k, a.height, a.width);
    spatial_back = images_map<T>(1, 2, 1, a.spatial_k, a.height, a.width);
    step = spatial.out_channel;
    mean = carver.take<T>(channels * L);
    max = carver.take<T>(channels * L);
    gate = carver.take<T>(channels * L);
    slack = carver.take<T>(backward ? 0 : channels * L);
    max_index = carver.take<typename IntOf<T>::type>(channels * L);
    hidden_mean = carver.take<T>(a.hidden * L);
    hidden_max = carver.take<T>(a.hidden * L);
    hidden_sum = carver.take<T>(a.hidden * L);
    pooled = carver.take<T>(2 * step);
    padded = carver.take<T>(2 * spatial.channel);
    spatial_gate = carver.take<T>(step);
    channel_index = carver.take<typename IntOf<T>::type>(pixels * L);
    packed = carver.take<T>(spatial.weight_count());
    if (!backward) return;
    packed_back = carver.take<T>(spatial.weight_count());
    grad_gate = carver.take<T>(step);
    grad_pooled = carver.take<T>(2 * step);
    grad_logit = carver.take<T>(channels * L);
    grad_hidden_mean = carver.take<T>(a.hidden * L);
    grad_hidden_max = carver.take<T>(a.hidden * L);
    grad_mean = carver.take<T>(channels * L);
    grad_max = carver.take<T>(channels * L);
    rows = carver.take<T>(channels * L);
    sums = carver.take<T>(weight_grad_scratch<T>(int(a.spatial_k)));
    spatial_sums = carver.take<T>(weight_grad_elements(spatial));
  }

  // Sum, maximum and its first place over the pixels of channels [begin, end). by_spectra: `slack` of these channels
  // has been set.
  void pool_pixels(const T* y, int64_t begin, int64_t end, bool by_spectra) {
    if (by_spectra) return pool_pixels<true>(y, begin, end);
    for (int64_t c = begin; c < end; ++c) store(slack + c * kLanes<T>, Vec<T>{});
    pool_pixels<false>(y, begin, end);
  }
  template <bool kSlack>
  void pool_pixels(const T* y, int64_t begin, int64_t end) {
    constexpr int L = kLanes<T>;
    auto block = [&](int64_t c, auto count) {
      constexpr int kCount = decltype(count)::value;
      Vec<T> sum[kCount] = {}, gap[kCount];
      Maximum<T, kSlack> top[kCount];
      const T* map[kCount];
      static_for<kCount>([&](auto j) {
        map[decltype(j)::value] = y + (c + decltype(j)::value) * step;
        gap[decltype(j)::value] = load(slack + (c + decltype(j)::value) * L);
        top[decltype(j)::value].begin(load(map[decltype(j)::value]), gap[decltype(j)::value]);
      });
      for (int64_t p0 = 0; p0 < pixels; p0 += kRun) {
        Vec<T> part[kCount] = {};
        const int64_t run_end = least(p0 + kRun, pixels);
        for (int64_t p = p0; p < run_end; ++p) {
          static_for<kCount>([&](auto j) {
            constexpr int j_ = decltype(j)::value;
            Vec<T> v = load(map[j_] + p * L);
            part[j_] += v;
            top[j_].meet(v, p, gap[j_]);
          });
        }
        static_for<kCount>([&](auto j) { sum[decltype(j)::value] += part[decltype(j)::value]; });
      }
      static_for<kCount>([&](auto j) {
        constexpr int j_ = decltype(j)::value;
        store(mean + (c + j_) * L, sum[j_] / splat(T(pixels)));
        store(max + (c + j_) * L, top[j_].value);
        __builtin_memcpy(max_index + (c + j_) * L, &top[j_].place, sizeof(IVec<T>));
      });
    };
    int64_t c = begin;
    for (; c + 4 <= end; c += 4) block(c, Index<4>{});
    for (; c < end; ++c) block(c, Index<1>{});
  }

  // Hidden activations from mean and max.
  void hidden_layer() {
    constexpr int L = kLanes<T>;
    const T* w = static_cast<const T*>(args.fc1_weight);
    const T* b = static_cast<const T*>(args.fc1_bias);
    dense_layer<T>(w, args.hidden, channels, channels, 1, mean, b, T(1), hidden_mean);
    dense_layer<T>(w, args.hidden, channels, channels, 1, max, b, T(1), hidden_max);
    for (int64_t h = 0; h < args.hidden * L; h += L) {
      Vec<T> m = load(hidden_mean + h), x = load(hidden_max + h);
      // Not (v <= 0), so that NaN passes as it does through torch.relu.
      store(hidden_sum + h, (m <= Vec<T>{} ? Vec<T>{} : m) + (x <= Vec<T>{} ? Vec<T>{} : x));
    }
  }

  void channel_gate() {
    constexpr int L = kLanes<T>;
    hidden_layer();
    // MLP(mean) + MLP(max) = fc2 (relu(...) + relu(...)) + 2 b2.
    dense_layer<T>(static_cast<const T*>(args.fc2_weight), channels, args.hidden, args.hidden, 1, hidden_sum,
                   static_cast<const T*>(args.fc2_bias), T(2), gate);
    for (int64_t i = 0; i < channels * L; i += L) store(gate + i, sigmoid<T>(load(gate + i)));
  }

  // Maximum (and its lowest channel) and mean over channels of z = y * gate, for each pixel.
  template <bool kSlack>
  void pool_channels(const T* y) {
    constexpr int L = kLanes<T>;
    auto block = [&](int64_t p, auto count) {
      constexpr int kCount = decltype(count)::value;
      Vec<T> sum[kCount] = {};
      Maximum<T, kSlack> top[kCount];
      static_for<kCount>([&](auto j) {
        top[decltype(j)::value].begin(load(y + (p + decltype(j)::value) * L) * load(gate), load(slack) * load(gate));
      });
      for (int64_t c0 = 0; c0 < channels; c0 += kRun) {
        Vec<T> part[kCount] = {};
        const int64_t end = least(c0 + kRun, channels);
        for (int64_t c = c0; c < end; ++c) {
          Vec<T> g = load(gate + c * L), gap = kSlack ? load(slack + c * L) * g : Vec<T>{};
          static_for<kCount>([&](auto j) {
            constexpr int j_ = decltype(j)::value;
            Vec<T> z = load(y + c * step + (p + j_) * L) * g;
            part[j_] += z;
            top[j_].meet(z, c, gap);
          });
        }
        static_for<kCount>([&](auto j) { sum[decltype(j)::value] += part[decltype(j)::value]; });
      }
      static_for<kCount>([&](auto j) {
        constexpr int j_ = decltype(j)::value;
        store(pooled + (p + j_) * L, top[j_].value);
        store(pooled + step + (p + j_) * L, sum[j_] / splat(T(channels)));
        __builtin_memcpy(channel_index + (p + j_) * L, &top[j_].place, sizeof(IVec<T>));
      });
    };
    int64_t p = 0;
    for (; p + 4 <= pixels; p += 4) block(p, Index<4>{});
    for (; p < pixels; ++p) block(p, Index<1>{});
  }

  // The map a convolution reads: itself, or its padded copy.
  const T* bordered(const ConvMap<T>& map, int64_t count, const T* from) {
    if (map.layout == kClip) return from;
    pad_images(map, count, from, padded);
    return padded;
  }

  void spatial_gates() {
    constexpr int L = kLanes<T>;
    pack_weights<T>(spatial, false, static_cast<const T*>(args.spatial_weight), packed);
    conv_map<T>(spatial, bordered(spatial, 2, pooled), packed, nullptr, false, spatial_gate);
    for (int64_t i = 0; i < pixels * L; i += L) store(spatial_gate + i, sigmoid<T>(load(spatial_gate + i)));
  }

  // After pool_pixels() of all channels.
  void forward(const T* y, bool any_spectra) {
    channel_gate();
    if (any_spectra) {
      pool_channels<true>(y);
    } else {
      pool_channels<false>(y);
    }
    spatial_gates();
  }

  void save(int64_t image, int images) {
    scatter_rows<T>(mean, image, images, channels, static_cast<T*>(args.mean));
    scatter_rows<T>(max, image, images, channels, static_cast<T*>(args.max));
    scatter_rows<T>(max_index, image, images, channels, args.max_index);
    scatter_rows<T>(spatial_gate, image, images, pixels, static_cast<T*>(args.spatial_gate));
    scatter_rows<T>(channel_index, image, images, pixels, args.channel_index);
  }

  void restore(int64_t image, int images) {
    gather_rows<T>(static_cast<const T*>(args.mean), image, images, channels, mean);
    gather_rows<T>(static_cast<const T*>(args.max), image, images, channels, max);
    gather_rows<T>(args.max_index, image, images, channels, max_index);
    gather_rows<T>(static_cast<const T*>(args.spatial_gate), image, images, pixels, spatial_gate);
    gather_rows<T>(args.channel_index, image, images, pixels, channel_index);
  }

  MFEF_INLINE IVec<T> index_at(const typename IntOf<T>::type* p) {
    IVec<T> v;
    __builtin_memcpy(&v, p, sizeof(v));
    return v;
  }

  static IVec<T> valid_lanes(int images) {
    IVec<T> lane;
    for (int r = 0; r < kLanes<T>; ++r) lane[r] = r;
    return lane < isplat<T>(images);
  }

  // grad holds d loss / d result on entry; d loss / d y after finish_backward(), which is left to the caller, who
  // may want some channels sooner. Parameter gradients are added to `partials`.
  void backward(const T* y, T* grad, int64_t image, int images, T* partials) {
    constexpr int L = kLanes<T>;
    // The channel gate again; zero in lanes beyond the last image, as everything there is, whatever the parameters.
    channel_gate();
    const IVec<T> valid = valid_lanes(images);
    for (int64_t i = 0; i < channels * L; i += L) store(gate + i, valid ? load(gate + i) : Vec<T>{});

    // Spatial gate: its gradient, and the pooled maps again (what the forward did not save).
    auto gate_block = [&](int64_t p, auto count) {
      constexpr int kCount = decltype(count)::value;
      Vec<T> dot[kCount], sum[kCount], top[kCount];
      IVec<T> at[kCount];
      static_for<kCount>([&](auto j) {
        constexpr int j_ = decltype(j)::value;
        dot[j_] = sum[j_] = top[j_] = Vec<T>{};
        at[j_] = index_at(channel_index + (p + j_) * L);
      });
      for (int64_t c0 = 0; c0 < channels; c0 += kRun) {
        Vec<T> dot_part[kCount] = {}, sum_part[kCount] = {};
        const int64_t end = least(c0 + kRun, channels);
        for (int64_t c = c0; c < end; ++c) {
          Vec<T> g = load(gate + c * L);
          static_for<kCount>([&](auto j) {
            constexpr int j_ = decltype(j)::value;
            const int64_t e = c * step + (p + j_) * L;
            Vec<T> z = load(y + e) * g;
            dot_part[j_] += load(grad + e) * z;
            sum_part[j_] += z;
            top[j_] = at[j_] == isplat<T>(c) ? z : top[j_];
          });
        }
        static_for<kCount>([&](auto j) {
          dot[decltype(j)::value] += dot_part[decltype(j)::value];
          sum[decltype(j)::value] += sum_part[decltype(j)::value];
        });
      }
      static_for<kCount>([&](auto j) {
        constexpr int j_ = decltype(j)::value;
        const int64_t e = (p + j_) * L;
        Vec<T> s = load(spatial_gate + e);
        store(grad_gate + e, dot[j_] * (s * (T(1) - s)));
        store(pooled + e, top[j_]);
        store(pooled + step + e, sum[j_] / splat(T(channels)));
      });
    };
    int64_t p = 0;
    for (; p + 4 <= pixels; p += 4) gate_block(p, Index<4>{});
    for (; p < pixels; ++p) gate_block(p, Index<1>{});

    pack_weights<T>(spatial_back, true, static_cast<const T*>(args.spatial_weight), packed_back);
    conv_map<T>(spatial_back, bordered(spatial_back, 1, grad_gate), packed_back, nullptr, false, grad_pooled);
    if (args.need_parameters) {
      spatial_weight_grad<T>(spatial, bordered(spatial, 2, pooled), grad_gate, step, spatial_sums, sums,
                             partials + args.partial.spatial);
    }

    // Through z = y * gate: grad becomes the part of dy that does not come through the pooling.
    auto z_block = [&](int64_t c, auto count) {
      constexpr int kCount = decltype(count)::value;
      Vec<T> sum[kCount] = {};
      for (int64_t p0 = 0; p0 < pixels; p0 += kRun) {
        Vec<T> part[kCount] = {};
        const int64_t end = least(p0 + kRun, pixels);
        for (int64_t q = p0; q < end; ++q) {
          Vec<T> s = load(spatial_gate + q * L);
          Vec<T> from_max = load(grad_pooled + q * L);
          Vec<T> from_mean = load(grad_pooled + step + q * L) / splat(T(channels));
          IVec<T> at = index_at(channel_index + q * L);
          static_for<kCount>([&](auto j) {
            constexpr int j_ = decltype(j)::value;
            const int64_t e = (c + j_) * step + q * L;
            Vec<T> dz = load(grad + e) * s + from_mean;
            dz += at == isplat<T>(c + j_) ? from_max : Vec<T>{};
            part[j_] += dz * load(y + e);
            store(grad + e, dz * load(gate + (c + j_) * L));
          });
        }
        static_for<kCount>([&](auto j) { sum[decltype(j)::value] += part[decltype(j)::value]; });
      }
      static_for<kCount>([&](auto j) {
        constexpr int j_ = decltype(j)::value;
        Vec<T> g = load(gate + (c + j_) * L);
        store(grad_logit + (c + j_) * L, sum[j_] * (g * (T(1) - g)));
      });
    };
    int64_t c = 0;
    for (; c + 4 <= channels; c += 4) z_block(c, Index<4>{});
    for (; c < channels; ++c) z_block(c, Index<1>{});

    // The MLP, whose hidden layer channel_gate() has left.
    dense_layer<T>(static_cast<const T*>(args.fc2_weight), args.hidden, channels, 1, args.hidden, grad_logit, nullptr,
                   T(0), grad_hidden_mean);
    for (int64_t h = 0; h < args.hidden * L; h += L) {
      Vec<T> g = load(grad_hidden_mean + h);
      store(grad_hidden_mean + h, load(hidden_mean + h) <= Vec<T>{} ? Vec<T>{} : g);
      store(grad_hidden_max + h, load(hidden_max + h) <= Vec<T>{} ? Vec<T>{} : g);
    }
    const T* fc1 = static_cast<const T*>(args.fc1_weight);
    dense_layer<T>(fc1, channels, args.hidden, 1, channels, grad_hidden_mean, nullptr, T(0), grad_mean);
    dense_layer<T>(fc1, channels, args.hidden, 1, channels, grad_hidden_max, nullptr, T(0), grad_max);
    if (args.need_parameters) {
      scatter_rows<T>(grad_logit, 0, images, channels, rows);
      outer_products<T>(hidden_sum, args.hidden, rows, channels, images, partials + args.partial.fc2_weight);
      outer_products<T>(grad_hidden_mean, args.hidden, static_cast<const T*>(args.mean) + image * channels, channels,
                        images, partials + args.partial.fc1_weight);
      outer_products<T>(grad_hidden_max, args.hidden, static_cast<const T*>(args.max) + image * channels, channels,
                        images, partials + args.partial.fc1_weight);
      for (int r = 0; r < images; ++r) {
        for (int64_t i = 0; i < channels; ++i) partials[args.partial.fc2_bias + i] += 2 * rows[r * channels + i];
        for (int64_t h = 0; h < args.hidden; ++h) {
          partials[args.partial.fc1_bias + h] += grad_hidden_mean[h * L + r] + grad_hidden_max[h * L + r];
        }
      }
    }
  }

  // The last step of the backward, for channels [begin, end): through the pooling over pixels, to `to`, channels
  // `to_step` elements apart and `gap` vectors left out after every row (in place: grad + begin * step, step, 0).
  // Lanes beyond the last image are set to zero, whatever the parameters are: the weight gradient adds up all
  // lanes.
  void finish_backward(const T* grad, int64_t begin, int64_t end, int images, T* to, int64_t to_step, int64_t gap) {
    constexpr int L = kLanes<T>;
    const IVec<T> valid = valid_lanes(images);
    const int64_t rows = gap == 0 ? 1 : args.height, width = pixels / rows;
    for (int64_t i = begin; i < end; ++i, to += to_step) {
      Vec<T> from_mean = load(grad_mean + i * L) / splat(T(pixels));
      Vec<T> from_max = load(grad_max + i * L);
      IVec<T> at = index_at(max_index + i * L);
      for (int64_t h = 0; h < rows; ++h) {
        T* row = to + h * (width + gap) * L;
        for (int64_t q = h * width; q < (h + 1) * width; ++q, row += L) {
          Vec<T> d = load(grad + i * step + q * L) + from_mean + (at == isplat<T>(q) ? from_max : Vec<T>{});
          store(row, valid ? d : Vec<T>{});
        }
      }
    }
  }
};

}  // namespace mfef::cpu::MFEF_ISA
