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
//
// In TF32 a word is one channel and K 4 source channels x two taps. There is no copy: the map itself is rounded, its
// words are the operands. Sums are cut into chains, as in conv.cuh.
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

// The channels that tensor cores read become what they read of them, in place. Where branches read the same channels,
// those that go the direct way have them rounded too.
MFEF_DEVICE void round_sources(const BlockArgs& a, bool backward, float* source, int thread, int threads) {
  const Sizes& s = a.sizes;
  const int places = a.images * s.height * kSide;
  const Quotient by_places(places);
  for (int b = 0; b < s.branch_count; ++b) {
    if (!by_matrices(s, s.branches[b])) continue;
    const MatrixWay way(s, s.branches[b], backward);
    for (int e = thread; e < way.groups * way.source_per_group * places; e += threads) {
      const int channel = by_places(e), at = (way.source_first + channel) * a.step + e - channel * places;
      reinterpret_cast<uint32_t*>(source)[at] = tf32_word(source[at]);
    }
    if (!backward && !s.split) return;
  }
}

// The work of one thread in making the copy of the sources.
MFEF_DEVICE void copy_sources(const BlockArgs& a, bool backward, const float* source, uint32_t* copy, int thread,
                              int threads) {
  const Sizes& s = a.sizes;
  const int pixel_step = MatrixWay::pixel_step(s, backward);
  for (int b = 0; b < s.branch_count; ++b) {
    if (!by_matrices(s, s.branches[b])) continue;
    const MatrixWay way(s, s.branches[b], backward);
    const int per_group = way.sources / 8, chunks = way.groups * per_group;
    const float* from = source + way.source_first * a.step;
    uint32_t* to = copy + MatrixWay::first(s, backward, b) / 2;
    const Quotient by_chunks(chunks), by_group(per_group);
    with_operand(a.element, [&](auto zero) {
      using T = decltype(zero);
      if constexpr (kPerWord<T> == 2) {
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
  constexpr bool kInPlace = kPerWord<T> == 1;
  const int tap_step = task.way.tap_step(), column_step = task.way.column_step();
  const int row_step = kInPlace ? kSide : kSide * task.pixel_step;
  Warp::Registers<Fragment<kSide>> rows;
  Warp::Registers<FragmentB<8>> taps;
  Warp::Registers<Accumulator> sums[kTiles], totals[kTiles];  // the latter in TF32 only
  auto taps_of = [&](int thread) -> const FragmentB<8>& { return taps[thread]; };
  auto row = [&](int thread, int r) { return r >= 0 && r < kSide ? rows[thread].word[r] : 0u; };
  // f(value of a sum, its place) for all of a lane that are in the map.
  auto for_each_sum = [&](Warp::Registers<Accumulator>* of, int thread, const auto& f) {
    const int lane = thread % kWarp;
    MFEF_UNROLL
    for (int m = 0; m < kTiles; ++m) {
      MFEF_UNROLL
      for (int i = 0; i < 4; ++i) {
        const Place at = place_in_c(lane, i);
        const int h = 2 * m + at.row / kSide;
        if (h < task.height && at.column < channels) {
          f(of[m][thread].value[i], dest[at.column * task.step + h * kSide + at.row % kSide]);
        }
      }
    }
  };
  auto* results = kInPlace ? totals : sums;
  warp.lanes([&](int thread) {
    MFEF_UNROLL
    for (int m = 0; m < kTiles; ++m) sums[m][thread] = totals[m][thread] = {};
    if (!task.fresh) for_each_sum(results, thread, [](float& sum, const float& at) { sum = at; });
  });
  int until = least(task.first + MatrixWay::tf32_chain(K), task.end);  // of the chain
  MFEF_ROLLED
  for (int column = task.first; column < task.end; ++column) {
    const int chunk = column / K, kx = column - chunk * K;
    const uint32_t* of = weights + (column - task.first) * column_step;
    warp.lanes([&](int thread) {
      const int lane = thread % kWarp, x = lane / 4 + kx - kHalf, word = chunk * 4 + lane % 4;
      const int channel = MatrixWay::source(kInPlace, word);
      const uint32_t* from = source + (kInPlace ? channel * task.step + x : x * task.pixel_step + word);
      const bool there = x >= 0 && x < kSide && (!kInPlace || channel < task.way.source_per_group);
      MFEF_UNROLL
      for (int r = 0; r < kSide; ++r) rows[thread].word[r] = there && r < task.height ? from[r * row_step] : 0u;
    });
    MFEF_UNROLL
    for (int ky = 0; ky < K; ky += 2) {
      const bool pair = ky + 1 < K;
      warp.lanes([&](int thread) {
        const uint32_t* word = of + ky * tap_step + thread % kWarp;
        const bool exists = thread % kWarp / 4 < channels;  // the lane's destination channel
        taps[thread].word[0] = exists ? word[0] : 0u;
        if (pair) taps[thread].word[1] = exists ? word[tap_step] : 0u;
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
    if (kInPlace && column + 1 == until) {
      until = least(until + MatrixWay::tf32_chain(K), task.end);
      warp.lanes([&](int thread) {
        MFEF_UNROLL
        for (int m = 0; m < kTiles; ++m) {
          totals[m][thread].add(sums[m][thread]);
          sums[m][thread] = {};
        }
      });
    }
  }
  warp.lanes([&](int thread) { for_each_sum(results, thread, [](const float& sum, float& at) { at = sum; }); });
}

template <int K>
MFEF_DEVICE void convolve_item(const BlockArgs& a, const Warp& warp, const MatrixTask& task, const uint32_t* source,
                               float* dest, int item) {
  const MatrixWay& way = task.way;
  const int tiles = way.tiles(), per_group = way.dests / 8;
  const int image = item / tiles, tile = item - image * tiles, group = tile / per_group;
  const int first = (tile - group * per_group) * 8, row = image * task.height;
  source += way.tf32 ? (way.source_first + group * way.source_per_group) * task.step + row * kSide
                     : row * kSide * task.pixel_step + group * (way.sources / 2);
  dest += (group * way.dest_per_group + first) * task.step + row * kSide;
  with_operand(a.element, [&](auto zero) {
    multiply_columns<decltype(zero), K>(warp, task, source, task.weights + tile * 32, dest,
                                        least(way.dest_per_group - first, 8));
  });
}

// The work of one warp in a stage.
MFEF_DEVICE void convolve_by_matrices(const BlockArgs& a, const Warp& warp, bool backward, int stage,
                                      const float* weights, const uint32_t* source, float* dest, int warps) {
  const Sizes& s = a.sizes;
  for_each_branch<kSide>(a, backward, stage, weights, warps * kWarp,
                         [&](int b, int first, int end, const float* of_branch, int start) {
                           if (!by_matrices(s, s.branches[b])) return;
                           const MatrixTask task{MatrixWay(s, s.branches[b], backward),
                                                 first,
                                                 end,
                                                 reinterpret_cast<const uint32_t*>(of_branch),
                                                 is_fresh(s, backward, b, first),
                                                 s.height,
                                                 MatrixWay::pixel_step(s, backward),
                                                 a.step};
                           const uint32_t* from = source + MatrixWay::first(s, backward, b) / 2;
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

// The weights of one branch in a stage to shared memory. A thread has a tap of a word of sources, backward of a
// destination channel: neighbours read neighbours in memory, taps or, channels_last, channels. It goes through the
// destination channels, backward through the words of sources, kAtOnce of them under way. E: uint16_t,
// whatever 16-bit type that is, or float.
template <class E>
MFEF_DEVICE void load_columns(const Sizes& s, const Branch& b, const Parameter& weights, bool backward, int first,
                              int end, uint32_t* to, int thread, int threads) {
  constexpr int kParts = 4, kAtOnce = 4;
  const MatrixWay way(s, b, backward);
  const int k = way.k, tap_step = way.tap_step(), column_step = way.column_step(), skip = (b.full_k - k) / 2;
  const int64_t so = weights.stride[0], si = weights.stride[1], sy = weights.stride[2], sx = weights.stride[3];
  const int64_t source_step = backward ? so : si, dest_step = backward ? si : so;
  const auto* data = static_cast<const E*>(weights.data) + skip * (sy + sx);
  // Of a group the chunks of sources that have columns in the stage, the first and the last maybe some columns only.
  const int first_chunk = first / k, last_chunk = (end - 1) / k, first_kx = first - first_chunk * k;
  const int end_kx = end - last_chunk * k, first_word = first_chunk * 4, words = (last_chunk + 1) * 4 - first_word;
  const bool one = first_chunk == last_chunk;
  const int left = one ? first_kx : 0, width = one ? end - first : k, taps = k * width;
  const int across = backward ? way.dest_per_group : words, positions = across * taps;
  const int group_parts = least(way.groups, kParts), along_parts = kParts / group_parts;
  const int64_t group_step = group_parts * (backward ? way.source_per_group : way.dest_per_group) * so;
  const int64_t along_step = along_parts * (backward ? 2 * source_step : dest_step);
  const bool channels_last = si == 1;
  const Quotient by_positions(positions), by_group_parts(group_parts), by_width(width);
  const Quotient by_inner(channels_last ? across : taps);
  for (int e = thread; e < positions * group_parts * along_parts; e += threads) {
    const int part = by_positions(e), position = e - part * positions, outer = by_inner(position);
    const int inner = position - outer * by_inner.divisor;
    const int own = channels_last ? inner : outer, tap = channels_last ? outer : inner;
    const int ky = by_width(tap), kx = left + tap - ky * width;
    const int begin = kx < first_kx ? 4 : 0, until = kx < end_kx ? words : words - 4;
    const int along = backward ? until : own >= begin && own < until ? way.dest_per_group : 0;
    const int along_part = by_group_parts(part), group_part = part - along_part * group_parts;
    const E* of_group = data + (backward ? (k - 1 - ky) * sy + (k - 1 - kx) * sx : ky * sy + kx * sx) +
                        group_part * (group_step / group_parts);
    uint32_t* of_row = to + (kx - first_kx) * column_step + ky * tap_step + group_part * way.dests * 4;
    const int start = along_part + (backward ? begin : 0);
    for (int group = group_part; group < way.groups; group += group_parts) {
      // Sources of words one after the other are so too but in TF32.
      auto address = [&](int other) {
        const int source = MatrixWay::source(kPerWord<E> == 1, first_word + (backward ? other : own));
        return of_group + source * source_step + (backward ? own : other) * dest_step;
      };
      const E* next = address(start);
      for (int at = start; at < along; at += kAtOnce * along_parts) {
        E value[kAtOnce][kPerWord<E>];
        MFEF_UNROLL
        for (int i = 0; i < kAtOnce; ++i, next += along_step) {
          const int other = at + i * along_parts;
          const int source = MatrixWay::source(kPerWord<E> == 1, first_word + (backward ? other : own));
          const E* from = kPerWord<E> == 1 && backward ? address(other) : next;
          // Zeros fill up groups.
          MFEF_UNROLL
          for (int j = 0; j < kPerWord<E>; ++j) {
            value[i][j] = other < along && source + j < way.source_per_group ? from[j * source_step] : E(0);
          }
        }
        MFEF_UNROLL
        for (int i = 0; i < kAtOnce; ++i) {
          const int other = at + i * along_parts, word = backward ? other : own, dest = backward ? own : other;
          if (other >= along) continue;
          uint32_t& to_word = of_row[word / 4 * (k * column_step) + dest * 4 + word % 4];
          if constexpr (kPerWord<E> == 2) {
            to_word = uint32_t(value[i][0]) | uint32_t(value[i][1]) << 16;
          } else {
            to_word = tf32_word(value[i][0]);
          }
        }
      }
      of_group += group_step;
      of_row += group_parts * way.dests * 4;
    }
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
        if (s.tf32) return load_columns<float>(s, b, a.conv_weights[i], backward, first, end, words, thread, threads);
        return load_columns<uint16_t>(s, b, a.conv_weights[i], backward, first, end, words, thread, threads);
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
      const float* source = m + (a.sizes.tf32 ? at.source : at.copy);
      convolve_by_matrices(a, warp, backward, stage, weights, reinterpret_cast<const uint32_t*>(source), m + at.dest,
                           block.threads / kWarp);
      warp.lanes(direct);
    });
  } else {
    block.phase(direct);
  }
}

MFEF_DEVICE void prepare_sources(const BlockArgs& a, const Block& block, const Layout& at, bool backward) {
  float* m = block.shared;
  block.phase([&](int thread) {
    if (a.sizes.tf32) return round_sources(a, backward, m + at.source, thread, block.threads);
    copy_sources(a, backward, m + at.source, reinterpret_cast<uint32_t*>(m + at.copy), thread, block.threads);
  });
}

}  // namespace mfef::cuda
