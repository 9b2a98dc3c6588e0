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
  int source_first;      // the one that a group begins with in shared memory
  const float* weights;  // [source channel][ky][kx][output channel], `weight_step` floats from tap to tap
  bool fresh;            // the first to write its output channels
};

// Where the rows of a map are in shared memory, seen from a thread: `row` 0 is that of its first output row.
template <class Float>
struct Rows {
  Float* row;
  int pitch, step;  // floats from row to row and from channel to channel
};

// acc[p] += sum over kx of weights[kx] * row[p + kx - k / 2 + kBeside], columns that row does not have left out.
template <int K, int kRow, int kBeside, int kLoaded>
MFEF_DEVICE void add_row_of_taps(const float (&weights)[K], const float (&row)[kLoaded], float (&acc)[kRow]) {
  MFEF_UNROLL
  for (int kx = 0; kx < K; ++kx) {
    MFEF_UNROLL
    for (int p = 0; p < kRow; ++p) {
      const int at = p + kx - K / 2 + kBeside;
      if (at >= 0 && at < kRow + 2 * kBeside) acc[p] = fmaf(weights[kx], row[at], acc[p]);
    }
  }
}

// kRows rows of kRow pixels of kOut output channels, which are out_step channels apart, for a k that is compiled. The
// source has kBeside columns (none, or k / 2) on both sides of the pixels, and rows [above, below); of the output
// rows, `rows` exist.
template <int K, int kRow, int kRows, int kOut, int kBeside>
MFEF_DEVICE void convolve_rows(const ConvTask& task, const float* weights, Rows<const float> source, Rows<float> dest,
                               int out_step, int above, int below, int rows_left) {
  constexpr int kHalf = K / 2, kLoaded = kRow + 2 * kBeside;
  static_assert(kBeside == 0 || kBeside == kHalf);
  const int tap_step = task.way.weight_step(), chain = task.way.chain();
  const int ky_begin = most(0, kHalf + above - (kRows - 1)), ky_end = least(K, below + kHalf);
  MFEF_ROLLED
  for (int first = task.first; first < task.end; first += chain) {
    float acc[kOut][kRows][kRow] = {};
    const int end = least(first + chain, task.end);
    MFEF_ROLLED
    for (int j = first; j < end; ++j) {
      const float* from = source.row + (j - task.source_first) * source.step;
      const float* taps = weights + ((j - task.first) * K + ky_begin) * K * tap_step;
      // rows[r] is the source's row under output row r; all but the last move up with ky.
      float rows[kRows][kLoaded] = {};
      MFEF_UNROLL
      for (int r = 1; r < kRows; ++r) {
        const int at = r - 1 + ky_begin - kHalf;
        if (at >= above && at < below) load_row<kLoaded>(from + at * source.pitch, rows[r]);
      }
      MFEF_ROLLED
      for (int ky = ky_begin; ky < ky_end; ++ky, taps += K * tap_step) {
        MFEF_UNROLL
        for (int r = 1; r < kRows; ++r) {
          MFEF_UNROLL
          for (int p = 0; p < kLoaded; ++p) rows[r - 1][p] = rows[r][p];
        }
        const int last = kRows - 1 + ky - kHalf;
        if (last >= above && last < below) load_row<kLoaded>(from + last * source.pitch, rows[kRows - 1]);
        MFEF_UNROLL
        for (int c = 0; c < kOut; ++c) {
          float w[K];
          MFEF_UNROLL
          for (int kx = 0; kx < K; ++kx) w[kx] = taps[kx * tap_step + c * out_step];
          MFEF_UNROLL
          for (int r = 0; r < kRows; ++r) {
            const int at = r + ky - kHalf;
            if (at >= above && at < below) add_row_of_taps<K, kRow, kBeside>(w, rows[r], acc[c][r]);
          }
        }
      }
    }
    const bool fresh = task.fresh && first == task.first;
    MFEF_UNROLL
    for (int c = 0; c < kOut; ++c) {
      MFEF_UNROLL
      for (int r = 0; r < kRows; ++r) {
        if (r >= rows_left) continue;
        float* to = dest.row + c * out_step * dest.step + r * dest.pitch;
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

// The same for any k: one row of one output channel, one tap at a time. The source has columns [left, right).
template <int kRow>
MFEF_DEVICE void convolve_row(const ConvTask& task, const float* weights, Rows<const float> source, float* dest,
                              int above, int below, int left, int right) {
  const int k = task.way.k, half = k / 2, tap_step = task.way.weight_step(), chain = task.way.chain();
  MFEF_ROLLED
  for (int first = task.first; first < task.end; first += chain) {
    float acc[kRow] = {};
    const int end = least(first + chain, task.end);
    for (int j = first; j < end; ++j) {
      for (int ky = most(0, half + above); ky < least(k, below + half); ++ky) {
        const float* row = source.row + (j - task.source_first) * source.step + (ky - half) * source.pitch;
        const float* taps = weights + ((j - task.first) * k + ky) * k * tap_step;
        MFEF_ROLLED
        for (int kx = 0; kx < k; ++kx) {
          const float w = taps[kx * tap_step];
          MFEF_UNROLL
          for (int p = 0; p < kRow; ++p) {
            const int at = p + kx - half;
            if (at >= left && at < right) acc[p] = fmaf(w, row[at], acc[p]);
          }
        }
      }
    }
    const bool fresh = task.fresh && first == task.first;
    MFEF_UNROLL
    for (int p = 0; p < kRow; ++p) dest[p] = fresh ? acc[p] : dest[p] + acc[p];
  }
}

// An item of a branch whose k is compiled.
template <int K, int kRow, int kOut>
MFEF_DEVICE void convolve_item(const ConvTask& task, const float* source, float* dest, int height, int step, int item) {
  constexpr int kRows = Tiles<kRow>::kRows;
  const Way& way = task.way;
  const int per_group = way.dest_per_group / kOut, columns = way.groups * per_group;
  const int place = item / columns, column = item - place * columns;
  const int group = column / per_group, channel = group * way.dest_per_group + column - group * per_group;
  const int tall = ceil_div(height, kRows), image = place / tall, h = (place - image * tall) * kRows;
  const int row = (image * height + h) * kRow;
  source += (way.source_first + group * way.source_per_group) * step + row;
  dest += (way.dest_first + channel) * step + row;
  convolve_rows<K, kRow, kRows, kOut, 0>(task, task.weights + channel, {source, kRow, step}, {dest, kRow, step},
                                         per_group, -h, height - h, height - h);
}

// The same for any k: one row of one output channel.
template <int kRow>
MFEF_DEVICE void convolve_any(const ConvTask& task, const float* source, float* dest, const Sizes& s, int step,
                              int item) {
  const Way& way = task.way;
  const int columns = way.dest(), place = item / columns, channel = item - place * columns;
  const int group = channel / way.dest_per_group, image = place / s.height, h = place - image * s.height;
  const int row = (image * s.height + h) * kRow;
  source += (way.source_first + group * way.source_per_group) * step + row;
  dest += (way.dest_first + channel) * step + row;
  convolve_row<kRow>(task, task.weights + channel, {source, kRow, step}, dest, -h, s.height - h, 0, s.width);
}

// The direct items of a branch in a stage. They have several output channels each once there are more items than
// threads; no sum has another order then.
template <int kRow>
struct Items {
  bool wide;
  int count;

  MFEF_DEVICE Items(const BlockArgs& a, const Way& way) {
    using T = Tiles<kRow>;
    const Sizes& s = a.sizes;
    const bool compiled = TileShape::compiled(way.k);
    const int narrow = way.dest() * a.images * (compiled ? ceil_div(s.height, T::kRows) : s.height);
    int branches = a.stages.one_by_one ? 1 : 0;
    for (int b = 0; !a.stages.one_by_one && b < s.branch_count; ++b) branches += !by_matrices(s, s.branches[b]);
    wide = compiled && way.dest_per_group % T::kWide == 0 && narrow * branches > kMostThreads;
    count = wide ? narrow / T::kWide : narrow;
  }
};

// f(branch, first, end, weights, first thread) for every branch that is in a stage: what it has of it (see Stages),
// where its weights are, and which thread has its first item. Branches follow one another in whole warps, round the
// block's threads.
template <int kRow, class Float, class F>
MFEF_DEVICE void for_each_branch(const BlockArgs& a, bool backward, int stage, Float* weights, int threads,
                                 const F& f) {
  const Sizes& s = a.sizes;
  int start = 0;
  for (int b = 0; b < s.branch_count; ++b) {
    int first, end;
    a.stages.channels(s, backward, stage, b, &first, &end);
    if (first == end) continue;
    f(b, first, end, weights, start);
    weights += stage_floats(s, backward, b, end - first);
    const Branch& of = s.branches[b];
    const int warps = by_matrices(s, of) ? MatrixWay(s, of, backward).tiles() * a.images
                                         : ceil_div(Items<kRow>(a, Way(of, backward)).count, kWarp);
    start = (start + warps * kWarp) % threads;
  }
}

// Whether a stage is the first to write the output channels of a branch.
MFEF_DEVICE bool is_fresh(const Sizes& s, bool backward, int branch, int first) {
  return first == 0 && (branch == 0 || !summed(s, backward));
}

template <int K, int kRow>
MFEF_DEVICE void convolve_branch(const ConvTask& task, const float* source, float* dest, const BlockArgs& a, int first,
                                 int threads) {
  const Items<kRow> items(a, task.way);
  for (int item = first; item < items.count; item += threads) {
    if (items.wide) {
      convolve_item<K, kRow, Tiles<kRow>::kWide>(task, source, dest, a.sizes.height, a.step, item);
    } else {
      convolve_item<K, kRow, 1>(task, source, dest, a.sizes.height, a.step, item);
    }
  }
}

// The direct work of one thread in a stage.
template <int kRow>
MFEF_DEVICE void convolve(const BlockArgs& a, bool backward, int stage, const float* weights, const float* source,
                          float* dest, int thread, int threads) {
  const Sizes& s = a.sizes;
  for_each_branch<kRow>(a, backward, stage, weights, threads,
                        [&](int b, int first, int end, const float* of_branch, int start) {
                          if (by_matrices(s, s.branches[b])) return;
                          const Way way(s.branches[b], backward);
                          const ConvTask task{way, first, end, 0, of_branch, is_fresh(s, backward, b, first)};
                          const int item = thread - start < 0 ? thread - start + threads : thread - start;
                          switch (way.k) {
                            case 3:
                              return convolve_branch<3, kRow>(task, source, dest, a, item, threads);
                            case 5:
                              return convolve_branch<5, kRow>(task, source, dest, a, item, threads);
                            case 7:
                              return convolve_branch<7, kRow>(task, source, dest, a, item, threads);
                            case 9:
                              return convolve_branch<9, kRow>(task, source, dest, a, item, threads);
                            default: {
                              const int count = Items<kRow>(a, way).count;
                              for (int i = item; i < count; i += threads) {
                                convolve_any<kRow>(task, source, dest, s, a.step, i);
                              }
                            }
                          }
                        });
}

// The weights of one branch, or of a part of its way whose own begin at `out_first` and `in_first`, in a stage to
// shared memory, read along the taps, which are neighbours in memory.
template <int K>
MFEF_DEVICE void load_taps(const Way& way, int full_k, const Parameter& weights, int out_first, int in_first,
                           Element element, bool backward, int first, int end, float* to, int thread, int threads) {
  const int k = K ? K : way.k, taps = k * k, count = end - first, step = way.weight_step();
  const Quotient by_taps(taps), by_k(k), by_count(count), by_group(way.dest_per_group);
  const int64_t so = weights.stride[0], si = weights.stride[1], sy = weights.stride[2], sx = weights.stride[3];
  const int skip = (full_k - k) / 2;
  with_element(element, [&](auto zero) {
    using T = decltype(zero);
    const T* from = static_cast<const T*>(weights.data) + skip * (sy + sx) + out_first * so + in_first * si;
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

MFEF_DEVICE void load_branch_weights(const Way& way, int full_k, const Parameter& weights, int out_first, int in_first,
                                     Element element, bool backward, int first, int end, float* to, int thread,
                                     int threads) {
  switch (way.k) {
    case 3:
      return load_taps<3>(way, full_k, weights, out_first, in_first, element, backward, first, end, to, thread,
                          threads);
    case 5:
      return load_taps<5>(way, full_k, weights, out_first, in_first, element, backward, first, end, to, thread,
                          threads);
    case 7:
      return load_taps<7>(way, full_k, weights, out_first, in_first, element, backward, first, end, to, thread,
                          threads);
    case 9:
      return load_taps<9>(way, full_k, weights, out_first, in_first, element, backward, first, end, to, thread,
                          threads);
    default:
      return load_taps<0>(way, full_k, weights, out_first, in_first, element, backward, first, end, to, thread,
                          threads);
  }
}

}  // namespace mfef::cuda
