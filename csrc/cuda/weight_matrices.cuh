// Gradients of the weights of the branches that tensor cores compute (by_matrices), as sums over slices of the batch.
//
// The product, per tap: C = 16 output channels x 8 input channels, K = the pixels of two rows of the map, images one
// after the other. A thread block is a MatrixTile of one slice. A warp owns up to kHeld items, 8 input channels and
// a column of taps each, of the same 16 output channels: K accumulators for each. Per image it reads the whole gradient
// of its output channels once (16 words per lane), and for each item the 8 rows of x, moved by the column of taps;
// whatever the row of taps is, the operands are among these. In shared memory both are in 16-bit elements,
// [channel][row][column], those of x with kBeside zeros on either side. A lane has two neighbouring columns in a word:
// moved by an odd number they are halves of two words.
// In TF32 a word is one pixel and K the pixels of one row: twice the words, and none of them halves. The products of
// four rows are a sum of their own there, which is added to that of the slice: tensor cores cut sums, see kMatrixChain.
// Memory: as in weight_gradient.cuh.
#pragma once

#include "conv_matrices.cuh"

namespace mfef::cuda {

// `channels` of one image to words of shared memory, a row of the map at a time, with `beside` columns of zeros on
// either side. word(value): of kPerWord neighbours from there on.
template <int kPerWord, class T, class Word>
MFEF_DEVICE void load_rows(const Map& map, const Sizes& s, int64_t image, int channel, int channels, int beside,
                           uint32_t* to, int thread, int threads, const Word& word) {
  const int words_of_row = (kSide + 2 * beside) / kPerWord, step = kSide * words_of_row + 4;
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
    for (int i = 0; i < kSide / kPerWord; ++i) words[beside / kPerWord + i] = word(value + kPerWord * i);
    for (int i = 0; i < beside / kPerWord; ++i) words[i] = words[words_of_row - 1 - i] = 0;
  }
}

// The same of a map in elements of one type for tensor cores that take those of another: the same, or of float32.
template <int kPerWord>
MFEF_DEVICE void load_rows(const Map& map, Element element, const Sizes& s, int64_t image, int channel, int channels,
                           int beside, uint32_t* to, int thread, int threads) {
  if constexpr (kPerWord == 1) {
    load_rows<1, float>(map, s, image, channel, channels, beside, to, thread, threads,
                        [](const float* from) { return tf32_word(*from); });
  } else if (element == Element::kFloat) {
    load_rows<2, float>(map, s, image, channel, channels, beside, to, thread, threads, [&](const float* from) {
      const float value[2] = {from[0], from[1]};
      return s.element == Element::kHalf ? word_of<c10::Half>(value) : word_of<c10::BFloat16>(value);
    });
  } else {
    load_rows<2, uint16_t>(map, s, image, channel, channels, beside, to, thread, threads,
                           [](const uint16_t* from) { return uint32_t(from[0]) | uint32_t(from[1]) << 16; });
  }
}

template <int K, bool kTf32>
struct MatrixSums {
  Accumulator of[MatrixTile::held(K, kTf32)][K];
};

// The products of one image for one warp; x and the gradient are those of the tile.
template <class T, int K, class Sums>
MFEF_DEVICE void multiply_image(const Warp& warp, const MatrixTile& tile, const uint32_t* x, const uint32_t* grad,
                                int height, const Sums& sums_of) {
  // A product is of kRows rows of the map; of a row of x a lane has kWords words.
  constexpr int kOfWord = kPerWord<T>, kRows = kOfWord, kWords = 2 / kRows, kHalf = K / 2, kSteps = kSide / kRows;
  constexpr int kRowOfX = MatrixTile::x_row(kOfWord), kRowOfGradient = MatrixTile::gradient_row(kOfWord);
  Warp::Registers<FragmentA<8>> left[kSteps];
  Warp::Registers<Fragment<kSide * kWords>> rows;
  warp.lanes([&](int thread) {
    MFEF_UNROLL
    for (int step = 0; step < kSteps; ++step) {
      MFEF_UNROLL
      for (int reg = 0; reg < 4; ++reg) {
        const Place at = place_in_a(thread % kWarp, reg);
        const int h = kRows * step + reg / 2 / kWords, column = thread % kWarp % 4 + reg / 2 % kWords * 4;
        left[step][thread].word[reg] =
            h < height && at.row < tile.out_count
                ? grad[at.row * MatrixTile::gradient_step(kOfWord) + h * kRowOfGradient + column]
                : 0u;
      }
    }
  });
  MFEF_UNROLL
  for (int held = 0; held < MatrixTile::held(K, kOfWord == 1); ++held) {
    const int item = tile.item + held * MatrixTile::kWarps + warp.index;
    if (item >= tile.item_end) continue;
    const int input = item / K, moved = item - input * K - kHalf + MatrixTile::kBeside;
    warp.lanes([&](int thread) {
      const Place at = place_in_b(thread % kWarp, 0);
      const int channel = (input - tile.input) * 8 + at.row;  // of those of the tile
      const uint32_t* from = x + channel * MatrixTile::x_step(kOfWord) + at.column + moved / kOfWord;
      const int rows_there = channel < tile.in_count ? height : 0;
      MFEF_UNROLL
      for (int r = 0; r < kSide; ++r) {
        MFEF_UNROLL
        for (int i = 0; i < kWords; ++i) {
          uint32_t word = 0;
          if (r < rows_there) {
            word = from[r * kRowOfX + i * 4];
            if (kOfWord == 2 && moved % 2) word = word >> 16 | from[r * kRowOfX + 1] << 16;
          }
          rows[thread].word[r * kWords + i] = word;
        }
      }
    });
    auto word = [&](int thread, int r, int i) { return r >= 0 && r < kSide ? rows[thread].word[r * kWords + i] : 0u; };
    MFEF_UNROLL
    for (int ky = 0; ky < K; ++ky) {
      auto total = [&](int thread) -> Accumulator& { return sums_of(thread).of[held][ky]; };
      MFEF_UNROLL
      for (int begin = 0; begin < kSteps; begin += 4) {
        Warp::Registers<Accumulator> of_rows;  // in TF32 only
        auto sum = [&](int thread) -> Accumulator& { return kOfWord == 1 ? of_rows[thread] : total(thread); };
        if (kOfWord == 1) warp.lanes([&](int thread) { of_rows[thread] = {}; });
        MFEF_UNROLL
        for (int step = begin; step < begin + 4; ++step) {
          const int top = kRows * step + ky - kHalf;
          if (top >= kSide || top + kRows - 1 < 0) continue;
          multiply_add<T, 8>(
              warp, sum, [&](int thread) -> const FragmentA<8>& { return left[step][thread]; },
              [&](int thread) {
                return FragmentB<8>{{word(thread, top, 0), word(thread, top + kRows - 1, kWords - 1)}};
              });
        }
        if (kOfWord == 1) warp.lanes([&](int thread) { total(thread).add(of_rows[thread]); });
      }
    }
  }
}

