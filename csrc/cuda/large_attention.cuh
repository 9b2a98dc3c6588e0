// The attention on maps that stay in memory: forward in three launches after the convolution's, which leaves the
// statistics of its tiles, and backward in five.
//
//   ChannelGates     an image  statistics of the tiles added up, MLP, channel gate (backward: from the saved ones)
//   PoolChannels     a piece   per pixel, mean and maximum over channels of y * gate
//   GateMap          a piece   spatial convolution and gate, the result
//   PixelGradient    a piece   per pixel, the gradient of the spatial gate's logit, and the pooled maps again
//   ChannelGradient  a piece   spatial convolution backward; per channel, the piece's part of the gate's gradient
//   MlpBackward      an image  those parts added up, the MLP backward
//   MapGradient      a piece   the gradient of y
//
// A piece is kSlots pixels of all channels: kChunk channels at a time come to shared memory, where a thread has a pixel
// and some of them, or a channel and some of the pixels.
// Memory: y is read by PoolChannels and GateMap, once each, and y and the gradient by PixelGradient and
// ChannelGradient, the gradient by MapGradient; the result and the gradient of y are written once.
#pragma once

#include "attention.cuh"
#include "region.cuh"

namespace mfef::cuda {

// --- an image ---------------------------------------------------------------------------------

// Mean and maximum of every channel, from the statistics of the tiles.
MFEF_DEVICE void add_up_statistics(const BlockArgs& a, const Block& block, const Layout& at, int64_t image) {
  const LargeArgs& l = a.large;
  const int channels = a.sizes.out, all = channels * l.reduce_parts, tiles = l.tiles.count();
  float *m = block.shared, *sums = m + at.parts, *tops = sums + all, *places = tops + all;
  block.phase([&](int thread) {
    for (int e = thread; e < all; e += block.threads) {
      const int part = e / channels, c = e - part * channels;
      const int first = int(int64_t(tiles) * part / l.reduce_parts);
      const int end = int(int64_t(tiles) * (part + 1) / l.reduce_parts);
      const int64_t from = (image * tiles + first) * channels + c;
      Largest top{0.0f, -1};
      sums[e] = sum_of(end - first, [&](int i) {
        const int64_t tile = from + int64_t(i) * channels;
        top.merge({l.tile_tops[tile], l.tile_places[tile]});
        return l.tile_sums[tile];
      });
      tops[e] = top.value;
      reinterpret_cast<int*>(places)[e] = top.index;
    }
  });
  block.phase([&](int thread) {
    for (int c = thread; c < channels; c += block.threads) {
      float sum = 0.0f;
      Largest top{0.0f, -1};
      for (int part = 0; part < l.reduce_parts; ++part) {
        const int e = part * channels + c;
        sum += sums[e];
        top.merge({tops[e], reinterpret_cast<int*>(places)[e]});
      }
      const float mean = sum / float(a.sizes.pixels());
      const int64_t to = image * channels + c;
      m[at.mean + c] = mean;
      m[at.max + c] = top.value;
      if (!a.mean) continue;
      a.mean[to] = mean;
      a.max[to] = top.value;
      a.max_index[to] = top.index;
    }
  });
}

MFEF_DEVICE void load_statistics(const BlockArgs& a, const Block& block, const Layout& at, int64_t image) {
  block.phase([&](int thread) {
    for (int c = thread; c < a.sizes.out; c += block.threads) {
      block.shared[at.mean + c] = a.mean[image * a.sizes.out + c];
      block.shared[at.max + c] = a.max[image * a.sizes.out + c];
    }
  });
}

struct ChannelGates {
  static MFEF_DEVICE void run(const BlockArgs& a, const Block& block) {
    const Layout at(LargePlan::vectors(a.sizes, a.large.reduce_parts), false, 0, 1, 0);
    for (int64_t image = block.index; image < a.sizes.batch; image += block.count) {
      if (a.large.tile_sums) {
        add_up_statistics(a, block, at, image);
      } else {
        load_statistics(a, block, at, image);
      }
      hidden_layer(a, block, at, 1);
      channel_gate(a, block, at, 1);
      block.phase([&](int thread) {
        for (int c = thread; c < a.sizes.out; c += block.threads) {
          a.large.gate[image * a.sizes.out + c] = block.shared[at.gate + c];
        }
      });
    }
  }
};

struct MlpBackward {
  static MFEF_DEVICE void run(const BlockArgs& a, const Block& block) {
    const LargeArgs& l = a.large;
    const Layout at(LargePlan::vectors(a.sizes, l.reduce_parts), true, 0, 1, 0);
    const int channels = a.sizes.out, pieces = l.pieces.count();
    float *m = block.shared, *parts = m + at.parts;
    for (int64_t image = block.index; image < a.sizes.batch; image += block.count) {
      load_statistics(a, block, at, image);
      hidden_layer(a, block, at, 1);
      channel_gate(a, block, at, 1);
      block.phase([&](int thread) {
        for (int e = thread; e < channels * l.reduce_parts; e += block.threads) {
          const int part = e / channels, c = e - part * channels;
          const int first = int(int64_t(pieces) * part / l.reduce_parts);
          const int end = int(int64_t(pieces) * (part + 1) / l.reduce_parts);
          const float* from = l.dots + (image * pieces + first) * channels + c;
          parts[e] = sum_of(end - first, [&](int i) { return from[int64_t(i) * channels]; });
        }
      });
      block.phase([&](int thread) {
        for (int c = thread; c < channels; c += block.threads) {
          float sum = 0.0f;
          for (int part = 0; part < l.reduce_parts; ++part) sum += parts[part * channels + c];
          keep_logit(a, at, m, {image, 1}, c, sum);
        }
      });
      mlp_backward(a, block, at, {image, 1});
      block.phase([&](int thread) {
        for (int c = thread; c < channels; c += block.threads) {
          l.grad_mean[image * channels + c] = m[at.grad_mean + c];
          l.grad_max[image * channels + c] = m[at.grad_max + c];
        }
      });
    }
  }
};

// --- a piece ----------------------------------------------------------------------------------

// A piece of an image, and where it is in shared memory.
struct Piece {
  int64_t image;
  Rectangle at;
  const Cover& cover;

