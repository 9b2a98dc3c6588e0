// Parts of maps in shared memory as tensor cores read them: [pixel][channel] in 16 bits, or in TF32.
#pragma once

#include <type_traits>

#include "mma.cuh"
#include "region.cuh"

namespace mfef::cuda {

// Where pixels are in shared memory: `columns` of a row, `step` words from pixel to pixel and `group` from one group of
// channels to the next.
struct PixelStage {
  uint32_t* to;
  int columns, step, group;
};

// What a thread copies to shared memory without waiting, 16 or 4 bytes at a time. Everybody sees the copies one barrier
// after their thread has waited for them. A thread keeps this in Block::Registers, and has waited when it ends.
struct Copies {
  __device__ __forceinline__ void copy_16_bytes(uint32_t* to, const void* from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;"
                 :
                 : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(to))), "l"(from)
                 : "memory");
  }
  // Zeros, and nothing is read, where there is nothing.
  __device__ __forceinline__ void copy_4_bytes(uint32_t* to, const void* from, bool there) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;"
                 :
                 : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(to))), "l"(from), "r"(there ? 4 : 0)
                 : "memory");
  }
  __device__ __forceinline__ void wait() { asm volatile("cp.async.wait_all;" ::: "memory"); }
};

// 16 bytes to shared memory at once: left to the compiler these were four stores on sm_80 and sm_90a, whose lanes, 16
// bytes apart, meet in 8 of 32 banks.
MFEF_DEVICE void store_16_bytes(uint32_t* to, const uint32_t (&words)[4]) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};"
               :
               : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(to))), "r"(words[0]), "r"(words[1]), "r"(words[2]),
                 "r"(words[3])
               : "memory");
}

// f(place, row, column, channel, count) of all vectors of 16 bytes that `thread` has of a region: `count` channels of T
// from `channel` on of a pixel, which may lie beside the map.
template <class T, class F>
MFEF_DEVICE void for_each_pixel_vector(const Map& map, const Region& region, int groups, int group_channels,
                                       const PixelStage& stage, int thread, int threads, const F& f) {
  constexpr int kPer = kPerWord<T>, kVector = 4 * kPer;
  const int of_group = MatrixPart::chunks(region.channels) * kSide / kVector, vectors = groups * of_group;
  const int columns = region.at.columns, pixels = region.at.rows * columns;
  const bool last = map.stride[1] == 1;
  const Quotient by_columns(columns), by_group(of_group), by_inner(last ? vectors : pixels);
  MFEF_ROLLED
  for (int e = thread; e < vectors * pixels; e += threads) {
    const int outer = by_inner(e), inner = e - outer * (last ? vectors : pixels);
    const int vector = last ? inner : outer, pixel = last ? outer : inner;
    const int row = by_columns(pixel), column = pixel - row * columns;
    const int group = by_group(vector), first = (vector - group * of_group) * kVector;
    f(stage.to + (row * stage.columns + column) * stage.step + group * stage.group + first / kPer, region.at.row + row,
      region.at.column + column, region.channel + group * group_channels + first,
      least(kVector, region.channels - first));
  }
}

template <class T, class From>
MFEF_DEVICE void load_pixels_from(const Map& map, const Sizes& s, const Region& region, int groups, int group_channels,
                                  const PixelStage& stage, Copies& copies, int thread, int threads) {
  constexpr int kPer = kPerWord<T>, kVector = 4 * kPer;
  const bool whole = map.stride[1] == 1 && has_vectors(map, 1, sizeof(From), kVector);
  const From* data = static_cast<const From*>(map.data);
  for_each_pixel_vector<T>(map, region, groups, group_channels, stage, thread, threads,
                           [&](uint32_t* to, int h, int w, int channel, int left) {
                             uint32_t words[4] = {};
                             if (h >= 0 && h < s.height && w >= 0 && w < s.width) {
                               const From* from = data + offset_of(map, region.image, channel, h, w);
                               const bool aligned = whole && left == kVector && channel % kVector == 0;
                               if constexpr (std::is_same_v<T, From>) {
                                 if (aligned) return copies.copy_16_bytes(to, from);
                               }
                               if constexpr (std::is_same_v<T, float>) {
                                 MFEF_UNROLL
                                 for (int i = 0; i < 4; ++i, from += map.stride[1])
                                   copies.copy_4_bytes(to + i, from, i < left);
                                 return;
                               } else if (aligned) {
                                 const auto value = *reinterpret_cast<const Vector<From, kVector>*>(from);
                                 MFEF_UNROLL
                                 for (int i = 0; i < 4; ++i) {
                                   float of_word[kPer];
                                   MFEF_UNROLL
                                   for (int j = 0; j < kPer; ++j) of_word[j] = float(value.value[kPer * i + j]);
                                   words[i] = word_of<T>(of_word);
                                 }
                               } else {
                                 MFEF_UNROLL
                                 for (int i = 0; i < 4; ++i) {
                                   float of_word[kPer] = {};
                                   MFEF_UNROLL
                                   for (int j = 0; j < kPer; ++j, from += map.stride[1]) {
                                     if (kPer * i + j < left) of_word[j] = float(*from);
                                   }
                                   words[i] = word_of<T>(of_word);
                                 }
                               }
                             }
                             store_16_bytes(to, words);
                           });
}

// The channels of a region, and as many `group_channels` further on for each of `groups`, to shared memory as operands
// T, in chunks of 8 channels of a pixel; zeros beside the map and to the end of a group's last chunk. What needs no
// change, as nothing of float32 does, is copied: it is there after `copies` are waited for.
template <class T>
MFEF_DEVICE void load_pixels(const Map& map, Element element, const Sizes& s, const Region& region, int groups,
                             int group_channels, const PixelStage& stage, Copies& copies, int thread, int threads) {
  if constexpr (!std::is_same_v<T, Tf32>) {
    if (element != Element::kFloat) {
      return load_pixels_from<T, T>(map, s, region, groups, group_channels, stage, copies, thread, threads);
    }
  }
  load_pixels_from<T, float>(map, s, region, groups, group_channels, stage, copies, thread, threads);
}

// A float32 to TF32, where it is in shared memory: a vector of what `thread` has copied there and waited for.
MFEF_DEVICE void round_16_bytes(uint32_t* at) {
  auto words = *reinterpret_cast<const Vector<float, 4>*>(at);
  uint32_t rounded[4];
  MFEF_UNROLL
  for (int i = 0; i < 4; ++i) rounded[i] = tf32_word(words.value[i]);
  store_16_bytes(at, rounded);
}

}  // namespace mfef::cuda