template <bool kTf32, int K>
MFEF_DEVICE void run_matrix_tile(const BlockArgs& a, const Block& block, const MatrixTile& tile, int slice,
                                 const Map& grad, Element grad_element) {
  constexpr int kPerWord = kTf32 ? 1 : 2;
  const Sizes& s = a.sizes;
  const Branch& b = s.branches[tile.branch];
  const int64_t end = (slice + 1) * a.slice_images < s.batch ? (slice + 1) * a.slice_images : s.batch;
  const int image_words = MatrixTile::words(s, tile.inputs());
  const int of_x = image_words - tile.inputs() * MatrixTile::kInputs * MatrixTile::x_step(kPerWord);
  auto* words = reinterpret_cast<uint32_t*>(block.shared);
  Block::Registers<MatrixSums<K, kTf32>> sums(block);
  block.phase([&](int thread) { sums[thread] = {}; });
  for (int64_t first = slice * a.slice_images; first < end; first += a.matrix_images) {
    const int images = end - first < a.matrix_images ? int(end - first) : a.matrix_images;
    block.phase([&](int thread) {
      for (int image = 0; image < images; ++image) {
        uint32_t* to = words + image * image_words;
        load_rows<kPerWord>(grad, grad_element, s, first + image, b.out_first + tile.out, tile.out_count, 0, to, thread,
                            block.threads);
        load_rows<kPerWord>(a.x, a.element, s, first + image, b.in_first + tile.in, tile.in_count, MatrixTile::kBeside,
                            to + of_x, thread, block.threads);
      }
    });
    block.warps([&](const Warp& warp) {
      with_operand(a.element, [&](auto zero) {
        using T = decltype(zero);
        if constexpr (std::is_same_v<T, Tf32> == kTf32) {
          for (int image = 0; image < images; ++image) {
            const uint32_t* of = words + image * image_words;
            multiply_image<T, K>(warp, tile, of + of_x, of, s.height,
                                 [&](int thread) -> MatrixSums<K, kTf32>& { return sums[thread]; });
          }
        }
      });
    });
  }
  float* to = a.grads.weights + slice * first_sum(s, s.branch_count) + first_sum(s, tile.branch);
  block.phase([&](int thread) {
    MFEF_UNROLL
    for (int held = 0; held < MatrixTile::held(K, kTf32); ++held) {
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

template <bool kTf32>
MFEF_DEVICE void run_matrix_tile(const BlockArgs& a, const Block& block, int tile, int slice, const Map& grad,
                                 Element grad_element) {
  const MatrixTile of(a.sizes, tile);
  switch (a.sizes.branches[of.branch].k) {
    case 3:
      return run_matrix_tile<kTf32, 3>(a, block, of, slice, grad, grad_element);
    case 5:
      return run_matrix_tile<kTf32, 5>(a, block, of, slice, grad, grad_element);
    case 7:
      return run_matrix_tile<kTf32, 7>(a, block, of, slice, grad, grad_element);
    case 9:
      return run_matrix_tile<kTf32, 9>(a, block, of, slice, grad, grad_element);
  }
}

}  // namespace mfef::cuda