  MFEF_DEVICE Piece(const BlockArgs& a, int64_t index)
      : image(index / a.large.pieces.count()), at{}, cover(a.large.pieces) {
    at = cover.rectangle(a.sizes, int(index - image * cover.count()));
  }
  MFEF_DEVICE int slots() const { return cover.rows * cover.columns; }
  // f(slot, its pixel of the image) of every pixel, for one thread.
  template <class F>
  MFEF_DEVICE void each_pixel(const Sizes& s, int thread, const F& f) const {
    const int row = thread / cover.columns, column = thread - row * cover.columns;
    if (row < at.rows && column < at.columns) f(thread, (at.row + row) * s.width + at.column + column);
  }
  MFEF_DEVICE Region chunk(const Sizes& s, int first) const { return {image, first, least(kChunk, s.out - first), at}; }
};

// kChunk channels of the piece to shared memory, with zeros beside the map, and their gates.
MFEF_DEVICE void load_chunk(const BlockArgs& a, const Block& block, const PieceLayout& at, const Piece& piece,
                            int first, bool with_gradient) {
  constexpr int kStep = PieceLayout::kStep;
  const Sizes& s = a.sizes;
  float* m = block.shared;
  Region region = piece.chunk(s, first);
  region.at.rows = piece.cover.rows;
  region.at.columns = piece.cover.columns;
  block.phase([&](int thread) {
    load_region(a.y, a.element, s, region, m + at.y, kStep, region.at.columns, thread, block.threads);
    if (with_gradient) {
      load_region(a.grad_result, a.element, s, region, m + at.grad, kStep, region.at.columns, thread, block.threads);
    }
    if (thread < region.channels) m[at.gate + thread] = a.large.gate[piece.image * s.out + first + thread];
  });
}

// One of `count` maps (N, count, H, W) around the piece to shared memory, with zeros beside the map.
MFEF_DEVICE void load_halo(const BlockArgs& a, const PieceLayout& at, const Piece& piece, const float* from, int count,
                           int map, float* to, int thread, int threads) {
  const Sizes& s = a.sizes;
  const int half = s.spatial_k / 2;
  from += (piece.image * count + map) * s.pixels();
  for (int e = thread; e < at.halo_rows * at.halo_columns; e += threads) {
    const int row = e / at.halo_columns, h = piece.at.row + row - half;
    const int w = piece.at.column + e - row * at.halo_columns - half;
    const bool inside = h >= 0 && h < s.height && w >= 0 && w < s.width;
    to[map * at.halo_rows * at.halo_columns + e] = inside ? from[h * s.width + w] : 0.0f;
  }
}

// The weights of the spatial convolution to shared memory.
MFEF_DEVICE void load_spatial_taps(const BlockArgs& a, float* to, int thread, int threads) {
  const int k = a.sizes.spatial_k;
  for (int e = thread; e < 2 * k * k; e += threads) to[e] = spatial_weight(a, e / (k * k), e / k % k, e % k);
}

struct PoolChannels {
  struct Pooled {
    float sum;
    Largest top;
  };

