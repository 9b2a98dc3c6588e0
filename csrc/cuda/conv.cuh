// The grouped convolutions of a block of images whose maps are in shared memory: forward, and the gradient of x, which
// is the same loop with channels exchanged and taps in reverse order.
//
// Which thread owns what: an item is kRows neighbouring rows of kOut output channels of one group, all columns,
// accumulated in registers. Per source channel and row of taps a thread reads one more row of the source (16 bytes at
// a time; the other rows are still in registers), k * kOut weights, and does up to kRows * kOut * k * kRow
// multiply-adds, less those of taps beside the map: columns outside are left out when compiling, rows outside are not
// looped over. Neighbouring threads own neighbouring output channels: they read the same source row (one
// broadcast) or, in narrow groups, rows that are an odd number of 16-byte vectors apart, and adjacent weights. At
// 8x8, per source channel and row of taps: 2 16-byte reads, k words of weights, 22 (k = 3) to 52 (k = 9)
// multiply-adds per row.
//
// Sums are cut into chains of at most kChain products, which start from zero and are added to the map in the order
// of the source channels, wherever the stages are cut.
#pragma once

#include "device.cuh"

namespace mfef::cuda {

// The register tiles. Rows of a thread, and its output channels where there are more items than threads.
template <int kRow>
struct Tiles {
  static constexpr int kRows = kRow == 16 ? 1 : 2;
  static constexpr int kWide = kRow == 2 ? 4 : 2;
  static_assert(kRow * kRows * kWide <= 32, "accumulators");
};

// One branch in one stage.
struct ConvTask {
  Way way;
  int first, end;        // source channels of a group
  const float* weights;  // [source channel][ky][kx][output channel], `weight_step` floats from tap to tap
  bool fresh;            // the first to write its output channels
};

// acc[p] += sum over kx of weights[kx] * row[p + kx - k / 2], columns outside the map left out.
template <int K, int kRow>
MFEF_DEVICE void add_row_of_taps(const float (&weights)[K], const float (&row)[kRow], float (&acc)[kRow]) {
  MFEF_UNROLL
  for (int kx = 0; kx < K; ++kx) {
    MFEF_UNROLL
    for (int p = 0; p < kRow; ++p) {
      const int at = p + kx - K / 2;
      if (at >= 0 && at < kRow) acc[p] = fmaf(weights[kx], row[at], acc[p]);
    }
  }
}

// An item of a branch whose k is compiled.
template <int K, int kRow, int kOut>
MFEF_DEVICE void convolve_item(const ConvTask& task, const float* source, float* dest, int height, int step, int item) {
  constexpr int kRows = Tiles<kRow>::kRows, kHalf = K / 2;
  const Way& way = task.way;
  const int per_group = way.dest_per_group / kOut, columns = way.groups * per_group;
  const int place = item / columns, column = item - place * columns;
  const int group = column / per_group, channel = group * way.dest_per_group + column - group * per_group;
  const int tall = ceil_div(height, kRows), image = place / tall, h = (place - image * tall) * kRows;
  const int tap_step = way.weight_step(), chain = way.chain();
  const int ky_begin = most(0, kHalf - h - (kRows - 1)), ky_end = least(K, height + kHalf - h);

  source += (way.source_first + group * way.source_per_group) * step + image * height * kRow;
  dest += (way.dest_first + channel) * step + (image * height + h) * kRow;
  const float* weights = task.weights + channel;
  MFEF_ROLLED
  for (int first = task.first; first < task.end; first += chain) {
    float acc[kOut][kRows][kRow] = {};
    const int end = least(first + chain, task.end);
    MFEF_ROLLED
    for (int j = first; j < end; ++j) {
      const float* from = source + j * step;
      const float* taps = weights + ((j - task.first) * K + ky_begin) * K * tap_step;
      // rows[r] is the source's row under output row h + r; all but the last move up with ky.
      float rows[kRows][kRow] = {};
      MFEF_UNROLL
      for (int r = 1; r < kRows; ++r) {
        const int at = h + r - 1 + ky_begin - kHalf;
        if (at >= 0 && at < height) load_row<kRow>(from + at * kRow, rows[r]);
      }
      MFEF_ROLLED
      for (int ky = ky_begin; ky < ky_end; ++ky, taps += K * tap_step) {
        MFEF_UNROLL
        for (int r = 1; r < kRows; ++r) {
          MFEF_UNROLL
          for (int p = 0; p < kRow; ++p) rows[r - 1][p] = rows[r][p];
        }
        const int last = h + kRows - 1 + ky - kHalf;
        if (last >= 0 && last < height) load_row<kRow>(from + last * kRow, rows[kRows - 1]);
        MFEF_UNROLL
        for (int c = 0; c < kOut; ++c) {
          float w[K];
          MFEF_UNROLL
          for (int kx = 0; kx < K; ++kx) w[kx] = taps[kx * tap_step + c * per_group];
          MFEF_UNROLL
          for (int r = 0; r < kRows; ++r) {
            const int at = h + r + ky - kHalf;
            if (at >= 0 && at < height) add_row_of_taps<K, kRow>(w, rows[r], acc[c][r]);
          }
        }
      }
    }
    const bool fresh = task.fresh && first == task.first;
    MFEF_UNROLL
    for (int c = 0; c < kOut; ++c) {
      MFEF_UNROLL
      for (int r = 0; r < kRows; ++r) {
        if (h + r >= height) continue;
        float* to = dest + c * per_group * step + r * kRow;
        if (!fresh) {
          float sum[kRow];
          load_row<kRow>(to, sum);
          MFEF_UNROLL
          for (int p = 0; p < kRow; ++p) acc[c][r][p] += sum[p];
        }
        store_row<kRow>(to, acc[c][r]);
      }
    }
  }
}

// The same for any k: one row of one output channel, one tap at a time.
template <int kRow>
MFEF_DEVICE void convolve_any(const ConvTask& task, const float* source, float* dest, const Sizes& s, int step,
                              int item) {
  const Way& way = task.way;
  const int columns = way.dest(), place = item / columns, channel = item - place * columns;
  const int group = channel / way.dest_per_group, image = place / s.height, h = place - image * s.height;
  const int k = way.k, half = k / 2, tap_step = way.weight_step(), chain = way.chain();
  source += (way.source_first + group * way.source_per_group) * step + image * s.height * kRow;
  dest += (way.dest_first + channel) * step + (image * s.height + h) * kRow;
  MFEF_ROLLED
  for (int first = task.first; first < task.end; first += chain) {
    float acc[kRow] = {};
    const int end = least(first + chain, task.end);
    for (int j = first; j < end; ++j) {
      for (int ky = most(0, half - h); ky < least(k, s.height + half - h); ++ky) {
        const float* row = source + j * step + (h + ky - half) * kRow;
        const float* taps = task.weights + channel + ((j - task.first) * k + ky) * k * tap_step;
        MFEF_ROLLED
        for (int kx = 0; kx < k; ++kx) {
          const float w = taps[kx * tap_step];
          MFEF_UNROLL
          for (int p = 0; p < kRow; ++p) {
            const int at = p + kx - half;
            if (at >= 0 && at < s.width) acc[p] = fmaf(w, row[at], acc[p]);
          }
        }
      }
    }
    const bool fresh = task.fresh && first == task.first;
    MFEF_UNROLL
    for (int p = 0; p < kRow; ++p) {
      if (p < s.width) dest[p] = fresh ? acc[p] : dest[p] + acc[p];
    }
  }
}

template <int K, int kRow>
MFEF_DEVICE int convolve_branch(const ConvTask& task, const float* source, float* dest, const BlockArgs& a, int start,
                                int thread, int threads) {
  using T = Tiles<kRow>;
  const int height = a.sizes.height, narrow = task.way.dest() * a.images * ceil_div(height, T::kRows);
  // More output channels per thread once there are more items than threads; no sum has another order then.
  const int branches = a.stages.one_by_one ? 1 : a.sizes.branch_count;
  const bool wide = task.way.dest_per_group % T::kWide == 0 && narrow * branches > kMostThreads;
  const int items = wide ? narrow / T::kWide : narrow;
  for (int item = thread - start < 0 ? thread - start + threads : thread - start; item < items; item += threads) {
    if (wide) {
      convolve_item<K, kRow, T::kWide>(task, source, dest, height, a.step, item);
    } else {
      convolve_item<K, kRow, 1>(task, source, dest, height, a.step, item);
    }
  }
  return items;
}

// The work of one thread in a stage. Branches follow one another in whole warps, round the block's threads.
template <int kRow>
MFEF_DEVICE void convolve(const BlockArgs& a, bool backward, int stage, const float* weights, const float* source,
                          float* dest, int thread, int threads) {
  const Sizes& s = a.sizes;
  int start = 0;
  for (int b = 0; b < s.branch_count; ++b) {
    int first, end;
    a.stages.channels(s, backward, stage, b, &first, &end);
    if (first == end) continue;
    const Way way(s.branches[b], backward);
    const ConvTask task{way, first, end, weights, first == 0 && (b == 0 || !summed(s, backward))};
    int items;
    switch (way.k) {
      case 3:
        items = convolve_branch<3, kRow>(task, source, dest, a, start, thread, threads);
        break;
      case 5:
        items = convolve_branch<5, kRow>(task, source, dest, a, start, thread, threads);
        break;
      case 7:
        items = convolve_branch<7, kRow>(task, source, dest, a, start, thread, threads);
        break;
      case 9:
        items = convolve_branch<9, kRow>(task, source, dest, a, start, thread, threads);
        break;
      default:
        items = way.dest() * a.images * s.height;
        for (int item = thread - start < 0 ? thread - start + threads : thread - start; item < items; item += threads) {
          convolve_any<kRow>(task, source, dest, s, a.step, item);
        }
    }
    weights += (end - first) * way.k * way.k * way.weight_step();
    start = (start + ceil_div(items, 32) * 32) % threads;
  }
}

// The weights of one branch in a stage to shared memory, read along the taps, which are neighbours in memory.
template <int K>
MFEF_DEVICE void load_branch_weights(const Branch& b, const Parameter& weights, Element element, bool backward,
                                     int first, int end, float* to, int thread, int threads) {
  const Way way(b, backward);
  const int k = K ? K : way.k, taps = k * k, count = end - first, step = way.weight_step();
  const Quotient by_taps(taps), by_k(k), by_count(count), by_group(way.dest_per_group);
  const int64_t so = weights.stride[0], si = weights.stride[1], sy = weights.stride[2], sx = weights.stride[3];
  const int skip = (b.full_k - k) / 2;
  with_element(element, [&](auto zero) {
    using T = decltype(zero);
    const T* from = static_cast<const T*>(weights.data) + skip * (sy + sx);
    for (int e = thread; e < way.dest() * count * taps; e += threads) {
      const int pair = K ? e / taps : by_taps(e), tap = e - pair * taps;
      const int dest = by_count(pair), j = pair - dest * count;
      const int ky = K ? tap / k : by_k(tap), kx = tap - ky * k;
      const int group = by_group(dest), within = dest - group * way.dest_per_group;
      const int64_t out = backward ? group * way.source_per_group + first + j : dest,
                    in = backward ? within : first + j;
      const int place = backward ? taps - 1 - tap : tap;
      to[(j * taps + place) * step + dest] = float(from[out * so + in * si + ky * sy + kx * sx]);
    }
  });
}

// The work of one thread in loading the weights of a stage.
MFEF_DEVICE void load_weights(const BlockArgs& a, bool backward, int stage, float* to, int thread, int threads) {
  const Sizes& s = a.sizes;
  for (int i = 0; i < s.branch_count; ++i) {
    int first, end;
    a.stages.channels(s, backward, stage, i, &first, &end);
    if (first == end) continue;
    const Branch& b = s.branches[i];
    const Way way(b, backward);
    switch (way.k) {
      case 3:
        load_branch_weights<3>(b, a.conv_weights[i], a.element, backward, first, end, to, thread, threads);
        break;
      case 5:
        load_branch_weights<5>(b, a.conv_weights[i], a.element, backward, first, end, to, thread, threads);
        break;
      case 7:
        load_branch_weights<7>(b, a.conv_weights[i], a.element, backward, first, end, to, thread, threads);
        break;
      case 9:
        load_branch_weights<9>(b, a.conv_weights[i], a.element, backward, first, end, to, thread, threads);
        break;
      default:
        load_branch_weights<0>(b, a.conv_weights[i], a.element, backward, first, end, to, thread, threads);
    }
    to += (end - first) * way.k * way.k * way.weight_step();
  }
}

}  // namespace mfef::cuda
