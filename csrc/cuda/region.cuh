// Parts of maps that stay in memory: how the threads of a block walk over them, and copies to and from shared memory.
//
// Neighbouring threads take neighbouring vectors: along the channels where those are neighbours in memory
// (channels_last), else along the columns. A vector has 16 bytes, or four elements, where strides and pointers allow
// it.
#pragma once

#include "device.cuh"

namespace mfef::cuda {

// Channels [channel, channel + channels) of a rectangle of an image; rows and columns may lie beside the map.
struct Region {
  int64_t image;
  int channel, channels;
  Rectangle at;
};

// The value, but what follows from it is computed again: kept meanwhile it would cost registers.
MFEF_DEVICE int64_t anew(int64_t value) {
  asm volatile("" : "+l"(value));
  return value;
}

// One of the units of a launch in one of all tiles.
struct UnitOfTile {
  int64_t tile;
  Unit unit;
  Region region;

  MFEF_DEVICE UnitOfTile(const BlockArgs& a, int64_t index) {
    const Sizes& s = a.sizes;
    const LargeArgs& l = a.large;
    const int64_t tiles = l.tiles.count();
    tile = index / l.units.count;
    unit = l.units.unit(s, l.backward, int(index - tile * l.units.count));
    region.image = tile / tiles;
    region.at = l.tiles.rectangle(s, int(tile - region.image * tiles));
    region.channel = unit.first + (s.branch_count ? Way(s.branches[unit.branch], l.backward).dest_first : 0);
    region.channels = unit.count;
  }
};

template <class T, int kCount>
struct alignas(kCount * sizeof(T) < 16 ? kCount * sizeof(T) : 16) Vector {
  T value[kCount];
};

MFEF_HD int64_t offset_of(const Map& map, int64_t image, int channel, int row, int column) {
  return image * map.stride[0] + channel * map.stride[1] + row * map.stride[2] + column * map.stride[3];
}

// kCount neighbours along the channels or along the columns.
template <int kCount_, bool kChannels_>
struct Neighbours {
  static constexpr int kCount = kCount_;
  static constexpr bool kChannels = kChannels_;
};

// Whether `count` elements of `size` bytes from every multiple of `count` on are a vector, along dimension `along`.
MFEF_DEVICE bool has_vectors(const Map& map, int along, int size, int count) {
  bool aligned = map.stride[along] == 1 && reinterpret_cast<uint64_t>(map.data) % least(count * size, 16) == 0;
  for (int d = 0; d < 4; ++d) aligned = aligned && (d == along || map.stride[d] % count == 0);
  return aligned;
}

// f(Neighbours, channel, row, column of the first) for all of a region, in the order of `map`, whose elements have
// kSize bytes. Vectors are those of `other` too. Along the columns vectors may begin and end beside the region, but
// are wholly in the map or wholly beside it.
template <int kSize, class F>
MFEF_DEVICE void for_each_vector(const Map& map, const Map& other, const Sizes& s, const Region& region, int thread,
                                 int threads, const F& f) {
  const Rectangle at = region.at;
  auto along_channels = [&](auto neighbours) {
    constexpr int kCount = decltype(neighbours)::kCount;
    const int vectors = region.channels / kCount, all = at.rows * at.columns * vectors;
    const Quotient by_vectors(vectors), by_columns(at.columns);
    for (int e = thread; e < all; e += threads) {
      const int pixel = by_vectors(e), row = by_columns(pixel);
      f(neighbours, region.channel + (e - pixel * vectors) * kCount, at.row + row,
        at.column + pixel - row * at.columns);
    }
  };
  auto along_columns = [&](auto neighbours) {
    constexpr int kCount = decltype(neighbours)::kCount;
    const int first = at.column & -kCount, vectors = ceil_div(at.column + at.columns - first, kCount);
    const int lines = region.channels * at.rows, all = lines * vectors;
    const Quotient by_vectors(vectors), by_rows(at.rows);
    for (int e = thread; e < all; e += threads) {
      const int line = by_vectors(e), channel = by_rows(line);
      f(neighbours, region.channel + channel, at.row + line - channel * at.rows, first + (e - line * vectors) * kCount);
    }
  };
  constexpr int kWide = 16 / kSize, kQuad = 4;
  if (map.stride[1] == 1) {
    if (region.channel % kWide == 0 && region.channels % kWide == 0 && has_vectors(map, 1, kSize, kWide) &&
        has_vectors(other, 1, kSize, kWide)) {
      along_channels(Neighbours<kWide, true>());
    } else {
      along_channels(Neighbours<1, true>());
    }
  } else if (s.width % kQuad == 0 && has_vectors(map, 3, kSize, kQuad) && has_vectors(other, 3, kSize, kQuad)) {
    along_columns(Neighbours<kQuad, false>());
  } else {
    along_columns(Neighbours<1, false>());
  }
}

// A region to shared memory, [channel][row][column], with zeros for what lies beside the map.
MFEF_DEVICE void load_region(const Map& map, Element element, const Sizes& s, const Region& region, float* to, int step,
                             int pitch, int thread, int threads) {
  const Rectangle at = region.at;
  with_element(element, [&](auto zero) {
    using T = decltype(zero);
    const T* data = static_cast<const T*>(map.data);
    for_each_vector<sizeof(T)>(map, map, s, region, thread, threads, [&](auto neighbours, int c, int h, int w) {
      using N = decltype(neighbours);
      Vector<T, N::kCount> vector{};
      if (h >= 0 && h < s.height && w >= 0 && w < s.width) {
        vector = *reinterpret_cast<const Vector<T, N::kCount>*>(data + offset_of(map, region.image, c, h, w));
      }
      float* place = to + (c - region.channel) * step + (h - at.row) * pitch + w - at.column;
      MFEF_UNROLL
      for (int i = 0; i < N::kCount; ++i) {
        const bool inside = N::kChannels || N::kCount == 1 || (w + i >= at.column && w + i < at.column + at.columns);
        if (inside) place[N::kChannels ? i * step : i] = float(vector.value[i]);
      }
    });
  });
}

// The other way, of a region that lies within the map and begins at whole vectors: value(place, channel) gives what is
// stored.
template <class Value>
MFEF_DEVICE void store_region(const Map& map, Element element, const Sizes& s, const Region& region, int step,
                              int pitch, int thread, int threads, const Value& value) {
  const Rectangle at = region.at;
  with_element(element, [&](auto zero) {
    using T = decltype(zero);
    T* data = static_cast<T*>(map.data);
    for_each_vector<sizeof(T)>(map, map, s, region, thread, threads, [&](auto neighbours, int c, int h, int w) {
      using N = decltype(neighbours);
      const int place = (c - region.channel) * step + (h - at.row) * pitch + w - at.column;
      Vector<T, N::kCount> vector;
      MFEF_UNROLL
      for (int i = 0; i < N::kCount; ++i) {
        vector.value[i] = T(value(place + (N::kChannels ? i * step : i), N::kChannels ? c + i : c));
      }
      *reinterpret_cast<Vector<T, N::kCount>*>(data + offset_of(map, region.image, c, h, w)) = vector;
    });
  });
}

}  // namespace mfef::cuda