  static MFEF_DEVICE void run(const BlockArgs& a, const Block& block) {
    const Sizes& s = a.sizes;
    const PieceLayout at(s, a.large.pieces, false);
    float *m = block.shared, *sums = m + at.parts, *tops = sums + kLargeThreads, *places = tops + kLargeThreads;
    Block::Registers<Pooled> registers(block);
    for (int64_t index = block.index; index < a.blocks; index += block.count) {
      const Piece piece(a, index);
      for (int first = 0; first < s.out; first += kChunk) {
        load_chunk(a, block, at, piece, first, false);
        block.phase([&](int thread) {
          Pooled& pooled = registers[thread];
          if (first == 0) pooled = {0.0f, {0.0f, -1}};
          const int slot = thread % kSlots, run = kChunk / kSlotParts, c = thread / kSlots * run;
          const int channels = least(run, s.out - first - c);
          if (channels <= 0 || slot >= piece.slots()) return;
          const float *y = m + at.y + c * PieceLayout::kStep + slot, *gate = m + at.gate + c;
          if (first == 0) pooled.top = {y[0] * gate[0], c};
          pooled.sum += sum_of(channels, [&](int i) {
            const float z = y[i * PieceLayout::kStep] * gate[i];
            pooled.top.see(z, first + c + i);
            return z;
          });
        });
      }
      block.phase([&](int thread) {
        const Pooled& pooled = registers[thread];
        sums[thread] = pooled.sum;
        tops[thread] = pooled.top.value;
        reinterpret_cast<int*>(places)[thread] = pooled.top.index;
      });
      block.phase([&](int thread) {
        piece.each_pixel(s, thread, [&](int slot, int pixel) {
          float sum = 0.0f;
          Largest top{0.0f, -1};
          for (int e = slot; e < kLargeThreads; e += kSlots) {
            sum += sums[e];
            top.merge({tops[e], reinterpret_cast<int*>(places)[e]});
          }
          const int64_t of_image = piece.image * s.pixels();
          a.large.pooled[2 * of_image + pixel] = top.value;
          a.large.pooled[2 * of_image + s.pixels() + pixel] = sum / float(s.out);
          if (a.channel_index) a.channel_index[of_image + pixel] = top.index;
        });
      });
    }
  }
};

// Per pixel and row of spatial taps one sum, for every map of the weight: parts[2 ky + map][slot]. `from` is what the
// taps of the first map meet, what those of the second meet lies `step` floats further.
MFEF_DEVICE void add_spatial_rows(const Sizes& s, const PieceLayout& at, const Piece& piece, const float* from,
                                  int step, bool flipped, float* m, int thread, int threads) {
  const int k = s.spatial_k, half = k / 2;
  for (int e = thread; e < 2 * k * kSlots; e += threads) {
    const int part = e / kSlots, slot = e % kSlots, map = part % 2, ky = part / 2;
    const int h = slot / piece.cover.columns, w = slot - h * piece.cover.columns;
    const float* taps = m + at.taps + (map * k + ky) * k;
    m[at.parts + e] = row_of_spatial_taps(k, at.halo_rows, at.halo_columns, from + map * step, h + half, w + half, ky,
                                          flipped, [&](int kx) { return taps[kx]; });
  }
}

struct GateMap {
  static MFEF_DEVICE void run(const BlockArgs& a, const Block& block) {
    const Sizes& s = a.sizes;
    const PieceLayout at(s, a.large.pieces, false);
    const int k = s.spatial_k, halo = at.halo_rows * at.halo_columns;
    float *m = block.shared, *parts = m + at.parts;
    for (int64_t index = block.index; index < a.blocks; index += block.count) {
      const Piece piece(a, index);
      block.phase([&](int thread) {
        for (int map = 0; map < 2; ++map) {
          load_halo(a, at, piece, a.large.pooled, 2, map, m + at.pooled, thread, block.threads);
        }
        load_spatial_taps(a, m + at.taps, thread, block.threads);
      });
      block.phase(
          [&](int thread) { add_spatial_rows(s, at, piece, m + at.pooled, halo, false, m, thread, block.threads); });
      block.phase([&](int thread) {
        piece.each_pixel(s, thread, [&](int slot, int pixel) {
          const float gate = sigmoid(sum_of(2 * k, [&](int part) { return parts[part * kSlots + slot]; }));
          m[at.spatial_gate + slot] = gate;
          if (a.spatial_gate) a.spatial_gate[piece.image * s.pixels() + pixel] = gate;
        });
      });
      for (int first = 0; first < s.out; first += kChunk) {
        block.phase(
            [&](int thread) { store_product(a, piece.chunk(s, first), m + at.spatial_gate, thread, block.threads); });
      }
    }
  }

