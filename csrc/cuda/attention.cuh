// Steps of the channel and spatial attention that the forward and the backward of a block of images share. Each is a
// phase, or two where sums are cut into parts: the parts side by side, then their sum in order.
#pragma once

#include "device.cuh"

namespace mfef::cuda {

// What a thread block works on.
struct Images {
  int64_t first;  // among all
  int count;
};

MFEF_DEVICE Images images_of(const BlockArgs& a, int64_t block) {
  const int64_t first = block * a.images, left = a.sizes.batch - first;
  return {first, left < a.images ? int(left) : a.images};
}

// Both hidden layers from mean and maximum: [image][hidden], before the ReLU.
MFEF_DEVICE void hidden_layer(const BlockArgs& a, const Block& block, const Layout& at, int images) {
  const Sizes& s = a.sizes;
  float* m = block.shared;
  const int hidden = s.hidden, channels = s.out, all = images * hidden;
  float *of_mean = m + at.parts, *of_max = of_mean + all * kParts;
  block.phase([&](int thread) {
    for (int e = thread; e < all * kParts; e += block.threads) {
      const int unit = e / kParts, part = e % kParts, image = unit / hidden, j = unit % hidden;
      const float *mean = m + at.mean + image * channels, *max = m + at.max + image * channels;
      float sum_mean = 0.0f, sum_max = 0.0f;
      for (int c = part; c < channels; c += kParts) {
        const float w = load(a.fc1_weight, a.element, j * a.fc1_weight.stride[0] + c * a.fc1_weight.stride[1]);
        sum_mean = fmaf(w, mean[c], sum_mean);
        sum_max = fmaf(w, max[c], sum_max);
      }
      of_mean[e] = sum_mean;
      of_max[e] = sum_max;
    }
  });
  block.phase([&](int thread) {
    for (int e = thread; e < all; e += block.threads) {
      const int j = e % hidden;
      const float bias = a.fc1_bias.data ? load(a.fc1_bias, a.element, j * a.fc1_bias.stride[0]) : 0.0f;
      float sum_mean = 0.0f, sum_max = 0.0f;
      for (int part = 0; part < kParts; ++part) {
        sum_mean += of_mean[e * kParts + part];
        sum_max += of_max[e * kParts + part];
      }
      m[at.hidden_mean + e] = sum_mean + bias;
      m[at.hidden_max + e] = sum_max + bias;
    }
  });
}

// MLP(mean) + MLP(max) = fc2 (relu(...) + relu(...)) + 2 b2, and its sigmoid.
MFEF_DEVICE void channel_gate(const BlockArgs& a, const Block& block, const Layout& at, int images) {
  const Sizes& s = a.sizes;
  float* m = block.shared;
  block.phase([&](int thread) {
    for (int e = thread; e < images * s.out; e += block.threads) {
      const int image = e / s.out, c = e - image * s.out;
      const float* of_mean = m + at.hidden_mean + image * s.hidden;
      const float* of_max = m + at.hidden_max + image * s.hidden;
      const float logit = sum_of(s.hidden, [&](int j) {
        const float w = load(a.fc2_weight, a.element, c * a.fc2_weight.stride[0] + j * a.fc2_weight.stride[1]);
        return w * (relu(of_mean[j]) + relu(of_max[j]));
      });
      const float bias = a.fc2_bias.data ? load(a.fc2_bias, a.element, c * a.fc2_bias.stride[0]) : 0.0f;
      m[at.gate + e] = sigmoid(logit + 2.0f * bias);
    }
  });
}

// f(image, pixel, place of the pixel in a map, part, first channel, end) for every pixel and part of its channels.
template <int kRow, class F>
MFEF_DEVICE void for_pixel_parts(const BlockArgs& a, int images, int thread, int threads, const F& f) {
  const Sizes& s = a.sizes;
  const int pixels = s.pixels(), run = ceil_div(s.out, kPixelParts);
  const Quotient by_pixels(pixels), by_width(s.width), by_images(images);
  for (int e = thread; e < images * pixels * kPixelParts; e += threads) {
    const int row = by_pixels(e), pixel = e - row * pixels, part = by_images(row), image = row - part * images;
    const int h = by_width(pixel);
    f(image, pixel, (image * s.height + h) * kRow + pixel - h * s.width, part, least(part * run, s.out),
      least((part + 1) * run, s.out));
  }
}

// The sum over the taps (ky, kx) of weights(map, ky, kx) * maps[map][pixel + (ky, kx) - half] for one row ky, or at
// pixel - (ky, kx) + half where `flipped`.
template <class Weight>
MFEF_DEVICE float row_of_spatial_taps(int k, int height, int width, const float* map, int h, int w, int ky,
                                      bool flipped, const Weight& weight) {
  const int half = k / 2, row = flipped ? h - ky + half : h + ky - half;
  if (row < 0 || row >= height) return 0.0f;
  float sum = 0.0f;
  for (int kx = 0; kx < k; ++kx) {
    const int at = flipped ? w - kx + half : w + kx - half;
    if (at >= 0 && at < width) sum = fmaf(weight(kx), map[row * width + at], sum);
  }
  return sum;
}

MFEF_DEVICE float spatial_weight(const BlockArgs& a, int map, int ky, int kx) {
  const int skip = (a.sizes.spatial_full - a.sizes.spatial_k) / 2;
  const int64_t* stride = a.spatial_weight.stride;
  return load(a.spatial_weight, a.element, map * stride[1] + (ky + skip) * stride[2] + (kx + skip) * stride[3]);
}

// The gradient of the channel gate's logit from that of the gate.
MFEF_DEVICE void keep_logit(const BlockArgs& a, const Layout& at, float* m, Images images, int e, float sum) {
  const float gate = m[at.gate + e], logit = sum * (gate * (1.0f - gate));
  m[at.logit + e] = logit;
  if (a.grads.logit) a.grads.logit[images.first * a.sizes.out + e] = logit;
}

// The MLP backward: gradients of both hidden layers, in their place, and of mean and maximum.
MFEF_DEVICE void mlp_backward(const BlockArgs& a, const Block& block, const Layout& at, Images images) {
  const Sizes& s = a.sizes;
  float *m = block.shared, *parts = m + at.parts;
  const int hidden = s.hidden, channels = s.out, all = images.count * hidden;
  block.phase([&](int thread) {
    for (int e = thread; e < all * kParts; e += block.threads) {
      const int part = e / all, unit = e - part * all, image = unit / hidden, j = unit - image * hidden;
      const float* logit = m + at.logit + image * channels;
      float sum = 0.0f;
      for (int c = part; c < channels; c += kParts) {
        sum =
            fmaf(load(a.fc2_weight, a.element, c * a.fc2_weight.stride[0] + j * a.fc2_weight.stride[1]), logit[c], sum);
      }
      parts[e] = sum;
    }
  });
  block.phase([&](int thread) {
    for (int e = thread; e < all; e += block.threads) {
      float sum = 0.0f;
      for (int part = 0; part < kParts; ++part) sum += parts[part * all + e];
      const float of_mean = m[at.hidden_mean + e], of_max = m[at.hidden_max + e];
      const float grad_mean = of_mean <= 0.0f ? 0.0f : sum, grad_max = of_max <= 0.0f ? 0.0f : sum;
      m[at.hidden_mean + e] = grad_mean;
      m[at.hidden_max + e] = grad_max;
      if (a.grads.logit) {
        const int64_t to = images.first * hidden + e;
        a.grads.hidden_sum[to] = relu(of_mean) + relu(of_max);
        a.grads.hidden_mean[to] = grad_mean;
        a.grads.hidden_max[to] = grad_max;
      }
    }
  });
  block.phase([&](int thread) {
    for (int e = thread; e < images.count * channels; e += block.threads) {
      const int image = e / channels, c = e - image * channels;
      float of_mean = 0.0f, of_max = 0.0f;
      for (int first = 0; first < hidden; first += kRun) {
        float mean_part = 0.0f, max_part = 0.0f;
        for (int j = first; j < least(first + kRun, hidden); ++j) {
          const float w = load(a.fc1_weight, a.element, j * a.fc1_weight.stride[0] + c * a.fc1_weight.stride[1]);
          mean_part = fmaf(w, m[at.hidden_mean + image * hidden + j], mean_part);
          max_part = fmaf(w, m[at.hidden_max + image * hidden + j], max_part);
        }
        of_mean += mean_part;
        of_max += max_part;
      }
      m[at.grad_mean + e] = of_mean / float(s.pixels());
      m[at.grad_max + e] = of_max;
    }
  });
}

}  // namespace mfef::cuda
