// What all kernels stand on: a thread block as a sequence of phases, elements of three types, rows of maps.
//
// A kernel is a function of a Block: `block.phase([&](int thread) {...})` is what every thread does between two
// barriers, `block.warps([&](const Warp& warp) {...})` the same for what a warp does together. What a thread keeps from
// one phase to the next is in Block::Registers.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cmath>
#include <limits>

#include "plan.h"

#define MFEF_DEVICE __device__ __forceinline__
#define MFEF_UNROLL _Pragma("unroll")
#define MFEF_ROLLED _Pragma("unroll 1")

namespace mfef::cuda {

constexpr int kWarp = 32;

// kWarp threads that act at once (mma.cuh): `warp.lanes([&](int thread) {...})` is what each does by itself in between.
// What a thread keeps meanwhile is in Warp::Registers, and in Block::Registers from one phase to another.
struct Warp {
  int index;  // among those of the thread block

  template <class T>
  struct Registers {
    T own;
    __device__ T& operator[](int) { return own; }
  };

  template <class F>
  __device__ __forceinline__ void lanes(const F& f) const {
    f(int(threadIdx.x));
  }
  // Before lanes act at once that have each gone their own way, through a loop of more turns for some: until then the
  // machine may keep them apart.
  __device__ __forceinline__ void together() const { __syncwarp(); }
};

struct Block {
  int64_t index, count;  // of this thread block, and how many there are
  int threads;
  float* shared;

  // What a thread keeps in registers across phases.
  template <class T>
  struct Registers {
    T own;
    __device__ explicit Registers(const Block&) {}
    __device__ T& operator[](int) { return own; }
  };

  template <class F>
  __device__ __forceinline__ void phase(const F& f) const {
    f(int(threadIdx.x));
    __syncthreads();
  }

