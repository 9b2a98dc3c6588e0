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
MFEF_DEVICE float row_of_spatial_taps(const Sizes& s, const float* map, int h, int w, int ky, bool flipped,
                                      const Weight& weight) {
  const int half = s.spatial_k / 2, row = flipped ? h - ky + half : h + ky - half;
  if (row < 0 || row >= s.height) return 0.0f;
  float sum = 0.0f;
  for (int kx = 0; kx < s.spatial_k; ++kx) {
    const int at = flipped ? w - kx + half : w + kx - half;
    if (at >= 0 && at < s.width) sum = fmaf(weight(kx), map[row * s.width + at], sum);
  }
  return sum;
}

MFEF_DEVICE float spatial_weight(const BlockArgs& a, int map, int ky, int kx) {
  const int skip = (a.sizes.spatial_full - a.sizes.spatial_k) / 2;
  const int64_t* stride = a.spatial_weight.stride;
  return load(a.spatial_weight, a.element, map * stride[1] + (ky + skip) * stride[2] + (kx + skip) * stride[3]);
}

}  // namespace mfef::cuda
