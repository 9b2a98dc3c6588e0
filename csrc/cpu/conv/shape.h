// The sizes of a grouped convolution, the layout of its packed maps and the borders that the layout asks for.
#pragma once

#include "cpu/block.h"
#include "cpu/conv/tiles.h"

namespace mfef::cpu::MFEF_ISA {

MFEF_INLINE int64_t round_up(int64_t a, int64_t b) { return (a + b - 1) / b * b; }
MFEF_INLINE int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

MFEF_INLINE int out_index(int out) { return out == 8 ? 4 : out - 1; }
MFEF_INLINE int pix_index(int pix) { return pix == 8 ? 4 : pix == 7 ? 3 : pix == 4 ? 2 : pix - 1; }

// The next tile's output channels: as few tiles as fit, as even as possible (16 = 3 + 3 + 3 + 3 + 2 + 2,
// not 3 x 5 + 1: a tile of one channel is load-bound).
MFEF_INLINE int next_out(int64_t remaining, int pix) {
  int limit = 1;
  for (const int out : kOutCounts) {
    if (tile_fits(out, pix)) limit = out;
  }
  const int64_t even = divide_up(remaining, divide_up(remaining, limit));
  return even > 4 ? (even >= 8 ? 8 : 4) : int(even);
}

// The next tile's width in vectors, at most `limit`.
MFEF_INLINE int next_pix(int64_t remaining, int limit) {
  if (limit >= 8 && remaining % 8 == 0) return 8;
  if (limit >= 7 && remaining % 7 == 0) return 7;
  if (limit >= 8 && remaining > 8) return 8;
  if (limit >= 7 && remaining >= 7) return 7;
  return remaining >= 4 && limit >= 4 ? 4 : remaining >= 2 && limit >= 2 ? 2 : 1;
}

// Vectors from channel to channel of a map in the images plan. Not a multiple of 8: the channels of an 8 x 8
// map would be 4 KiB apart, and the same pixel of all of them would fall into one set of the L1 cache.
MFEF_INLINE int64_t channel_vectors(int64_t pixels) { return pixels % 8 == 0 ? pixels + 1 : pixels; }

// Lengths and offsets are in elements of T.
template <class T>
struct ConvShape {
  int64_t in, out, groups, height, width;
  int k;
  Layout layout;
  int64_t pitch = 0;        // from row to row of the padded input: in vectors (images), elements (pixels)
  int64_t lead = 0;         // zeros before the first pixel
  int64_t channel = 0;      // length of one padded input channel
  int64_t vectors = 0;      // kPixels: vectors of one output channel
  int64_t out_channel = 0;  // length of one output channel
  int main_pix = 0;         // widest tile
  bool dot = false;         // by dot products: x is paired (pair_pixels()), and weights are packed for such tiles

  int64_t in_group() const { return in / groups; }
  int64_t out_group() const { return out / groups; }
  int64_t taps() const { return int64_t(k) * k; }
  int64_t weight_row() const { return dot ? k + k / 2 : k; }  // of one row of taps and one output channel
  int64_t weight_count() const { return out * in_group() * k * weight_row(); }
  bool bordered() const { return layout == kPadded; }
};

// The images plan, for an FFT: no borders.
template <class T>
MFEF_INLINE ConvShape<T> fft_shape(int64_t in, int64_t out, int64_t groups, int64_t k, int64_t height, int64_t width) {
  ConvShape<T> s{in, out, groups, height, width, int(k), kFft};
  s.pitch = width;
  s.channel = s.out_channel = channel_vectors(height * width) * kLanes<T>;
  return s;
}

// The images plan, for direct sums.
template <class T>
MFEF_INLINE ConvShape<T> images_shape(int64_t in, int64_t out, int64_t groups, int64_t k, int64_t height,
                                      int64_t width) {
  ConvShape<T> s = fft_shape<T>(in, out, groups, k, height, width);
  const bool clip = is_compiled_size<T>(k) && (width == 1 || width == 2 || width == 4 || width == 7 || width == 8);
  s.layout = clip ? kClip : kPadded;
  if (!clip) {
    s.pitch = width + 2 * (k / 2);
    s.lead = (k / 2) * kLanes<T>;
    s.channel = channel_vectors(height * s.pitch) * kLanes<T>;
  }
  s.main_pix = clip ? int(width) : next_pix(width, kRegisters == 32 ? 8 : 4);
  return s;
}

template <class T>
MFEF_INLINE ConvShape<T> pixels_shape(int64_t in, int64_t out, int64_t groups, int64_t k, int64_t height,
                                      int64_t width) {
  ConvShape<T> s{in, out, groups, height, width, int(k), kPixels};
  const int64_t radius = k / 2;
  s.pitch = width + radius;  // the zeros after a row are also those before the next
  s.lead = radius * s.pitch + radius;
  s.vectors = divide_up(height * s.pitch, kLanes<T>);
  s.out_channel = s.vectors * kLanes<T>;
  s.channel = round_up(s.lead + s.out_channel + s.lead, kLanes<T>);
  s.main_pix = kRegisters == 32 && s.vectors >= 8 ? 8 : s.vectors >= 4 ? 4 : s.vectors >= 2 ? 2 : 1;
  return s;
}

// Weights as they lie in memory, (out, in / groups, full_k, full_k), of which a convolution reads the inner k x k. The
// data gradient, `flipped`, exchanges output and input channels and reads the taps in reverse.
template <class E>
struct WeightView {
  E* first;                             // first tap of the first output and input channel
  int64_t group, out, in, row, column;  // strides