  // The result: y times both gates, without a detour through shared memory.
  static MFEF_DEVICE void store_product(const BlockArgs& a, const Region& region, const float* spatial_gate, int thread,
                                        int threads) {
    const Rectangle of = region.at;
    const int columns = a.large.pieces.columns;
    const float* gate = a.large.gate + region.image * a.sizes.out;
    with_element(a.element, [&](auto zero) {
      using T = decltype(zero);
      const T* y = static_cast<const T*>(a.y.data);
      T* result = static_cast<T*>(a.result.data);
      for_each_vector<sizeof(T)>(
          a.result, a.y, a.sizes, region, thread, threads, [&](auto neighbours, int c, int h, int w) {
            using N = decltype(neighbours);
            Vector<T, N::kCount> v =
                *reinterpret_cast<const Vector<T, N::kCount>*>(y + offset_of(a.y, region.image, c, h, w));
            const float* of_pixel = spatial_gate + (h - of.row) * columns + w - of.column;
            MFEF_UNROLL
            for (int i = 0; i < N::kCount; ++i) {
              v.value[i] = T(float(v.value[i]) * gate[N::kChannels ? c + i : c] * of_pixel[N::kChannels ? 0 : i]);
            }
            *reinterpret_cast<Vector<T, N::kCount>*>(result + offset_of(a.result, region.image, c, h, w)) = v;
          });
    });
  }
};

struct PixelGradient {
  struct Sum {
    float dot, sum;
  };

  static MFEF_DEVICE void run(const BlockArgs& a, const Block& block) {
    constexpr int kStep = PieceLayout::kStep;
    const Sizes& s = a.sizes;
    const PieceLayout at(s, a.large.pieces, true);
    float *m = block.shared, *dots = m + at.parts, *sums = dots + kLargeThreads;
    Block::Registers<Sum> registers(block);
    for (int64_t index = block.index; index < a.blocks; index += block.count) {
      const Piece piece(a, index);
      for (int first = 0; first < s.out; first += kChunk) {
        load_chunk(a, block, at, piece, first, true);
        block.phase([&](int thread) {
          Sum& sum = registers[thread];
          if (first == 0) sum = {};
          const int slot = thread % kSlots, run = kChunk / kSlotParts, part = thread / kSlots * run;
          float dot_part = 0.0f, sum_part = 0.0f;
          if (slot >= piece.slots()) return;
          for (int c = part; c < least(part + run, s.out - first); ++c) {
            const float z = m[at.y + c * kStep + slot] * m[at.gate + c];
            dot_part = fmaf(m[at.grad + c * kStep + slot], z, dot_part);
            sum_part += z;
          }
          sum.dot += dot_part;
          sum.sum += sum_part;
        });
      }
      block.phase([&](int thread) {
        dots[thread] = registers[thread].dot;
        sums[thread] = registers[thread].sum;
      });
      block.phase([&](int thread) {
        piece.each_pixel(s, thread, [&](int slot, int pixel) {
          float dot = 0.0f, sum = 0.0f;
          for (int e = slot; e < kLargeThreads; e += kSlots) {
            dot += dots[e];
            sum += sums[e];
          }
          const int64_t of_image = piece.image * s.pixels();
          const float gate = a.spatial_gate[of_image + pixel];
          const int channel = max_channel(a, of_image + pixel);
          a.large.grad_spatial[of_image + pixel] = dot * (gate * (1.0f - gate));
          float top = 0.0f;
          with_element(a.element, [&](auto zero) {
            const auto* y = static_cast<const decltype(zero)*>(a.y.data);
            const int h = pixel / s.width;
            top = float(y[offset_of(a.y, piece.image, channel, h, pixel - h * s.width)]);
          });
          a.large.pooled[2 * of_image + pixel] = top * a.large.gate[piece.image * s.out + channel];
          a.large.pooled[2 * of_image + s.pixels() + pixel] = sum / float(s.out);
        });
      });
    }
  }

