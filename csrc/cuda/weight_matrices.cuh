// Gradients of the weights of the branches that tensor cores compute (by_matrices), as sums over slices of the batch.
//
// The product, per tap: C = 16 output channels x 8 input channels, K = the pixels of two rows of the map, images one
// after the other. A thread block is a MatrixTile of one slice. A warp owns up to kHeld items, 8 input channels and
// a column of taps each, of the same 16 output channels: K accumulators for each. Per image it reads the whole gradient
// of its output channels once (16 words per lane), and for each item the 8 rows of x, moved by the column of taps;
// whatever the row of taps is, the operands are among these. In shared memory both are in 16-bit elements,
// [channel][row][column], those of x with kBeside zeros on either side. A lane has two neighbouring columns in a word:
// moved by an odd number they are halves of two words.
// Memory: as in weight_gradient.cuh.
#pragma once

#include "conv_matrices.cuh"

namespace mfef::cuda {

// Columns beside the map, words of a row and from channel to channel, 4 more than a multiple of 8: 8 channels by 4
// words are all banks.
constexpr int kBeside = 4, kWordsOfX = (kSide + 2 * kBeside) / 2, kWordsOfGradient = kSide / 2;
static_assert(kXStep == kSide * kWordsOfX + 4 && kGradientStep == kSide * kWordsOfGradient + 4);

// `channels` of one image to words of shared memory, a row of the map at a time. word(a, b): of two neighbours.
template <class T, class Word>
MFEF_DEVICE void load_rows(const Map& map, const Sizes& s, int64_t image, int channel, int channels, int beside,
                           int words_of_row, int step, uint32_t* to, int thread, int threads, const Word& word) {
  const T* data = static_cast<const T*>(map.data) + image * map.stride[0] + channel * map.stride[1];
  // Neighbouring threads in the order of memory: channels where those are neighbours, else rows.
  const bool channels_last = map.stride[1] == 1;
  const int inner_count = channels_last ? channels : s.height;
  const Quotient by_inner(inner_count);
  for (int e = thread; e < channels * s.height; e += threads) {
    const int outer = by_inner(e), inner = e - outer * inner_count;
    const int c = channels_last ? inner : outer, h = channels_last ? outer : inner;
    const T* row = data + c * map.stride[1] + h * map.stride[2];
    uint32_t* words = to + c * step + h * words_of_row;
    T value[kSide];
    MFEF_UNROLL
    for (int w = 0; w < kSide; ++w) value[w] = w < s.width ? row[w * map.stride[3]] : T(0);
    MFEF_UNROLL
    for (int i = 0; i < kSide / 2; ++i) words[beside / 2 + i] = word(value[2 * i], value[2 * i + 1]);
    for (int i = 0; i < beside / 2; ++i) words[i] = words[words_of_row - 1 - i] = 0;
  }
}

// The same of a map in the 16-bit type `half` or in float32.
MFEF_DEVICE void load_rows(const Map& map, Element element, const Sizes& s, int64_t image, int channel, int channels,
                           int beside, int words_of_row, int step, Element half, uint32_t* to, int thread,
                           int threads) {
  if (element == half) {
    load_rows<uint16_t>(map, s, image, channel, channels, beside, words_of_row, step, to, thread, threads,
                        [](uint16_t a, uint16_t b) { return uint32_t(a) | uint32_t(b) << 16; });
  } else {
    load_rows<float>(map, s, image, channel, channels, beside, words_of_row, step, to, thread, threads,
                     [&](float a, float b) {
                       const float value[2] = {a, b};
                       return half == Element::kHalf ? word_of<c10::Half>(value) : word_of<c10::BFloat16>(value);
                     });
  }
}

template <int K>
struct MatrixSums {
  Accumulator of[MatrixTile::held(K)][K];
};

// The products of one image for one warp; x and the gradient are those of the tile.
template <class T, int K, class Sums>
MFEF_DEVICE void multiply_image(const Warp& warp, const MatrixTile& tile, const uint32_t* x, const uint32_t* grad,
                                int height, const Sums& sums_of) {
  constexpr int kHalf = K / 2, kSteps = kSide / 2;
  Warp::Registers<FragmentA<8>> left[kSteps];
  Warp::Registers<Fragment<kSide>> rows;
  warp.lanes([&](int thread) {
    MFEF_UNROLL
    for (int step = 0; step < kSteps; ++step) {
      MFEF_UNROLL
      for (int reg = 0; reg < 4; ++reg) {
        const Place at = place_in_a(thread % kWarp, reg);
        const int h = 2 * step + at.column / 4;
        left[step][thread].word[reg] =
            h < height ? grad[at.row * kGradientStep + h * kWordsOfGradient + at.column % 4] : 0u;
      }
    }
  });
  MFEF_UNROLL
  for (int held = 0; held < MatrixTile::held(K); ++held) {
    const int item = tile.item + held * MatrixTile::kWarps + warp.index;
    if (item >= tile.item_end) continue;
    const int input = item / K, moved = item - input * K - kHalf + kBeside;
    warp.lanes([&](int thread) {
      const Place at = place_in_b(thread % kWarp, 0);
      const uint32_t* from = x + ((input - tile.input) * 8 + at.row) * kXStep + at.column + moved / 2;
      MFEF_UNROLL
      for (int r = 0; r < kSide; ++r) {
        uint32_t word = 0;
        if (r < height) {
          word = from[r * kWordsOfX];
          if (moved % 2) word = word >> 16 | from[r * kWordsOfX + 1] << 16;
        }
        rows[thread].word[r] = word;
      }
    });
    auto row = [&](int thread, int r) { return r >= 0 && r < kSide ? rows[thread].word[r] : 0u; };
    MFEF_UNROLL
    for (int ky = 0; ky < K; ++ky) {
      MFEF_UNROLL
      for (int step = 0; step < kSteps; ++step) {
        const int top = 2 * step + ky - kHalf;
        if (top >= kSide || top + 1 < 0) continue;
        multiply_add<T, 8>(
            warp, [&](int thread) -> Accumulator& { return sums_of(thread).of[held][ky]; },
            [&](int thread) -> const FragmentA<8>& { return left[step][thread]; },
            [&](int thread) { return FragmentB<8>{{row(thread, top), row(thread, top + 1)}}; });
      }
    }
  }
}

template <int K>
MFEF_DEVICE void run_matrix_tile(const BlockArgs& a, const Block& block, const MatrixTile& tile, int slice,
                                 const Map& grad, Element grad_element) {
  const Sizes& s = a.sizes;
  const Branch& b = s.branches[tile.branch];
  const int64_t end = (slice + 1) * a.slice_images < s.batch ? (slice + 1) * a.slice_images : s.batch;
  const int image_words = MatrixTile::words(tile.inputs());
  auto* words = reinterpret_cast<uint32_t*>(block.shared);
  Block::Registers<MatrixSums<K>> sums(block);
  block.phase([&](int thread) { sums[thread] = {}; });
  for (int64_t first = slice * a.slice_images; first < end; first += a.matrix_images) {
    const int images = end - first < a.matrix_images ? int(end - first) : a.matrix_images;
    block.phase([&](int thread) {
      for (int image = 0; image < images; ++image) {
        uint32_t* to = words + image * image_words;
        load_rows(grad, grad_element, s, first + image, b.out_first + tile.out, tile.out_count, 0, kWordsOfGradient,
                  kGradientStep, a.element, to, thread, block.threads);
        load_rows(a.x, a.element, s, first + image, b.in_first + tile.in, tile.in_count, kBeside, kWordsOfX, kXStep,
                  a.element, to + 16 * kGradientStep, thread, block.threads);
      }
    });
    block.warps([&](const Warp& warp) {
      with_half(a.element, [&](auto zero) {
        for (int image = 0; image < images; ++image) {
          const uint32_t* of = words + image * image_words;
          multiply_image<decltype(zero), K>(warp, tile, of + 16 * kGradientStep, of, s.height,
                                            [&](int thread) -> MatrixSums<K>& { return sums[thread]; });
        }
      });
    });
  }
  float* to = a.grads.weights + slice * first_sum(s, s.branch_count) + first_sum(s, tile.branch);
  block.phase([&](int thread) {
    MFEF_UNROLL
    for (int held = 0; held < MatrixTile::held(K); ++held) {
      const int item = tile.item + held * MatrixTile::kWarps + thread / kWarp;
      if (item >= tile.item_end) continue;
      const int input = item / K, kx = item - input * K;
      MFEF_UNROLL
      for (int i = 0; i < 4; ++i) {
        const Place at = place_in_c(thread % kWarp, i);
        const int out = tile.out + at.row, in = input * 8 + at.column;
        if (at.row >= tile.out_count || in >= b.in_per_group()) continue;
        MFEF_UNROLL
        for (int ky = 0; ky < K; ++ky) {
          to[((int64_t(out) * b.in_per_group() + in) * K + ky) * K + kx] = sums[thread].of[held][ky].value[i];
        }
      }
    }
  });
}

MFEF_DEVICE void run_matrix_tile(const BlockArgs& a, const Block& block, int tile, int slice, const Map& grad,
                                 Element grad_element) {
  const MatrixTile of(a.sizes, tile);
  switch (a.sizes.branches[of.branch].k) {
    case 3:
      return run_matrix_tile<3>(a, block, of, slice, grad, grad_element);
    case 5:
      return run_matrix_tile<5>(a, block, of, slice, grad, grad_element);
    case 7:
      return run_matrix_tile<7>(a, block, of, slice, grad, grad_element);
    case 9:
      return run_matrix_tile<9>(a, block, of, slice, grad, grad_element);
  }
}

}  // namespace mfef::cuda