  template <class T>
  WeightView(const ConvShape<T>& shape, bool flipped, E* weights, int64_t full_k, const int64_t stride[4])
      : first(weights + (full_k - shape.k) / 2 * (stride[2] + stride[3])),
        group(stride[0] * (flipped ? shape.in_group() : shape.out_group())),
        out(stride[flipped ? 1 : 0]),
        in(stride[flipped ? 0 : 1]),
        row(stride[2]),
        column(stride[3]) {
    if (flipped) reverse(shape.k);
  }
  template <class T>
  WeightView(const ConvShape<T>& shape, bool flipped, const Branch& b)
      : WeightView(shape, flipped, static_cast<E*>(b.weights), b.full_k, b.weight_stride) {}

  // Reads the taps in the other order.
  void reverse(int k) {
    first += (k - 1) * (row + column);
    row = -row;
    column = -column;
  }
  E* at(int64_t g, int64_t o, int64_t i) const { return first + g * group + o * out + i * in; }
};

// Sets the borders of a row of the padded layout of the images plan to zero.
template <class T>
MFEF_INLINE void zero_row_borders(const ConvShape<T>& shape, T* row) {
  const int64_t end = shape.lead + shape.width * kLanes<T>, pitch = shape.pitch * kLanes<T>;
  for (int64_t i = 0; i < shape.lead; i += kLanes<T>) store(row + i, Vec<T>{});
  for (int64_t i = end; i < pitch; i += kLanes<T>) store(row + i, Vec<T>{});
}
template <class T>
void zero_borders(const ConvShape<T>& shape, int64_t channels, T* to) {
  for (int64_t c = 0; c < channels; ++c) {
    for (int64_t h = 0; h < shape.height; ++h) {
      zero_row_borders(shape, to + c * shape.channel + h * shape.pitch * kLanes<T>);
    }
  }
}

// Copies a map without borders, channels shape.out_channel apart, into the padded layout of the images plan. The
// channels of `shape` are those of either side: their size is the same.
template <class T>
void pad_images(const ConvShape<T>& shape, int64_t channels, const T* from, T* to) {
  const int64_t row = shape.width * kLanes<T>, pitch = shape.pitch * kLanes<T>;
  for (int64_t c = 0; c < channels; ++c) {
    for (int64_t h = 0; h < shape.height; ++h) {
      const T* at_from = from + c * shape.out_channel + h * row;
      T* at = to + c * shape.channel + h * pitch;
      zero_row_borders(shape, at);
      for (int64_t i = 0; i < row; i += kLanes<T>) store(at + shape.lead + i, load(at_from + i));
    }
  }
}

// Copies a map of widened bfloat16 so that a lane holds a pixel and the next one of its row, both as bfloat16, as
// tiles of dot products read it; after the last pixel of a row there is zero. May be done in place.
MFEF_INLINE void pair_pixels(const ConvShape<float>& shape, int64_t channels, const float* from, float* to) {
  constexpr int64_t L = kLanes<float>;
  for (int64_t c = 0; c < channels; ++c) {
    for (int64_t h = 0; h < shape.height; ++h) {
      const float* row = from + c * shape.channel + h * shape.pitch * L;
      float* at = to + c * shape.channel + h * shape.pitch * L;
      Vec<float> v = load(row);
      for (int64_t w = 1; w <= shape.pitch; ++w, at += L) {
        const Vec<float> next = w < shape.pitch ? load(row + w * L) : Vec<float>{};
        store(at, bit_cast<Vec<float>>((bit_cast<WordVec>(v) >> 16) | bit_cast<WordVec>(next)));
        v = next;
      }
    }
  }
}

// Copies rows of pixels [channels][from_pitch] into the padded layout of the pixels plan.
template <class T>
void pad_pixels(const ConvShape<T>& shape, int64_t channels, const T* from, int64_t from_pitch, T* to) {
  for (int64_t c = 0; c < channels; ++c) {
    T* channel = to + c * shape.channel;
    for (int64_t i = 0; i < shape.channel; i += kLanes<T>) store(channel + i, Vec<T>{});
    for (int64_t h = 0; h < shape.height; ++h) {
      const T* row = from + c * from_pitch + h * shape.width;
      T* at = channel + shape.lead + h * shape.pitch;
      for (int64_t w = 0; w < shape.width; ++w) at[w] = row[w];
    }
  }
}

// Copies the output of the pixels plan, whose rows have the padded pitch, to rows without a gap.
template <class T>
void unpad_pixels(const ConvShape<T>& shape, int64_t channels, const T* from, T* to, int64_t to_pitch) {
  for (int64_t c = 0; c < channels; ++c) {
    for (int64_t h = 0; h < shape.height; ++h) {
      const T* row = from + c * shape.out_channel + h * shape.pitch;
      T* at = to + c * to_pitch + h * shape.width;
      for (int64_t w = 0; w < shape.width; ++w) at[w] = row[w];
    }
    for (int64_t p = shape.height * shape.width; p < to_pitch; ++p) to[c * to_pitch + p] = T(0);
  }
}

}  // namespace mfef::cpu::MFEF_ISA