  // Clamped: a direct call of the operator may give any indices.
  static MFEF_DEVICE int max_channel(const BlockArgs& a, int64_t place) {
    return least(most(a.channel_index[place], 0), a.sizes.out - 1);
  }
};

struct ChannelGradient {
  static MFEF_DEVICE void run(const BlockArgs& a, const Block& block) {
    constexpr int kStep = PieceLayout::kStep, kRunSlots = kSlots / kSlotParts;
    const Sizes& s = a.sizes;
    const PieceLayout at(s, a.large.pieces, true);
    float *m = block.shared, *parts = m + at.parts;
    const int* channel_index = reinterpret_cast<int*>(m) + at.channel_index;
    const int slots = a.large.pieces.rows * a.large.pieces.columns;
    for (int64_t index = block.index; index < a.blocks; index += block.count) {
      const Piece piece(a, index);
      spatial_backward_of_piece(a, block, at, piece, index);
      for (int first = 0; first < s.out; first += kChunk) {
        const int channels = least(kChunk, s.out - first);
        load_chunk(a, block, at, piece, first, true);
        block.phase([&](int thread) {
          const int c = thread % kChunk, part = thread / kChunk;
          if (c >= channels) return;
          float sum = 0.0f;
          for (int slot = part * kRunSlots; slot < least((part + 1) * kRunSlots, slots); ++slot) {
            const float dz = gradient_of_product(m[at.grad + c * kStep + slot], m[at.spatial_gate + slot],
                                                 m + at.grad_pooled + slot, channel_index[slot] == first + c, s.out);
            sum = fmaf(dz, m[at.y + c * kStep + slot], sum);
          }
          parts[thread] = sum;
        });
        block.phase([&](int thread) {
          if (thread >= channels) return;
          float sum = 0.0f;
          for (int e = thread; e < kLargeThreads; e += kChunk) sum += parts[e];
          a.large.dots[index * s.out + first + thread] = sum;
        });
      }
    }
  }

  // Of z = y * gate, from those of the result and of the pooled maps (maximum, and kSlots further the mean).
  static MFEF_DEVICE float gradient_of_product(float grad, float spatial_gate, const float* grad_pooled, bool is_max,
                                               int channels) {
    const float dz = fmaf(grad, spatial_gate, grad_pooled[kSlots] / float(channels));
    return is_max ? dz + grad_pooled[0] : dz;
  }