  // A phase of whole warps; `threads` is a multiple of kWarp. From a lane the compiler knows the index for one value
  // of the warp: branches on it need no reconvergence.
  template <class F>
  __device__ __forceinline__ void warps(const F& f) const {
    f(Warp{__shfl_sync(0xffffffffu, int(threadIdx.x) / kWarp, 0)});
    __syncthreads();
  }
};

// a / d for 0 <= a < 2^21, without the twenty instructions of a division. (a + 1/2) / d is at least 1 / (2 d) from
// the next integer, and its error below (a + 1/2) / d * 2^-22.
struct Quotient {
  int divisor;
  float inverse;
  MFEF_HD explicit Quotient(int d) : divisor(d), inverse(1.0f / float(d)) {}
  MFEF_HD int operator()(int a) const { return int((float(a) + 0.5f) * inverse); }
};

// --- elements ---------------------------------------------------------------------------------

template <class T>
struct Quad {
  alignas(4 * sizeof(T)) T value[4];
};

// f(T()) with the type of the elements.
template <class F>
MFEF_DEVICE void with_element(Element element, const F& f) {
  switch (element) {
    case Element::kFloat:
      return f(0.0f);
    case Element::kBFloat16:
      return f(c10::BFloat16(0.0f));
    case Element::kHalf:
      return f(c10::Half(0.0f));
    case Element::kDouble:
      break;  // ops_cuda.cu refuses it
  }
}

MFEF_DEVICE float load(const Parameter& p, Element element, int64_t offset) {
  float value = 0.0f;
  with_element(element, [&](auto zero) { value = float(static_cast<const decltype(zero)*>(p.data)[offset]); });
  return value;
}
MFEF_DEVICE void store(const Parameter& p, Element element, int64_t offset, float value) {
  with_element(element, [&](auto zero) {
    using T = decltype(zero);
    static_cast<T*>(const_cast<void*>(p.data))[offset] = T(value);
  });
}

// As the value would come back from memory.
MFEF_DEVICE float rounded(Element element, float value) {
  with_element(element, [&](auto zero) { value = float(decltype(zero)(value)); });
  return value;
}

// --- arithmetic -------------------------------------------------------------------------------

MFEF_HD float sigmoid(float v) { return 1.0f / (1.0f + expf(-v)); }

// NaN passes, as it does through torch.relu.
MFEF_HD float relu(float v) { return v <= 0.0f ? 0.0f : v; }

// A maximum and where it is: the first of equals stays, the first NaN wins, as in torch.max.
struct Largest {
  float value;
  int index;
  MFEF_HD void see(float v, int i) {
    if (!(v <= value) && value == value) {
      value = v;
      index = i;
    }
  }
  // The larger of two whose places are in any order; an index of -1 is of nothing.
  MFEF_HD void merge(const Largest& other) {
    const bool nan = value != value, others_nan = other.value != other.value;
    const bool larger = others_nan ? !nan : other.value > value, equal = nan ? others_nan : other.value == value;
    if (other.index >= 0 && (index < 0 || larger || (equal && other.index < index))) *this = other;
  }
};

// Sums have two levels, runs of kRun and the sum of the runs: nearly as good as a pairwise sum.
constexpr int kRun = 16;
template <class F>
MFEF_DEVICE float sum_of(int count, const F& term) {
  float sum = 0.0f;
  for (int first = 0; first < count; first += kRun) {
    float part = 0.0f;
    const int end = least(first + kRun, count);
    for (int i = first; i < end; ++i) part += term(i);
    sum += part;
  }
  return sum;
}

// --- maps in shared memory --------------------------------------------------------------------
//
// [channel][image][row][column]: channels `step` floats apart, a row `kRow` floats (see Plan), images of a block
// one after the other. Columns from W on are zero where a convolution reads.

// kCount floats, by vectors of 4, or of 2 where it is no multiple of 4.
template <int kCount>
MFEF_DEVICE void load_row(const float* from, float (&row)[kCount]) {
  static_assert(kCount % 2 == 0);
  constexpr int kQuads = kCount / 4 * 4;
  struct alignas(16) Quads {
    float value[4];
  };
  struct alignas(8) Pair {
    float value[2];
  };
  MFEF_UNROLL
  for (int i = 0; i < kQuads; i += 4) {
    const Quads v = *reinterpret_cast<const Quads*>(from + i);
    MFEF_UNROLL
    for (int j = 0; j < 4; ++j) row[i + j] = v.value[j];
  }
  if constexpr (kQuads < kCount) {
    const Pair v = *reinterpret_cast<const Pair*>(from + kQuads);
    row[kQuads] = v.value[0];
    row[kQuads + 1] = v.value[1];
  }
}

template <int kRow>
MFEF_DEVICE void store_row(float* to, const float (&row)[kRow]) {
  constexpr int kVector = kRow < 4 ? kRow : 4;
  struct alignas(4 * kVector) Vector {
    float value[kVector];
  };
  MFEF_UNROLL
  for (int i = 0; i < kRow; i += kVector) {
    Vector v;
    MFEF_UNROLL
    for (int j = 0; j < kVector; ++j) v.value[j] = row[i + j];
    *reinterpret_cast<Vector*>(to + i) = v;
  }
}

// Calls f(offset of an element in memory after the first image, place in shared memory, channel, image, count) for
// every element of `channels` channels of `images` images, in the order of memory; count is 4 where four
// neighbours of a row can be taken at once, else 1.
template <int kRow, class F>
MFEF_DEVICE void for_each_element(const Map& map, const Sizes& s, int element_size, int channels, int images, int step,
                                  int thread, int threads, const F& f) {
  const int pixels = s.pixels(), image_floats = s.height * kRow, width = s.width;
  const int64_t sn = map.stride[0], sc = map.stride[1], sh = map.stride[2], sw = map.stride[3];
  const Quotient by_width(width), by_pixels(pixels), by_channels(channels);
  const bool rows = sw == 1 && sh == width && sc == pixels;
  if (rows && width % 4 == 0 && sn % 4 == 0 && reinterpret_cast<uint64_t>(map.data) % uint64_t(4 * element_size) == 0) {
    const int quads = pixels / 4, all = channels * quads;
    const Quotient by_quads(quads);
    for (int image = 0; image < images; ++image) {
      for (int e = thread; e < all; e += threads) {
        const int channel = by_quads(e), pixel = (e - channel * quads) * 4, h = by_width(pixel);
        f(image * sn + int64_t(e) * 4, channel * step + image * image_floats + h * kRow + pixel - h * width, channel,
          image, 4);
      }
    }
    return;
  }
  const int all = channels * pixels;
  const bool channels_last = sc == 1 && !rows;
  for (int image = 0; image < images; ++image) {
    for (int e = thread; e < all; e += threads) {
      const int outer = channels_last ? by_channels(e) : by_pixels(e);
      const int inner = e - outer * (channels_last ? channels : pixels);
      const int channel = channels_last ? inner : outer, pixel = channels_last ? outer : inner;
      const int h = by_width(pixel), w = pixel - h * width;
      f(image * sn + channel * sc + h * sh + w * sw, channel * step + image * image_floats + h * kRow + w, channel,
        image, 1);
    }
  }
}

// Images [first, first + images) of channels [channel, channel + channels) to shared memory, with the columns beside
// the map, and with zeros for images up to `places`.
template <int kRow>
MFEF_DEVICE void load_map(const Map& map, Element element, const Sizes& s, int64_t first, int images, int places,
                          int channel, int channels, int step, float* to, int thread, int threads) {
  if (images < places) {
    const int floats = (places - images) * s.height * kRow;
    for (int e = thread; e < channels * floats; e += threads) {
      const int of = e / floats;
      to[of * step + images * s.height * kRow + e - of * floats] = 0.0f;
    }
  }
  if (s.width < kRow) {
    const int gap = kRow - s.width, rows = images * s.height, all = channels * rows * gap;
    const Quotient by_gap(gap), by_rows(rows);
    for (int e = thread; e < all; e += threads) {
      const int row = by_gap(e), of = by_rows(row);
      to[of * step + (row - of * rows) * kRow + s.width + e - row * gap] = 0.0f;
    }
  }
  with_element(element, [&](auto zero) {
    using T = decltype(zero);
    Map at = map;
    T* data = static_cast<T*>(map.data) + first * map.stride[0] + channel * map.stride[1];
    at.data = data;
    for_each_element<kRow>(at, s, sizeof(T), channels, images, step, thread, threads,
                           [&](int64_t offset, int place, int, int, int count) {
                             if (count == 4) {
                               const Quad<T> quad = *reinterpret_cast<const Quad<T>*>(data + offset);
                               float row[4];
                               MFEF_UNROLL
                               for (int i = 0; i < 4; ++i) row[i] = float(quad.value[i]);
                               store_row<4>(to + place, row);
                             } else {
                               to[place] = float(data[offset]);
                             }
                           });
  });
}

// The other way; value(place, channel, image) gives what is stored. Four neighbours of a row share a call's channel.
template <int kRow, class Value>
MFEF_DEVICE void store_map(const Map& map, Element element, const Sizes& s, int64_t first, int images, int channels,
                           int step, int thread, int threads, const Value& value) {
  with_element(element, [&](auto zero) {
    using T = decltype(zero);
    Map at = map;
    T* data = static_cast<T*>(map.data) + first * map.stride[0];
    at.data = data;
    for_each_element<kRow>(at, s, sizeof(T), channels, images, step, thread, threads,
                           [&](int64_t offset, int place, int channel, int image, int count) {
                             if (count == 4) {
                               Quad<T> quad;
                               MFEF_UNROLL
                               for (int i = 0; i < 4; ++i) quad.value[i] = T(value(place + i, channel, image));
                               *reinterpret_cast<Quad<T>*>(data + offset) = quad;
                             } else {
                               data[offset] = T(value(place, channel, image));
                             }
                           });
  });
}

}  // namespace mfef::cuda
