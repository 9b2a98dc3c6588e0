// Between tensors in memory and packed maps: transposition, conversion, borders.
#pragma once

#include "block.h"
#include "simd.h"

namespace mfef::cpu::MFEF_ISA {

// One element with its channel, row and column strides folded in; used where no fast path applies.
template <class E>
MFEF_INLINE E* element_at(const Map& m, int64_t n, int64_t c, int64_t h, int64_t w) {
  return static_cast<E*>(m.data) + n * m.stride[0] + c * m.stride[1] + h * m.stride[2] + w * m.stride[3];
}

// The (channel, row, column) part of an image is one dense run. Strides of extents of 1 say nothing.
MFEF_INLINE bool is_dense(const Map& m, int64_t channels, int64_t height, int64_t width) {
  return (m.stride[3] == 1 || width == 1) && (m.stride[2] == width || height == 1) &&
         (m.stride[1] == height * width || channels == 1);
}
// Channels lie next to each other.
MFEF_INLINE bool is_channels_last(const Map& m) { return m.stride[1] == 1; }

// Packs channels [first, first + channels) of up to kLanes images: to[c * step + p * kLanes + lane].
// Lanes beyond `images` are zero. `gap` vectors are left out after every row of pixels.
template <class E, class T>
void pack_images(const Map& m, int64_t image, int images, int64_t first, int64_t channels, int64_t height,
                 int64_t width, int64_t step, T* to, int64_t gap = 0) {
  constexpr int L = kLanes<T>;
  const int64_t pixels = height * width;
  const E* base = element_at<E>(m, image, first, 0, 0);
  if (is_dense(m, channels, height, width)) {
    const int64_t count = channels * pixels;
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
    // Squares of kLanes images by `per` times as many elements, from element i on.
    auto squares = [&]<int kPer>(int64_t i, auto all_images, Index<kPer>) {
      for (; i + kPer * L <= count; i += kPer * L) {
        Vec<T> rows[L];
        static_for<L>([&]<int r>() {
          const bool there = all_images.value || r < images;
          rows[r] = there ? load_lanes<kPer, T>(base + r * m.stride[0] + i) : Vec<T>{};
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
    };
    auto all_squares = [&](auto all_images) {
      int64_t i = squares(0, all_images, Index<kPerLane<E, T>>{});
      if constexpr (kPerLane<E, T> > 1) i = squares(i, all_images, Index<1>{});
      return i;
    };
    int64_t i = images == L ? all_squares(Index<1>{}) : all_squares(Index<0>{});
    for (; i < count; ++i) {
      T* at = next();
      for (int r = 0; r < L; ++r) at[r] = r < images ? T(to_compute(base[r * m.stride[0] + i])) : T(0);
    }
    return;
  }
  for (int64_t h = 0; h < height; ++h) {
    for (int64_t w = 0; w < width; ++w) {
      const E* pixel = base + h * m.stride[2] + w * m.stride[3];
      T* at = to + (h * (width + gap) + w) * L;
      int64_t c = 0;
      if (is_channels_last(m)) {
        auto squares = [&]<int kPer>(Index<kPer>) {
          for (; c + kPer * L <= channels; c += kPer * L) {
            Vec<T> rows[L];
            for (int r = 0; r < L; ++r) {
              rows[r] = r < images ? load_lanes<kPer, T>(pixel + r * m.stride[0] + c) : Vec<T>{};
            }
            transpose<T>(rows);
            for (int r = 0; r < L; ++r) {
              Vec<T> elements[kPer];
              split_lanes<T>(rows[r], elements);
              for (int e = 0; e < kPer; ++e) store(at + (c + r * kPer + e) * step, elements[e]);
            }
          }
        };
        squares(Index<kPerLane<E, T>>{});
        if constexpr (kPerLane<E, T> > 1) squares(Index<1>{});
      }
      for (; c < channels; ++c) {
        for (int r = 0; r < L; ++r) {
          at[c * step + r] = r < images ? T(to_compute(pixel[r * m.stride[0] + c * m.stride[1]])) : T(0);
        }
      }
    }
  }
}

// The way back. value(c, p) gives the vector of channel first + c at pixel p, over lanes of images.
template <class E, class T, class Value>
MFEF_INLINE void unpack_images(const Map& m, int64_t image, int images, int64_t first, int64_t channels, int64_t height,
                               int64_t width, const Value& value) {
  constexpr int L = kLanes<T>;
  const int64_t pixels = height * width;
  E* base = element_at<E>(m, image, first, 0, 0);
  if (is_dense(m, channels, height, width)) {
    const int64_t count = channels * pixels;
    int64_t c = 0, p = 0;
    auto next = [&] {
      if (p == pixels) {  // on into the next channel
        p = 0;
        ++c;
      }
      return value(c, p++);
    };
    auto squares = [&]<int kPer>(int64_t i, auto all_images, Index<kPer>) {
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
          if (all_images.value || r < images) store_lanes<kPer, T>(base + r * m.stride[0] + i, rows[r]);
        });
      }
      return i;
    };
    auto all_squares = [&](auto all_images) {
      int64_t i = squares(0, all_images, Index<kPerLane<E, T>>{});
      if constexpr (kPerLane<E, T> > 1) i = squares(i, all_images, Index<1>{});
      return i;
    };
    int64_t i = images == L ? all_squares(Index<1>{}) : all_squares(Index<0>{});
    for (; i < count; ++i, ++p) {
      if (p == pixels) {
        p = 0;
        ++c;
      }
      T lane[L];
      store(lane, value(c, p));
      for (int r = 0; r < images; ++r) from_compute(lane[r], base + r * m.stride[0] + i);
    }
    return;
  }
  for (int64_t h = 0; h < height; ++h) {
    for (int64_t w = 0; w < width; ++w) {
      E* pixel = base + h * m.stride[2] + w * m.stride[3];
      const int64_t p = h * width + w;
      int64_t c = 0;
      if (is_channels_last(m)) {
        auto squares = [&]<int kPer>(Index<kPer>) {
          for (; c + kPer * L <= channels; c += kPer * L) {
            Vec<T> rows[L];
            for (int r = 0; r < L; ++r) {
              Vec<T> elements[kPer];
              for (int e = 0; e < kPer; ++e) elements[e] = value(c + r * kPer + e, p);
              rows[r] = join_lanes<T>(elements);
            }
            transpose<T>(rows);
            for (int r = 0; r < L; ++r) {
              if (r < images) store_lanes<kPer, T>(pixel + r * m.stride[0] + c, rows[r]);
            }
          }
        };
        squares(Index<kPerLane<E, T>>{});
        if constexpr (kPerLane<E, T> > 1) squares(Index<1>{});
      }
      for (; c < channels; ++c) {
        T lane[L];
        store(lane, value(c, p));
        for (int r = 0; r < images; ++r) from_compute(lane[r], pixel + r * m.stride[0] + c * m.stride[1]);
      }
    }
  }
}

// Channels [first, first + channels) of one image to rows of pixels: to[c * pitch + p], p < H * W.
template <class E, class T>
void pack_pixels(const Map& m, int64_t image, int64_t first, int64_t channels, int64_t height, int64_t width, T* to,
                 int64_t pitch) {
  constexpr int L = kLanes<T>;
  const int64_t pixels = height * width;
  const E* base = element_at<E>(m, image, first, 0, 0);
  const bool dense_rows = is_dense(m, 1, height, width);
  const bool dense_pixels = is_channels_last(m) && (m.stride[2] == width * m.stride[3] || height == 1);
  if (dense_pixels && !dense_rows) {
    int64_t p = 0;
    for (; p + L <= pixels; p += L) {
      int64_t c = 0;
      for (; c + L <= channels; c += L) {
        Vec<T> rows[L];
        for (int r = 0; r < L; ++r) rows[r] = load_elements(base + (p + r) * m.stride[3] + c);
        transpose<T>(rows);
        for (int r = 0; r < L; ++r) store(to + (c + r) * pitch + p, rows[r]);
      }
      for (; c < channels; ++c) {
        for (int r = 0; r < L; ++r) to[c * pitch + p + r] = T(to_compute(base[(p + r) * m.stride[3] + c]));
      }
    }
    for (; p < pixels; ++p) {
      for (int64_t c = 0; c < channels; ++c) to[c * pitch + p] = T(to_compute(base[p * m.stride[3] + c]));
    }
    return;
  }
  for (int64_t c = 0; c < channels; ++c) {
    const E* channel = base + c * m.stride[1];
    T* row = to + c * pitch;
    if (dense_rows) {
      int64_t p = 0;
      for (; p + L <= pixels; p += L) store(row + p, load_elements(channel + p));
      for (; p < pixels; ++p) row[p] = T(to_compute(channel[p]));
    } else {
      for (int64_t h = 0; h < height; ++h) {
        for (int64_t w = 0; w < width; ++w) {
          row[h * width + w] = T(to_compute(channel[h * m.stride[2] + w * m.stride[3]]));
        }
      }
    }
  }
}

// The way back: from[c * pitch + p].
template <class E, class T>
void unpack_pixels(const Map& m, int64_t image, int64_t first, int64_t channels, int64_t height, int64_t width,
                   const T* from, int64_t pitch) {
  constexpr int L = kLanes<T>;
  const int64_t pixels = height * width;
  E* base = element_at<E>(m, image, first, 0, 0);
  const bool dense_rows = is_dense(m, 1, height, width);
  const bool dense_pixels = is_channels_last(m) && (m.stride[2] == width * m.stride[3] || height == 1);
  if (dense_pixels && !dense_rows) {
    int64_t p = 0;
    for (; p + L <= pixels; p += L) {
      int64_t c = 0;
      for (; c + L <= channels; c += L) {
        Vec<T> rows[L];
        for (int r = 0; r < L; ++r) rows[r] = load(from + (c + r) * pitch + p);
        transpose<T>(rows);
        for (int r = 0; r < L; ++r) store_elements(base + (p + r) * m.stride[3] + c, rows[r]);
      }
      for (; c < channels; ++c) {
        for (int r = 0; r < L; ++r) from_compute(from[c * pitch + p + r], base + (p + r) * m.stride[3] + c);
      }
    }
    for (; p < pixels; ++p) {
      for (int64_t c = 0; c < channels; ++c) from_compute(from[c * pitch + p], base + p * m.stride[3] + c);
    }
    return;
  }
  for (int64_t c = 0; c < channels; ++c) {
    E* channel = base + c * m.stride[1];
    const T* row = from + c * pitch;
    if (dense_rows) {
      int64_t p = 0;
      for (; p + L <= pixels; p += L) store_elements(channel + p, load(row + p));
      for (; p < pixels; ++p) from_compute(row[p], channel + p);
    } else {
      for (int64_t h = 0; h < height; ++h) {
        for (int64_t w = 0; w < width; ++w) {
          from_compute(row[h * width + w], channel + h * m.stride[2] + w * m.stride[3]);
        }
      }
    }
  }
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
