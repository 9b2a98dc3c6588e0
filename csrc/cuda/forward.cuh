// Forward of the block on maps that fit on the chip: everything from x to the result in one launch, a thread block for
// one image (tiny maps: a few). Without a convolution it is dual_attention, without attention multi_scale_conv2d.
//
// Phases: x and the first weights to shared memory; the convolution into y there, stage by stage; sums and maxima over
// the pixels of each channel, row by row, then their totals; the MLP; per pixel, mean and maximum over channels of
// y * gate, in runs of channels; the spatial convolution, a row of taps at a time; the result.
// Memory: reads x once, writes the result once, with `save` also y and the small tensors. The weights are read once
// per thread block, from L2.
#pragma once

#include "attention.cuh"
#include "conv_matrices.cuh"

namespace mfef::cuda {

template <int kRow, bool kMatrices>
MFEF_DEVICE void forward_convolution(const BlockArgs& a, const Block& block, const Layout& at, Images images) {
  float* m = block.shared;
  for (int stage = 0; stage < a.stages.total(a.sizes); ++stage) {
    block.phase([&](int thread) {
      if (stage == 0) {
        load_map<kRow>(a.x, a.element, a.sizes, images.first, images.count, a.images, 0, a.sizes.in, a.step,
                       m + at.source, thread, block.threads);
      }
      load_weights<kRow, kMatrices>(a, false, stage, m + at.weights, thread, block.threads);
    });
    if (kMatrices && stage == 0) prepare_sources(a, block, at, false);
    convolve_stage<kRow, kMatrices>(a, block, at, false, stage);
  }
}

// Mean, maximum and its first place over the pixels of every channel; also the channels' maps to memory.
template <int kRow>
MFEF_DEVICE void pool_pixels(const BlockArgs& a, const Block& block, const Layout& at, Images images) {
  const Sizes& s = a.sizes;
  float *m = block.shared, *y = m + at.dest;
  const int channels = s.out, rows = images.count * s.height, all = channels * rows;
  float *sums = m + at.parts, *tops = sums + all, *places = tops + all;
  block.phase([&](int thread) {
    if (a.y.data) {
      store_map<kRow>(a.y, a.element, s, images.first, images.count, channels, a.step, thread, block.threads,
                      [&](int place, int, int) { return y[place]; });
    }
    const Quotient by_channels(channels);
    for (int e = thread; e < all; e += block.threads) {
      const int row = by_channels(e), c = e - row * channels;
      float v[kRow];
      load_row<kRow>(y + c * a.step + row * kRow, v);
      float sum = 0.0f;
      Largest top{v[0], 0};
      MFEF_UNROLL
      for (int w = 0; w < kRow; ++w) {
        if (w >= s.width) continue;
        sum += v[w];
        top.see(v[w], w);
      }
      sums[e] = sum;
      tops[e] = top.value;
      places[e] = float(top.index);
    }
  });
  block.phase([&](int thread) {
    for (int e = thread; e < images.count * channels; e += block.threads) {
      const int image = e / channels, c = e - image * channels;
      auto row = [&](int h) { return (image * s.height + h) * channels + c; };
      const float sum = sum_of(s.height, [&](int h) { return sums[row(h)]; });
      Largest top{tops[row(0)], 0};
      for (int h = 1; h < s.height; ++h) top.see(tops[row(h)], h);
      const float mean = sum / float(s.pixels());
      const int index = top.index * s.width + int(places[row(top.index)]);
      m[at.mean + e] = mean;
      m[at.max + e] = top.value;
      const int64_t to = images.first * channels + e;
      if (a.mean) {
        a.mean[to] = mean;
        a.max[to] = top.value;
        a.max_index[to] = index;
      }
    }
  });
}

// Mean, maximum and its lowest channel over the channels of every pixel of z = y * gate.
template <int kRow>
MFEF_DEVICE void pool_channels(const BlockArgs& a, const Block& block, const Layout& at, Images images) {
  const Sizes& s = a.sizes;
  float *m = block.shared, *y = m + at.dest;
  const int pixels = s.pixels(), all = images.count * pixels;
  float *sums = m + at.parts, *tops = sums + all * kPixelParts, *places = tops + all * kPixelParts;
  block.phase([&](int thread) {
    for_pixel_parts<kRow>(a, images.count, thread, block.threads,
                          [&](int image, int pixel, int place, int part, int first, int end) {
                            const float* gate = m + at.gate + image * s.out;
                            const int to = (part * images.count + image) * pixels + pixel;
                            if (first == end) {
                              places[to] = -1.0f;
                              return;
                            }
                            Largest top{y[first * a.step + place] * gate[first], first};
                            sums[to] = sum_of(end - first, [&](int i) {
                              const float z = y[(first + i) * a.step + place] * gate[first + i];
                              top.see(z, first + i);
                              return z;
                            });
                            tops[to] = top.value;
                            places[to] = float(top.index);
                          });
  });
  block.phase([&](int thread) {
    for (int e = thread; e < all; e += block.threads) {
      float sum = sums[e];
      Largest top{tops[e], int(places[e])};
      for (int part = 1; part < kPixelParts && places[part * all + e] >= 0.0f; ++part) {
        sum += sums[part * all + e];
        top.see(tops[part * all + e], int(places[part * all + e]));
      }
      const int image = e / pixels, pixel = e - image * pixels;
      m[at.pooled + 2 * image * pixels + pixel] = top.value;
      m[at.pooled + (2 * image + 1) * pixels + pixel] = sum / float(s.out);
      if (a.channel_index) a.channel_index[images.first * pixels + e] = top.index;
    }
  });
}

MFEF_DEVICE void spatial_gate(const BlockArgs& a, const Block& block, const Layout& at, Images images) {
  const Sizes& s = a.sizes;
  float *m = block.shared, *parts = m + at.parts;
  const int pixels = s.pixels(), all = images.count * pixels;
  block.phase([&](int thread) {
    for (int e = thread; e < all * s.spatial_k * 2; e += block.threads) {
      const int part = e / all, map = part % 2, ky = part / 2, place = e - part * all;
      const int image = place / pixels, pixel = place - image * pixels, h = pixel / s.width, w = pixel - h * s.width;
      parts[e] = row_of_spatial_taps(s.spatial_k, s.height, s.width, m + at.pooled + (2 * image + map) * pixels, h, w,
                                     ky, false, [&](int kx) { return spatial_weight(a, map, ky, kx); });
    }
  });
  block.phase([&](int thread) {
    for (int e = thread; e < all; e += block.threads) {
      const float gate = sigmoid(sum_of(2 * s.spatial_k, [&](int part) { return parts[part * all + e]; }));
      m[at.spatial_gate + e] = gate;
      if (a.spatial_gate) a.spatial_gate[images.first * pixels + e] = gate;
    }
  });
}

template <int kRow, bool kMatrices>
struct ForwardOf {
  static MFEF_DEVICE void run(const BlockArgs& a, const Block& block) {
    const Sizes& s = a.sizes;
    const Layout at(s, false, a.step, a.images, a.weights);
    float *m = block.shared, *y = m + at.dest;
    for (int64_t b = block.index; b < a.blocks; b += block.count) {
      const Images images = images_of(a, b);
      if (s.branch_count) {
        forward_convolution<kRow, kMatrices>(a, block, at, images);
      } else {
        block.phase([&](int thread) {
          load_map<kRow>(a.x, a.element, s, images.first, images.count, a.images, 0, s.out, a.step, y, thread,
                         block.threads);
        });
      }
      if (s.hidden) {
        pool_pixels<kRow>(a, block, at, images);
        hidden_layer(a, block, at, images.count);
        channel_gate(a, block, at, images.count);
        pool_channels<kRow>(a, block, at, images);
        spatial_gate(a, block, at, images);
      }
      block.phase([&](int thread) {
        store_map<kRow>(a.result, a.element, s, images.first, images.count, s.out, a.step, thread, block.threads,
                        [&](int place, int channel, int image) {
                          if (!s.hidden) {
                            const float bias = a.bias.data ? load(a.bias, a.element, channel * a.bias.stride[0]) : 0.0f;
                            return y[place] + bias;
                          }
                          const int local = place - channel * a.step, row = local / kRow;  // of all images
                          const int pixel = (row - image * s.height) * s.width + local % kRow;
                          return y[place] * m[at.gate + image * s.out + channel] *
                                 m[at.spatial_gate + image * s.pixels() + pixel];
                        });
      });
    }
  }
};

template <int kRow>
struct Forward : ForwardOf<kRow, false> {};
// Where tensor cores compute a branch.
struct MatrixForward : ForwardOf<kSide, true> {};

}  // namespace mfef::cuda
