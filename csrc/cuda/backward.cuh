// Backward of the block on maps that fit on the chip: from the gradient of the result to those of y and x in one
// launch, a thread block for the same images as in the forward. For the gradients of the parameters it leaves what
// weight_gradient.cuh and sums.cuh need; where the plan has `weights_in_backward`, not the gradient of y but the sums
// of its images for the weights.
//
// Phases: y and the gradient to shared memory; the MLP and the channel gate again; per pixel the gradient of the
// spatial gate and the pooled maps again (they are not saved), in runs of channels; the spatial convolution backward;
// through z = y * gate, row by row; the MLP backward; the gradient of y, in place of that of the result; x into the
// place of y, and the gradients of the weights, written as they are done; then the data gradient of the convolution,
// stage by stage, into the same place.
// Memory: reads the gradient and y once, writes the gradient of x and, for the weight gradient, that of y in float32;
// or reads x, while the first weights are under way, and writes a sum for each weight.
#pragma once

#include "attention.cuh"
#include "conv_matrices.cuh"
#include "weight_gradient.cuh"

namespace mfef::cuda {

// Gradient of the spatial gate's logit, and the pooled maps.
template <int kRow>
MFEF_DEVICE void gradient_of_spatial_gate(const BlockArgs& a, const Block& block, const Layout& at, Images images) {
  const Sizes& s = a.sizes;
  float *m = block.shared, *grad = m + at.source, *y = m + at.dest;
  const int pixels = s.pixels(), all = images.count * pixels;
  float *dots = m + at.parts, *sums = dots + all * kPixelParts;
  block.phase([&](int thread) {
    for_pixel_parts<kRow>(a, images.count, thread, block.threads,
                          [&](int image, int pixel, int place, int part, int first, int end) {
                            const float* gate = m + at.gate + image * s.out;
                            const int to = (part * images.count + image) * pixels + pixel;
                            float dot = 0.0f, sum = 0.0f;
                            for (int run = first; run < end; run += kRun) {
                              float dot_part = 0.0f, sum_part = 0.0f;
                              for (int c = run; c < least(run + kRun, end); ++c) {
                                const float z = y[c * a.step + place] * gate[c];
                                dot_part = fmaf(grad[c * a.step + place], z, dot_part);
                                sum_part += z;
                              }
                              dot += dot_part;
                              sum += sum_part;
                            }
                            dots[to] = dot;
                            sums[to] = sum;
                          });
  });
  block.phase([&](int thread) {
    for (int e = thread; e < all; e += block.threads) {
      float dot = 0.0f, sum = 0.0f;
      for (int part = 0; part < kPixelParts; ++part) {
        dot += dots[part * all + e];
        sum += sums[part * all + e];
      }
      const int image = e / pixels, pixel = e - image * pixels, h = pixel / s.width, w = pixel - h * s.width;
      const float gate = a.spatial_gate[images.first * pixels + e];
      // Clamped: a direct call of the operator may give any indices.
      const int channel = least(most(a.channel_index[images.first * pixels + e], 0), s.out - 1);
      m[at.spatial_gate + e] = gate;
      reinterpret_cast<int*>(m)[at.channel_index + e] = channel;
      m[at.grad_spatial + e] = dot * (gate * (1.0f - gate));
      m[at.pooled + 2 * image * pixels + pixel] =
          y[channel * a.step + (image * s.height + h) * kRow + w] * m[at.gate + image * s.out + channel];
      m[at.pooled + (2 * image + 1) * pixels + pixel] = sum / float(s.out);
    }
  });
}

// Data and weight gradient of the spatial convolution; the latter of this block's images alone.
MFEF_DEVICE void spatial_backward(const BlockArgs& a, const Block& block, const Layout& at, Images images, int64_t b) {
  const Sizes& s = a.sizes;
  float *m = block.shared, *parts = m + at.parts;
  const int pixels = s.pixels(), k = s.spatial_k, half = k / 2, all = 2 * images.count * pixels;
  block.phase([&](int thread) {
    for (int e = thread; e < all * k; e += block.threads) {
      const int ky = e / all, place = e - ky * all, row = place / pixels, pixel = place - row * pixels;
      const int image = row / 2, map = row - image * 2, h = pixel / s.width, w = pixel - h * s.width;
      parts[e] = row_of_spatial_taps(s.spatial_k, s.height, s.width, m + at.grad_spatial + image * pixels, h, w, ky,
                                     true, [&](int kx) { return spatial_weight(a, map, ky, kx); });
    }
    if (!a.grads.spatial) return;
    for (int e = thread; e < 2 * k * k; e += block.threads) {
      const int map = e / (k * k), ky = e / k % k, kx = e % k;
      const int h_begin = most(0, half - ky), h_end = least(s.height, s.height + half - ky);
      const int w_begin = most(0, half - kx), w_end = least(s.width, s.width + half - kx);
      float sum = 0.0f;
      for (int image = 0; image < images.count; ++image) {
        const float *grad = m + at.grad_spatial + image * pixels, *pooled = m + at.pooled + (2 * image + map) * pixels;
        for (int h = h_begin; h < h_end; ++h) {
          float part = 0.0f;
          for (int w = w_begin; w < w_end; ++w) {
            part = fmaf(grad[h * s.width + w], pooled[(h + ky - half) * s.width + w + kx - half], part);
          }
          sum += part;
        }
      }
      a.grads.spatial[b * (2 * k * k) + e] = sum;
    }
  });
  block.phase([&](int thread) {
    for (int e = thread; e < all; e += block.threads) {
      m[at.grad_pooled + e] = sum_of(k, [&](int ky) { return parts[ky * all + e]; });
    }
  });
}

// Through z = y * gate: the gradient becomes the part of that of y that does not come through the pooling over pixels;
// and the gradient of the channel gate's logit.
template <int kRow>
MFEF_DEVICE void gradient_of_channel_gate(const BlockArgs& a, const Block& block, const Layout& at, Images images) {
  const Sizes& s = a.sizes;
  float *m = block.shared, *grad = m + at.source, *y = m + at.dest;
  const int channels = s.out, pixels = s.pixels(), rows = images.count * s.height, all = channels * rows;
  float* sums = m + at.parts;
  block.phase([&](int thread) {
    const Quotient by_channels(channels), by_height(s.height);
    const int* index = reinterpret_cast<int*>(m) + at.channel_index;
    for (int e = thread; e < all; e += block.threads) {
      const int row = by_channels(e), c = e - row * channels, image = by_height(row);
      const int pixel = row * s.width, of_pooled = pixel + image * pixels;  // of all images; of both maps of them
      const float gate = m[at.gate + image * channels + c];
      float dz[kRow], v[kRow], sum = 0.0f;
      load_row<kRow>(grad + c * a.step + row * kRow, dz);
      load_row<kRow>(y + c * a.step + row * kRow, v);
      MFEF_UNROLL
      for (int w = 0; w < kRow; ++w) {
        if (w >= s.width) continue;
        dz[w] =
            fmaf(dz[w], m[at.spatial_gate + pixel + w], m[at.grad_pooled + of_pooled + pixels + w] / float(channels));
        if (index[pixel + w] == c) dz[w] += m[at.grad_pooled + of_pooled + w];
        sum = fmaf(dz[w], v[w], sum);
        dz[w] *= gate;
      }
      store_row<kRow>(grad + c * a.step + row * kRow, dz);
      sums[e] = sum;
    }
  });
  block.phase([&](int thread) {
    for (int e = thread; e < images.count * channels; e += block.threads) {
      const int image = e / channels, c = e - image * channels;
      const float sum = sum_of(s.height, [&](int h) { return sums[(image * s.height + h) * channels + c]; });
      keep_logit(a, at, m, images, e, sum);
    }
  });
}

// Through the pooling over pixels: the gradient of y is complete.
template <int kRow>
MFEF_DEVICE void finish_gradient(const BlockArgs& a, const Block& block, const Layout& at, Images images) {
  const Sizes& s = a.sizes;
  float *m = block.shared, *grad = m + at.source;
  const int channels = s.out, all = channels * images.count * s.height;
  block.phase([&](int thread) {
    const Quotient by_channels(channels), by_height(s.height);
    const int* index = reinterpret_cast<int*>(m) + at.max_index;
    for (int e = thread; e < all; e += block.threads) {
      const int row = by_channels(e), c = e - row * channels, image = by_height(row), of = image * channels + c;
      const int first = (row - image * s.height) * s.width;
      const float mean = m[at.grad_mean + of], max = m[at.grad_max + of];
      float v[kRow];
      load_row<kRow>(grad + c * a.step + row * kRow, v);
      MFEF_UNROLL
      for (int w = 0; w < kRow; ++w) {
        if (w < s.width) v[w] += index[of] == first + w ? mean + max : mean;
      }
      store_row<kRow>(grad + c * a.step + row * kRow, v);
    }
  });
}

template <int kRow>
MFEF_DEVICE void attention_backward(const BlockArgs& a, const Block& block, const Layout& at, Images images,
                                    int64_t b) {
  const Sizes& s = a.sizes;
  float* m = block.shared;
  block.phase([&](int thread) {
    load_map<kRow>(a.grad_result, a.element, s, images.first, images.count, a.images, 0, s.out, a.step, m + at.source,
                   thread, block.threads);
    load_map<kRow>(a.y, a.element, s, images.first, images.count, a.images, 0, s.out, a.step, m + at.dest, thread,
                   block.threads);
    for (int e = thread; e < images.count * s.out; e += block.threads) {
      const int64_t from = images.first * s.out + e;
      m[at.mean + e] = a.mean[from];
      m[at.max + e] = a.max[from];
      reinterpret_cast<int*>(m)[at.max_index + e] = a.max_index[from];
    }
  });
  hidden_layer(a, block, at, images.count);
  channel_gate(a, block, at, images.count);
  gradient_of_spatial_gate<kRow>(a, block, at, images);
  spatial_backward(a, block, at, images, b);
  gradient_of_channel_gate<kRow>(a, block, at, images);
  mlp_backward(a, block, at, images);
  finish_gradient<kRow>(a, block, at, images);
}

template <int kRow, bool kMatrices>
struct BackwardOf {
  static MFEF_DEVICE void run(const BlockArgs& a, const Block& block) {
    const Sizes& s = a.sizes;
    const Layout at(s, true, a.step, a.images, a.weights);
    float *m = block.shared, *grad = m + at.source, *result = m + at.dest;
    for (int64_t b = block.index; b < a.blocks; b += block.count) {
      const Images images = images_of(a, b);
      if (s.hidden) {
        attention_backward<kRow>(a, block, at, images, b);
      } else {
        block.phase([&](int thread) {
          load_map<kRow>(a.grad_result, a.element, s, images.first, images.count, a.images, 0, s.out, a.step, grad,
                         thread, block.threads);
        });
      }
      if (a.grads.channel_sums) {
        block.phase([&](int thread) {
          for (int e = thread; e < images.count * s.out; e += block.threads) {
            const int image = e / s.out, c = e - image * s.out;
            const float* map = grad + c * a.step + image * s.height * kRow;
            a.grads.channel_sums[images.first * s.out + e] =
                sum_of(s.pixels(), [&](int pixel) { return map[pixel / s.width * kRow + pixel % s.width]; });
          }
        });
      }
      if (a.grads.dy) {
        block.phase([&](int thread) {
          const int64_t pixels = s.pixels();
          const Map dy{a.grads.dy, {s.out * pixels, pixels, s.width, 1}};
          store_map<kRow>(dy, Element::kFloat, s, images.first, images.count, s.out, a.step, thread, block.threads,
                          [&](int place, int, int) { return grad[place]; });
        });
      }
      const bool weights = a.weights_in_backward && a.grads.weights;
      const int stages = s.branch_count && a.grad_x.data ? a.stages.total(s) : 0;
      for (int stage = 0; stage < most(stages, weights); ++stage) {
        block.phase([&](int thread) {
          if (weights && stage == 0) {
            load_map<kRow>(a.x, a.element, s, images.first, images.count, a.images, 0, s.in, a.step, result, thread,
                           block.threads);
          }
          if (stages) load_weights<kRow, kMatrices>(a, true, stage, m + at.weights, thread, block.threads);
        });
        if (weights && stage == 0) {
          block.phase([&](int thread) {
            if constexpr (kRow <= kWidestWithWeights) {
              sum_weight_gradients<kRow>(a, result, grad, images.count, b, thread, block.threads);
            }
          });
        }
        if (!stages) break;
        if (kMatrices && stage == 0) prepare_sources(a, block, at, true);
        convolve_stage<kRow, kMatrices>(a, block, at, true, stage);
      }
      if (!a.grad_x.data) continue;
      if (!s.branch_count) result = grad;
      block.phase([&](int thread) {
        store_map<kRow>(a.grad_x, a.element, s, images.first, images.count, s.branch_count ? s.in : s.out, a.step,
                        thread, block.threads, [&](int place, int, int) { return result[place]; });
      });
    }
  }
};

template <int kRow>
struct Backward : BackwardOf<kRow, false> {};
// Where tensor cores compute a branch.
struct MatrixBackward : BackwardOf<kSide, true> {};

}  // namespace mfef::cuda