  // Data and weight gradient of the spatial convolution, the latter of this piece's pixels alone. Slots beside the map
  // get zeros.
  static MFEF_DEVICE void spatial_backward_of_piece(const BlockArgs& a, const Block& block, const PieceLayout& at,
                                                    const Piece& piece, int64_t index) {
    const Sizes& s = a.sizes;
    const int k = s.spatial_k, half = k / 2, halo = at.halo_rows * at.halo_columns;
    float *m = block.shared, *parts = m + at.parts;
    block.phase([&](int thread) {
      load_halo(a, at, piece, a.large.grad_spatial, 1, 0, m + at.grad_spatial, thread, block.threads);
      for (int map = 0; map < 2; ++map) {
        load_halo(a, at, piece, a.large.pooled, 2, map, m + at.pooled, thread, block.threads);
      }
      load_spatial_taps(a, m + at.taps, thread, block.threads);
    });
    block.phase([&](int thread) {
      add_spatial_rows(s, at, piece, m + at.grad_spatial, 0, true, m, thread, block.threads);
      if (!a.grads.spatial) return;
      for (int e = thread; e < 2 * k * k; e += block.threads) {
        const int map = e / (k * k), ky = e / k % k, kx = e % k;
        const float *grad = m + at.grad_spatial, *pooled = m + at.pooled + map * halo;
        a.grads.spatial[index * (2 * k * k) + e] = sum_of(piece.at.rows, [&](int h) {
          float part = 0.0f;
          for (int w = 0; w < piece.at.columns; ++w) {
            part =
                fmaf(grad[(h + half) * at.halo_columns + w + half], pooled[(h + ky) * at.halo_columns + w + kx], part);
          }
          return part;
        });
      }
    });
    block.phase([&](int thread) {
      if (thread >= kSlots) return;
      m[at.spatial_gate + thread] = m[at.grad_pooled + thread] = m[at.grad_pooled + kSlots + thread] = 0.0f;
      reinterpret_cast<int*>(m)[at.channel_index + thread] = -1;
      piece.each_pixel(s, thread, [&](int slot, int pixel) {
        const int64_t of_image = piece.image * s.pixels();
        for (int map = 0; map < 2; ++map) {
          const float sum = sum_of(k, [&](int ky) { return parts[(2 * ky + map) * kSlots + slot]; });
          m[at.grad_pooled + map * kSlots + slot] = sum;
          a.large.grad_pooled[2 * of_image + map * s.pixels() + pixel] = sum;
        }
        m[at.spatial_gate + slot] = a.spatial_gate[of_image + pixel];
        reinterpret_cast<int*>(m)[at.channel_index + slot] = PixelGradient::max_channel(a, of_image + pixel);
      });
    });
  }
};

struct MapGradient {
  static MFEF_DEVICE void run(const BlockArgs& a, const Block& block) {
    const Sizes& s = a.sizes;
    const PieceLayout at(s, a.large.pieces, false);
    float* m = block.shared;
    for (int64_t index = block.index; index < a.blocks; index += block.count) {
      const Piece piece(a, index);
      block.phase([&](int thread) {
        piece.each_pixel(s, thread, [&](int slot, int pixel) {
          const int64_t of_image = piece.image * s.pixels();
          m[at.spatial_gate + slot] = a.spatial_gate[of_image + pixel];
          reinterpret_cast<int*>(m)[at.channel_index + slot] = PixelGradient::max_channel(a, of_image + pixel);
          m[at.grad_pooled + slot] = a.large.grad_pooled[2 * of_image + pixel];
          m[at.grad_pooled + kSlots + slot] = a.large.grad_pooled[2 * of_image + s.pixels() + pixel];
        });
      });
      for (int first = 0; first < s.out; first += kChunk) {
        block.phase([&](int thread) {
          with_element(a.element, [&](auto zero) {
            using T = decltype(zero);
            // In float32 for the convolution, in the type of y where that is the result.
            if (a.large.dy_element == Element::kFloat) {
              store_gradient<T, float>(a, at, piece.chunk(s, first), m, thread, block.threads);
            } else {
              store_gradient<T, T>(a, at, piece.chunk(s, first), m, thread, block.threads);
            }
          });
        });
      }
    }
  }

  template <class From, class To>
  static MFEF_DEVICE void store_gradient(const BlockArgs& a, const PieceLayout& at, const Region& region,
                                         const float* m, int thread, int threads) {
    const Sizes& s = a.sizes;
    const LargeArgs& l = a.large;
    const Rectangle of = region.at;
    const int columns = l.pieces.columns;
    const int64_t of_image = region.image * s.out;
    const From* grad = static_cast<const From*>(a.grad_result.data);
    To* dy = static_cast<To*>(l.dy.data);
    for_each_vector<sizeof(From)>(
        l.dy, a.grad_result, s, region, thread, threads, [&](auto neighbours, int channel, int h, int w) {
          using N = decltype(neighbours);
          const Vector<From, N::kCount> from = *reinterpret_cast<const Vector<From, N::kCount>*>(
              grad + offset_of(a.grad_result, region.image, channel, h, w));
          Vector<To, N::kCount> to;
          MFEF_UNROLL
          for (int i = 0; i < N::kCount; ++i) {
            const int c = N::kChannels ? channel + i : channel, column = N::kChannels ? w : w + i;
            const int slot = (h - of.row) * columns + column - of.column;
            const bool is_max = reinterpret_cast<const int*>(m)[at.channel_index + slot] == c;
            const float dz = ChannelGradient::gradient_of_product(float(from.value[i]), m[at.spatial_gate + slot],
                                                                  m + at.grad_pooled + slot, is_max, s.out);
            const float mean = l.grad_mean[of_image + c], max = l.grad_max[of_image + c];
            const bool first = a.max_index[of_image + c] == h * s.width + column;
            to.value[i] = To(fmaf(dz, l.gate[of_image + c], first ? mean + max : mean));
          }
          *reinterpret_cast<Vector<To, N::kCount>*>(dy + offset_of(l.dy, region.image, channel, h, w)) = to;
        });
  }
};

}  // namespace mfef::cuda
