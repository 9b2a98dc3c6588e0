// The grouped convolutions of a block of images by tensor cores, for branches that suit them (by_matrices): forward,
// and the gradient of x. The others of the same stage go by conv.cuh, side by side.
//
// The product, per group: C = pixels x destination channels, K = 8 source channels x two taps, one above the other.
// A warp owns all pixels of an image and 8 destination channels: rows h, h + 1 of the map are the 16 rows of one of
// four accumulators. Its source is a copy in 16-bit elements, [row][column][channel]: 8 pixels of a row by 8 channels
// are one matrix, so a lane has the word (column lane / 4, channels 2 (lane % 4)) of each of 8 rows, and whatever the
// row of taps is, the operands are among those 8 words. They are read once per 8 source channels and column of
// taps: 8 words for up to 4 K matrix products of 16 x 8 x 8, and a word of weights for each row of taps, 32 neighbours
// for a warp. Columns beside the map are zero words; rows beside it are zeros when compiling, and products of nothing
// else are left out.
//
// Sums are of float32, in the order of the columns of taps, and go on from the map where a stage does: the number of
// stages changes no bit.
#pragma once

#include "conv.cuh"
#include "mma.cuh"

namespace mfef::cuda {

// One branch in one stage.
struct MatrixTask {
  MatrixWay way;
  int first, end;           // columns of taps
  const uint32_t* weights;  // [column][ky][destination channel][source channel]
  bool fresh;               // the first to write its output channels
  int height, pixel_step, step;
};

// f(T()) with the 16-bit type of the elements.
template <class F>
MFEF_DEVICE void with_half(Element element, const F& f) {
  with_element(element, [&](auto zero) {
    if constexpr (sizeof(zero) == 2) f(zero);
  });
}

// The work of one thread in making the copy of the sources.
MFEF_DEVICE void copy_sources(const BlockArgs& a, bool backward, const float* source, uint32_t* copy, int thread,
                              int threads) {
  const Sizes& s = a.sizes;
  const int pixel_step = MatrixWay::pixel_step(s, backward);
  for (int b = 0; b < s.branch_count; ++b) {
    if (!by_matrices(s, s.branches[b])) continue;
    const MatrixWay way(s.branches[b], backward);
    const int per_group = way.sources / 8, chunks = way.groups * per_group;
    const float* from = source + (backward ? s.branches[b].out_first : s.branches[b].in_first) * a.step;
    uint32_t* to = copy + MatrixWay::first(s, backward, b) / 2;
    const Quotient by_chunks(chunks), by_group(per_group);
    with_half(a.element, [&](auto zero) {
      using T = decltype(zero);
      for (int e = thread; e < a.images * s.height * chunks * kWarp; e += threads) {
        const int lane = e % kWarp, row = by_chunks(e / kWarp), chunk = e / kWarp - row * chunks;
        const int group = by_group(chunk), channel = (chunk - group * per_group) * 8 + lane % 4 * 2;
        const int pixel = row * kSide + lane / 4;
        float value[2];
        MFEF_UNROLL
        for (int i = 0; i < 2; ++i) {
          // Zeros fill up a group, as among the weights: nothing times zero is not always zero.
          const bool there = channel + i < way.source_per_group;
          value[i] = there ? from[(group * way.source_per_group + channel + i) * a.step + pixel] : 0.0f;
        }
        to[pixel * pixel_step + chunk * 4 + lane % 4] = word_of<T>(value);
      }
    });
  }
}

// The columns of taps of one image and of the 8 destination channels of which `channels` exist. The pointers are to
// the group's first source channel, to the weights of the 8 channels, and to their maps.
template <class T, int K>
MFEF_DEVICE void multiply_columns(const Warp& warp, const MatrixTask& task, const uint32_t* source,
                                  const uint32_t* weights, float* dest, int channels) {
  constexpr int kHalf = K / 2, kTiles = kSide / 2;
  const int tap_step = task.way.tap_step(), row_step = kSide * task.pixel_step;
  Warp::Registers<Fragment<kSide>> rows;
  Warp::Registers<FragmentB<8>> taps;
  Warp::Registers<Accumulator> sums[kTiles];
  auto taps_of = [&](int thread) -> const FragmentB<8>& { return taps[thread]; };
  auto row = [&](int thread, int r) { return r >= 0 && r < kSide ? rows[thread].word[r] : 0u; };
  // f(value of a sum, its place) for all of a lane that are in the map.
  auto for_each_sum = [&](int thread, const auto& f) {
    const int lane = thread % kWarp;
    MFEF_UNROLL
    for (int m = 0; m < kTiles; ++m) {
      MFEF_UNROLL
      for (int i = 0; i < 4; ++i) {
        const Place at = place_in_c(lane, i);
        const int h = 2 * m + at.row / kSide;
        if (h < task.height && at.column < channels) {
          f(sums[m][thread].value[i], dest[at.column * task.step + h * kSide + at.row % kSide]);
        }
      }
    }
  };
  warp.lanes([&](int thread) {
    MFEF_UNROLL
    for (int m = 0; m < kTiles; ++m) sums[m][thread] = {};
    if (!task.fresh) for_each_sum(thread, [](float& sum, const float& at) { sum = at; });
  });
  MFEF_ROLLED
  for (int column = task.first; column < task.end; ++column) {
    const int chunk = column / K, kx = column - chunk * K;
    const uint32_t* of = weights + (column - task.first) * K * tap_step;
    warp.lanes([&](int thread) {
      const int lane = thread % kWarp, x = lane / 4 + kx - kHalf;
      const uint32_t* from = source + x * task.pixel_step + chunk * 4 + lane % 4;
      MFEF_UNROLL
      for (int r = 0; r < kSide; ++r) {
        rows[thread].word[r] = x >= 0 && x < kSide && r < task.height ? from[r * row_step] : 0u;
      }
    });
    MFEF_UNROLL
    for (int ky = 0; ky < K; ky += 2) {
      const bool pair = ky + 1 < K;
      warp.lanes([&](int thread) {
        const uint32_t* word = of + ky * tap_step + thread % kWarp;
        taps[thread].word[0] = word[0];
        if (pair) taps[thread].word[1] = word[tap_step];
      });
      MFEF_UNROLL
      for (int m = 0; m < kTiles; ++m) {
        const int top = 2 * m + ky - kHalf;
        auto sum = [&](int thread) -> Accumulator& { return sums[m][thread]; };
        if (top >= kSide || top + 1 + pair < 0) continue;
        if (pair) {
          auto pixels = [&](int thread) {
            return FragmentA<8>{{row(thread, top), row(thread, top + 1), row(thread, top + 1), row(thread, top + 2)}};
          };
          multiply_add<T, 8>(warp, sum, pixels, taps_of);
        } else {
          auto pixels = [&](int thread) { return FragmentA<4>{{row(thread, top), row(thread, top + 1)}}; };
          multiply_add<T, 4>(warp, sum, pixels, [&](int thread) { return FragmentB<4>{{taps[thread].word[0]}}; });
        }
      }
    }
  }
  warp.lanes([&](int thread) { for_each_sum(thread, [](const float& sum, float& at) { at = sum; }); });
}

template <int K>
MFEF_DEVICE void convolve_item(const BlockArgs& a, const Warp& warp, const MatrixTask& task, const uint32_t* source,
                               float* dest, int item) {
  const MatrixWay& way = task.way;
  const int tiles = way.tiles(), per_group = way.dests / 8;
  const int image = item / tiles, tile = item - image * tiles, group = tile / per_group;
  const int first = (tile - group * per_group) * 8, row = image * task.height;
  source += row * kSide * task.pixel_step + group * (way.sources / 2);
  dest += (group * way.dest_per_group + first) * task.step + row * kSide;
  with_half(a.element, [&](auto zero) {
    multiply_columns<decltype(zero), K>(warp, task, source, task.weights + tile * 32, dest,
                                        least(way.dest_per_group - first, 8));
  });
}

// The work of one warp in a stage.
MFEF_DEVICE void convolve_by_matrices(const BlockArgs& a, const Warp& warp, bool backward, int stage,
                                      const float* weights, const uint32_t* copy, float* dest, int warps) {
  const Sizes& s = a.sizes;
  for_each_branch<kSide>(a, backward, stage, weights, warps * kWarp,
                         [&](int b, int first, int end, const float* of_branch, int start) {
                           if (!by_matrices(s, s.branches[b])) return;
                           const MatrixTask task{MatrixWay(s.branches[b], backward),
                                                 first,
                                                 end,
                                                 reinterpret_cast<const uint32_t*>(of_branch),
                                                 is_fresh(s, backward, b, first),
                                                 s.height,
                                                 MatrixWay::pixel_step(s, backward),
                                                 a.step};
                           const uint32_t* from = copy + MatrixWay::first(s, backward, b) / 2;
                           float* to = dest + Way(s.branches[b], backward).dest_first * a.step;
                           const int before = warp.index - start / kWarp, items = task.way.tiles() * a.images;
                           for (int item = before < 0 ? before + warps : before; item < items; item += warps) {
                             switch (task.way.k) {
                               case 3:
                                 convolve_item<3>(a, warp, task, from, to, item);
                                 break;
                               case 5:
                                 convolve_item<5>(a, warp, task, from, to, item);
                                 break;
                               case 7:
                                 convolve_item<7>(a, warp, task, from, to, item);
                                 break;
                               case 9:
                                 convolve_item<9>(a, warp, task, from, to, item);
                                 break;
                             }
                           }
                         });
}

// The weights of one branch in a stage to shared memory: a thread has a tap of one input channel, so that neighbours
// read neighbours in memory, of every kLoadParts-th output channel.
MFEF_DEVICE void load_columns(const Branch& b, const Parameter& weights, bool backward, int first, int end,
                              uint32_t* to, int thread, int threads) {
  constexpr int kLoadParts = 8;
  const MatrixWay way(b, backward);
  const int k = b.k, taps = k * k, inputs = b.in_per_group(), outputs = b.out_per_group();
  const int tap_step = 2 * way.tap_step(), skip = (b.full_k - k) / 2, positions = inputs * taps;
  const int64_t so = weights.stride[0], si = weights.stride[1], sy = weights.stride[2], sx = weights.stride[3];
  const Quotient by_positions(positions), by_taps(taps), by_k(k);
  auto* words = reinterpret_cast<uint16_t*>(to);
  const auto* data = static_cast<const uint16_t*>(weights.data) + skip * (sy + sx);
  // Stores the weight of a source and a destination channel of a group, both filled up, if it is of this stage.
  auto store = [&](int source, int ky, int kx, int dest, const uint16_t& weight) {
    const int column = source / 8 * k + kx;
    if (column < first || column >= end) return;
    words[((column - first) * k + ky) * tap_step + dest * 8 + source % 8] = weight;
  };
  for (int e = thread; e < positions * kLoadParts; e += threads) {
    const int part = by_positions(e), position = e - part * positions, in = by_taps(position);
    const int tap = position - in * taps, ky = by_k(tap), kx = tap - ky * k;
    const uint16_t* from = data + in * si + ky * sy + kx * sx;
    for (int group = 0; group < way.groups; ++group) {
      const int dest = group * way.dests;
      for (int out = part; out < outputs; out += kLoadParts) {
        const uint16_t& weight = from[(group * outputs + out) * so];
        if (backward) {
          store(out, k - 1 - ky, k - 1 - kx, dest + in, weight);
        } else {
          store(in, ky, kx, dest + out, weight);
        }
      }
    }
  }
  // What fills up the sources.
  const int fill = way.sources - way.source_per_group, dests = way.groups * way.dests;
  for (int e = thread; e < fill * taps * dests; e += threads) {
    const int source = e / (taps * dests), rest = e - source * (taps * dests), tap = rest / dests;
    store(way.source_per_group + source, tap / k, tap % k, rest - tap * dests, 0);
  }
}

// The work of one thread in loading the weights of a stage.
template <int kRow, bool kMatrices>
MFEF_DEVICE void load_weights(const BlockArgs& a, bool backward, int stage, float* to, int thread, int threads) {
  const Sizes& s = a.sizes;
  for_each_branch<kRow>(a, backward, stage, to, threads, [&](int i, int first, int end, float* at, int) {
    const Branch& b = s.branches[i];
    if constexpr (kMatrices) {
      if (by_matrices(s, b)) {
        auto* words = reinterpret_cast<uint32_t*>(at);
        return load_columns(b, a.conv_weights[i], backward, first, end, words, thread, threads);
      }
    }
    load_branch_weights(Way(b, backward), b.full_k, a.conv_weights[i], 0, 0, a.element, backward, first, end, at,
                        thread, threads);
  });
}

// A stage of the convolution, its weights in shared memory: of every branch, by whatever suits it.
template <int kRow, bool kMatrices>
MFEF_DEVICE void convolve_stage(const BlockArgs& a, const Block& block, const Layout& at, bool backward, int stage) {
  float *m = block.shared, *weights = m + at.weights;
  auto direct = [&](int thread) {
    convolve<kRow>(a, backward, stage, weights, m + at.source, m + at.dest, thread, block.threads);
  };
  if constexpr (kMatrices) {
    block.warps([&](const Warp& warp) {
      convolve_by_matrices(a, warp, backward, stage, weights, reinterpret_cast<const uint32_t*>(m + at.copy),
                           m + at.dest, block.threads / kWarp);
      warp.lanes(direct);
    });
  } else {
    block.phase(direct);
  }
}

MFEF_DEVICE void prepare_sources(const BlockArgs& a, const Block& block, const Layout& at, bool backward) {
  float* m = block.shared;
  block.phase([&](int thread) {
    copy_sources(a, backward, m + at.source, reinterpret_cast<uint32_t*>(m + at.copy), thread, block.threads);
  });
}

}  // namespace mfef::cuda
