// Between tensors in memory and packed maps: transposition and conversion.
#pragma once

#include "cpu/block.h"
#include "cpu/simd.h"

namespace mfef::cpu::MFEF_ISA {

// The address of one element.
template <class E>
MFEF_INLINE E* element_at(const Map& m, int64_t n, int64_t c, int64_t h, int64_t w) {
  return static_cast<E*>(m.data) + n * m.stride[0] + c * m.stride[1] + h * m.stride[2] + w * m.stride[3];
}

// Whether an image is one dense run. Strides of extents of 1 do not count.
MFEF_INLINE bool is_dense(const Map& m, int64_t channels, int64_t height, int64_t width) {
  return (m.stride[3] == 1 || width == 1) && (m.stride[2] == width || height == 1) &&
         (m.stride[1] == height * width || channels == 1);
}
// Whether channels lie next to each other.
MFEF_INLINE bool is_channels_last(const Map& m) { return m.stride[1] == 1; }

// Calls f(i, Index<kPer>{}) with the most elements that a lane holds, then from where it stopped with one. f takes all
// squares of kPer * kLanes elements that fit, and returns where it stopped.
template <class E, class T, class F>
MFEF_INLINE int64_t in_squares(int64_t begin, const F& f) {
  begin = f(begin, Index<kPerLane<E, T>>{});
  if constexpr (kPerLane<E, T> > 1) begin = f(begin, Index<1>{});
  return begin;
}

// Every pixel of kLanes images, one after another: square(pixel, c, p, Index<kPer>{}) for kPer * kLanes channels from c
// on that lie next to each other, one(element, c, p) for a single channel.
template <class E, class T, class Square, class One>
MFEF_INLINE void for_pixels_of_images(const Map& m, int64_t image, int64_t first, int64_t channels, int64_t height,
                                      int64_t width, const Square& square, const One& one) {
  E* base = element_at<E>(m, image, first, 0, 0);
  for (int64_t h = 0; h < height; ++h) {
    for (int64_t w = 0; w < width; ++w) {
      E* pixel = base + h * m.stride[2] + w * m.stride[3];
      int64_t c = 0;
      if (is_channels_last(m)) {
        c = in_squares<E, T>(0, [&]<int kPer>(int64_t c, Index<kPer> per) {
          for (; c + kPer * kLanes<T> <= channels; c += kPer * kLanes<T>) square(pixel + c, c, h, w, per);
          return c;
        });
      }
      for (; c < channels; ++c) one(pixel + c * m.stride[1], c, h, w);
    }
  }
}

// pack_images() of dense images, one run of `count` elements each.
template <class E, class T>
void pack_dense_images(const E* base, int64_t image_stride, int images, int64_t count, int64_t pixels, int64_t width,
                       int64_t step, T* to, int64_t gap) {
  constexpr int L = kLanes<T>;
  // `to` is at a channel, p is the pixel in it, w the column, skipped the vectors left out above; where channels
  // follow each other without a gap, all are one.
  const int64_t run = gap == 0 && step == pixels * L ? count : pixels;
  int64_t p = 0, w = 0, skipped = 0;
  auto next = [&] {
    if (p == run) {
      p = w = skipped = 0;
      to += step;
    } else if (gap > 0 && w == width) {
      w = 0;
      skipped += gap;
    }
    T* at = to + (p + skipped) * L;
    ++p;
    ++w;
    return at;
  };
  auto squares = [&]<bool kAll>(std::bool_constant<kAll>) {
    return in_squares<E, T>(0, [&]<int kPer>(int64_t i, Index<kPer>) {
      for (; i + kPer * L <= count; i += kPer * L) {
        Vec<T> rows[L];
        static_for<L>([&]<int r>() {
          rows[r] = kAll || r < images ? load_lanes<kPer, T>(base + r * image_stride + i) : Vec<T>{};
        });
        transpose<T>(rows);
        const bool straight = gap == 0 && p < run && p + kPer * L <= run;
        static_for<L>([&]<int r>() {
          Vec<T> elements[kPer];
          split_lanes<T>(rows[r], elements);
          static_for<kPer>([&]<int e>() { store(straight ? to + (p + r * kPer + e) * L : next(), elements[e]); });
        });
        if (straight) p += kPer * L;
      }
      return i;
    });
  };
  for (int64_t i = images == L ? squares(std::true_type{}) : squares(std::false_type{}); i < count; ++i) {
    T* at = next();
    for (int r = 0; r < L; ++r) at[r] = r < images ? T(to_compute(base[r * image_stride + i])) : T(0);
  }
}

// Packs channels [first, first + channels) of up to kLanes images: to[c * step + p * kLanes + lane]. Lanes beyond
// `images` are zero. `gap` vectors are left out after every row of pixels.
template <class E, class T>
void pack_images(const Map& m, int64_t image, int images, int64_t first, int64_t channels, int64_t height,
                 int64_t width, int64_t step, T* to, int64_t gap = 0) {
  constexpr int L = kLanes<T>;
  if (is_dense(m, channels, height, width)) {
    pack_dense_images<E, T>(element_at<E>(m, image, first, 0, 0), m.stride[0], images, channels * height * width,
                            height * width, width, step, to, gap);
    return;
  }
  for_pixels_of_images<E, T>(
      m, image, first, channels, height, width,
      [&]<int kPer>(const E* from, int64_t c, int64_t h, int64_t w, Index<kPer>) {
        T* at = to + (h * (width + gap) + w) * L;
        Vec<T> rows[L];
        for (int r = 0; r < L; ++r) rows[r] = r < images ? load_lanes<kPer, T>(from + r * m.stride[0]) : Vec<T>{};
        transpose<T>(rows);
        for (int r = 0; r < L; ++r) {
          Vec<T> elements[kPer];
          split_lanes<T>(rows[r], elements);
          for (int e = 0; e < kPer; ++e) store(at + (c + r * kPer + e) * step, elements[e]);
        }
      },
      [&](const E* from, int64_t c, int64_t h, int64_t w) {
        T* at = to + (h * (width + gap) + w) * L + c * step;
        for (int r = 0; r < L; ++r) at[r] = r < images ? T(to_compute(from[r * m.stride[0]])) : T(0);
      });
}

// unpack_images() to dense images.
template <class E, class T, class Value>
MFEF_INLINE void unpack_dense_images(E* base, int64_t image_stride, int images, int64_t count, int64_t pixels,
                                     const Value& value) {
  constexpr int L = kLanes<T>;
  int64_t c = 0, p = 0;
  auto next = [&] {
    if (p == pixels) {  // on into the next channel
      p = 0;
      ++c;
    }
    return value(c, p++);
  };
  auto squares = [&]<bool kAll>(std::bool_constant<kAll>) {
    return in_squares<E, T>(0, [&]<int kPer>(int64_t i, Index<kPer>) {
      for (; i + kPer * L <= count; i += kPer * L) {
        Vec<T> rows[L];
        if (p + kPer * L <= pixels) {
          static_for<L>([&]<int r>() {
            Vec<T> elements[kPer];
            static_for<kPer>([&]<int e>() { elements[e] = value(c, p + r * kPer + e); });
            rows[r] = join_lanes<T>(elements);
          });
          p += kPer * L;
        } else {
          for (int r = 0; r < L; ++r) {
            Vec<T> elements[kPer];
            for (int e = 0; e < kPer; ++e) elements[e] = next();
            rows[r] = join_lanes<T>(elements);
          }
        }
        if (p == pixels) {
          p = 0;
          ++c;
        }
        transpose<T>(rows);
        static_for<L>([&]<int r>() {
          if (kAll || r < images) store_lanes<kPer, T>(base + r * image_stride + i, rows[r]);
        });
      }
      return i;
    });
  };
  for (int64_t i = images == L ? squares(std::true_type{}) : squares(std::false_type{}); i < count; ++i) {
    T lane[L];
    store(lane, next());
    for (int r = 0; r < images; ++r) from_compute(lane[r], base + r * image_stride + i);
  }
}

// The reverse. value(c, p) gives the vector of channel first + c at pixel p, over lanes of images.
template <class E, class T, class Value>
MFEF_INLINE void unpack_images(const Map& m, int64_t image, int images, int64_t first, int64_t channels, int64_t height,
                               int64_t width, const Value& value) {
  constexpr int L = kLanes<T>;
  if (is_dense(m, channels, height, width)) {
    unpack_dense_images<E, T>(element_at<E>(m, image, first, 0, 0), m.stride[0], images, channels * height * width,
                              height * width, value);
    return;
  }
  for_pixels_of_images<E, T>(
      m, image, first, channels, height, width,
      [&]<int kPer>(E* to, int64_t c, int64_t h, int64_t w, Index<kPer>) {
        Vec<T> rows[L];
        for (int r = 0; r < L; ++r) {
          Vec<T> elements[kPer];
          for (int e = 0; e < kPer; ++e) elements[e] = value(c + r * kPer + e, h * width + w);
          rows[r] = join_lanes<T>(elements);
        }
        transpose<T>(rows);
        for (int r = 0; r < L; ++r) {
          if (r < images) store_lanes<kPer, T>(to + r * m.stride[0], rows[r]);
        }
      },
      [&](E* to, int64_t c, int64_t h, int64_t w) {
        T lane[L];
        store(lane, value(c, h * width + w));
        for (int r = 0; r < images; ++r) from_compute(lane[r], to + r * m.stride[0]);
      });
}

// Every pixel of one image: square(element, c, p) for kLanes pixels by kLanes channels, run(element, c, p) for kLanes
// pixels of a channel that lie next to each other, one(element, c, p) for what is left.
template <class E, class T, class Square, class Run, class One>
MFEF_INLINE void for_pixels_of_image(const Map& m, int64_t image, int64_t first, int64_t channels, int64_t height,
                                     int64_t width, const Square& square, const Run& run, const One& one) {
  constexpr int L = kLanes<T>;
  const int64_t pixels = height * width;
  E* base = element_at<E>(m, image, first, 0, 0);
  const bool dense_rows = is_dense(m, 1, height, width);
  const bool dense_pixels = is_channels_last(m) && (m.stride[2] == width * m.stride[3] || height == 1);
  int64_t p = 0;
  if (dense_pixels && !dense_rows) {
    for (; p + L <= pixels; p += L) {
      int64_t c = 0;
      for (; c + L <= channels; c += L) square(base + p * m.stride[3] + c, c, p);
      for (; c < channels; ++c) {
        for (int r = 0; r < L; ++r) one(base + (p + r) * m.stride[3] + c, c, p + r);
      }
    }
    for (; p < pixels; ++p) {
      for (int64_t c = 0; c < channels; ++c) one(base + p * m.stride[3] + c, c, p);
    }
    return;
  }
  for (int64_t c = 0; c < channels; ++c) {
    E* channel = base + c * m.stride[1];
    if (dense_rows) {
      for (p = 0; p + L <= pixels; p += L) run(channel + p, c, p);
      for (; p < pixels; ++p) one(channel + p, c, p);
    } else {
      for (int64_t h = 0; h < height; ++h) {
        for (int64_t w = 0; w < width; ++w) one(channel + h * m.stride[2] + w * m.stride[3], c, h * width + w);
      }
    }
  }
}

// Channels [first, first + channels) of one image to rows of pixels: to[c * pitch + p], p < H * W.
template <class E, class T>
void pack_pixels(const Map& m, int64_t image, int64_t first, int64_t channels, int64_t height, int64_t width, T* to,
                 int64_t pitch) {
  constexpr int L = kLanes<T>;
  for_pixels_of_image<E, T>(
      m, image, first, channels, height, width,
      [&](const E* from, int64_t c, int64_t p) {
        Vec<T> rows[L];
        for (int r = 0; r < L; ++r) rows[r] = load_elements(from + r * m.stride[3]);
        transpose<T>(rows);
        for (int r = 0; r < L; ++r) store(to + (c + r) * pitch + p, rows[r]);
      },
      [&](const E* from, int64_t c, int64_t p) { store(to + c * pitch + p, load_elements(from)); },
      [&](const E* from, int64_t c, int64_t p) { to[c * pitch + p] = T(to_compute(*from)); });
}

// The reverse: from[c * pitch + p].
template <class E, class T>
void unpack_pixels(const Map& m, int64_t image, int64_t first, int64_t channels, int64_t height, int64_t width,
                   const T* from, int64_t pitch) {
  constexpr int L = kLanes<T>;
  for_pixels_of_image<E, T>(
      m, image, first, channels, height, width,
      [&](E* to, int64_t c, int64_t p) {
        Vec<T> rows[L];
        for (int r = 0; r < L; ++r) rows[r] = load(from + (c + r) * pitch + p);
        transpose<T>(rows);
        for (int r = 0; r < L; ++r) store_elements(to + r * m.stride[3], rows[r]);
      },
      [&](E* to, int64_t c, int64_t p) { store_elements(to, load(from + c * pitch + p)); },
      [&](E* to, int64_t c, int64_t p) { from_compute(from[c * pitch + p], to); });
}

// (N, count) in memory <-> [count][kLanes] of up to kLanes images; Memory and Lane are the compute type, or
// int32 for indices, which travel through the integer of the lane's width. Lanes beyond `images` are zero.
template <class T, class Memory, class Lane>
void gather_rows(const Memory* from, int64_t image, int images, int64_t count, Lane* to) {
  constexpr int L = kLanes<T>;
  from += image * count;
  int64_t i = 0;
  if constexpr (sizeof(Memory) == sizeof(T)) {
    for (; i + L <= count; i += L) {
      Vec<T> rows[L];
      for (int r = 0; r < L; ++r) {
        rows[r] = r < images ? load(reinterpret_cast<const T*>(from + r * count + i)) : Vec<T>{};
      }
      transpose<T>(rows);
      for (int r = 0; r < L; ++r) store(reinterpret_cast<T*>(to + (i + r) * L), rows[r]);
    }
  }
  for (; i < count; ++i) {
    for (int r = 0; r < L; ++r) to[i * L + r] = r < images ? Lane(from[r * count + i]) : Lane(0);
  }
}
template <class T, class Memory, class Lane>
void scatter_rows(const Lane* from, int64_t image, int images, int64_t count, Memory* to) {
  constexpr int L = kLanes<T>;
  to += image * count;
  int64_t i = 0;
  if constexpr (sizeof(Memory) == sizeof(T)) {
    for (; i + L <= count; i += L) {
      Vec<T> rows[L];
      for (int r = 0; r < L; ++r) rows[r] = load(reinterpret_cast<const T*>(from + (i + r) * L));
      transpose<T>(rows);
      for (int r = 0; r < images; ++r) store(reinterpret_cast<T*>(to + r * count + i), rows[r]);
    }
  }
  for (; i < count; ++i) {
    for (int r = 0; r < images; ++r) to[r * count + i] = Memory(from[i * L + r]);
  }
}

}  // namespace mfef::cpu::MFEF_ISA
