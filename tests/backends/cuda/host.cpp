// The CUDA backend compiled by the C++ compiler: every thread block of a kernel runs on the host, phase by phase, a
// loop over its threads between barriers. Registers the same operators for CPU tensors, in the namespace
// mfef_cuda_host whose schemas the test defines. host.py compiles and loads this.
//
// Shared memory is full of NaN when a thread block starts and has a guard behind it. Threads run in ascending or in
// descending order: where that changes a bit, threads of one phase depend on one another, which is a race. A weight
// gradient of a launch of its own can have all of the batch in one slice, whose sums are then as long as those of a
// batch far larger; and what a backward's thread blocks may leave of it can be set, nothing for such a launch always.
#include <utility>

#include "cuda/backward.cu"
#include "cuda/forward.cu"
#include "cuda/large_attention.cu"
#include "cuda/large_conv.cu"
#include "cuda/large_conv_matrices.cu"
#include "cuda/large_weight_gradient.cu"
#include "cuda/large_weight_matrices.cu"
#include "cuda/mma.cuh"
#include "cuda/ops_cuda.cu"
#include "cuda/weight_gradient.cu"

namespace mfef::cuda {

int64_t host_shared_limit = 227 * 1024, host_most_partials = kMostPartials, host_scratch_bytes = 0;
static bool host_backwards = false, host_one_slice = false;

// How products are added up; of tensor cores nothing about it is specified. kAligned is what measurements found of an
// A100 (Fasi et al. 2021, Khattak and Mikaitis 2025): the sum and 8 products, 4 in TF32, are cut towards zero one place
// below the last of the largest of them, added, and cut to float32. Of an H100 they are twice as many, cut two places
// below. kTruncated cuts after every product, which is worse than any hardware known.
enum class Adding : int { kNearest = 0, kAligned = 1, kTruncated = 2 };
static Adding host_adding = Adding::kNearest;

static float cut_to_float(double value) {
  const float nearest = float(value);
  return std::fabs(double(nearest)) > std::fabs(value) ? std::nextafter(nearest, 0.0f) : nearest;
}

// Products are exact in double.
float add_on_host(const float* a, const float* b, int depth, int together, float sum) {
  if (host_adding == Adding::kNearest) {
    for (int k = 0; k < depth; ++k) sum = fmaf(a[k], b[k], sum);
    return sum;
  }
  const bool align = host_adding == Adding::kAligned;
  const int step = align ? together : 1;
  for (int first = 0; first < depth; first += step) {
    double exponent = std::logb(sum);  // the largest; infinite where all are zero or one is infinite
    for (int k = first; k < first + step; ++k) exponent = std::fmax(exponent, std::logb(a[k]) + std::logb(b[k]));
    // The last place of a float32 is 23 behind the point.
    const bool cut = align && std::isfinite(exponent);
    const double unit = cut ? std::ldexp(1.0, int(exponent) - 24) : 0.0;
    auto aligned = [&](double term) { return cut ? std::trunc(term / unit) * unit : term; };
    double all = aligned(sum);
    for (int k = first; k < first + step; ++k) all += aligned(double(a[k]) * double(b[k]));
    sum = cut_to_float(all);
  }
  return sum;
}

const char* run_on_host(Run run, const BlockArgs& planned, int64_t blocks, int threads, int64_t shared) {
  constexpr int64_t kMostBlocks = 5;  // as on the device, thread blocks take turns beyond the largest grid
  constexpr int kGuard = 64;
  constexpr float kMark = 12345.0f;
  if (shared > host_shared_limit) return "more shared memory than the device has";
  const int64_t grid = blocks < kMostBlocks ? blocks : kMostBlocks;
  BlockArgs args = planned;
  if (host_one_slice && !args.weights_in_backward) {
    args.slice_images *= args.slices;
    args.large.matrix_slice *= args.slices;
    args.slices = 1;
  }
  std::vector<float> memory(size_t(shared / 4 + kGuard + 4));
  float* start = memory.data();
  while (reinterpret_cast<uintptr_t>(start) % 16) ++start;
  for (int64_t index = 0; index < grid; ++index) {
    for (int64_t i = 0; i < shared / 4; ++i) start[i] = std::numeric_limits<float>::quiet_NaN();
    for (int i = 0; i < kGuard; ++i) start[shared / 4 + i] = kMark;
    run(args, Block{index, grid, threads, start, host_backwards});
    for (int i = 0; i < kGuard; ++i) {
      if (start[shared / 4 + i] != kMark) return "a kernel wrote beyond its shared memory";
    }
  }
  return nullptr;
}

// C += A B of a warp, all row by row in float32. How operands are read from memory: by words or by load_matrices, where
// rows are those of the operands, or by load_transposed, where they are K's.
enum class Reading : int { kWords = 0, kMatrices = 1, kTransposed = 2 };
template <class T, int kWords>
static void multiply_on_host(const float* a, const float* b, float* c, Reading reading) {
  constexpr int kDepth = kWords * kPerWord<T>, kPitch = 12;  // words of a row, as kernels have them
  alignas(16) uint32_t of_a[16 * kPitch], of_b[16 * kPitch];
  auto fill = [](uint32_t* to, int rows, const auto& value) {
    for (int e = 0; e < rows * kWords; ++e) {
      float of_word[kPerWord<T>];
      for (int i = 0; i < kPerWord<T>; ++i) of_word[i] = value(e / kWords, e % kWords * kPerWord<T> + i);
      to[e / kWords * kPitch + e % kWords] = word_of<T>(of_word);
    }
  };
  if constexpr (kPerWord<T> == 2 && kWords == 8) {
    if (reading == Reading::kTransposed) {
      fill(of_a, kDepth, [&](int k, int m) { return a[m * kDepth + k]; });
      fill(of_b, kDepth, [&](int k, int n) { return n < 8 ? b[k * 8 + n] : 0.0f; });
    }
  }
  if (reading != Reading::kTransposed) {
    fill(of_a, 16, [&](int m, int k) { return a[m * kDepth + k]; });
    fill(of_b, 8, [&](int n, int k) { return b[k * 8 + n]; });
  }
  const Block block{0, 1, kWarp, nullptr, host_backwards};
  block.warps([&](const Warp& warp) {
    Warp::Registers<FragmentA<kWords>> left;
    Warp::Registers<FragmentB<kWords>> right;
    Warp::Registers<Accumulator> sum;
    auto to_left = [&](int thread) -> auto& { return left[thread]; };
    auto to_right = [&](int thread) -> auto& { return right[thread]; };
    auto to_sum = [&](int thread) -> auto& { return sum[thread]; };
    if (reading == Reading::kWords) {
      warp.lanes([&](int thread) {
        auto take = [](auto& fragment, const uint32_t* from, auto place, int lane) {
          for (int reg = 0; reg < int(std::size(fragment.word)); ++reg) {
            const Place at = place(lane, reg);
            fragment.word[reg] = from[at.row * kPitch + at.column];
          }
        };
        take(left[thread], of_a, place_in_a, thread % kWarp);
        take(right[thread], of_b, place_in_b, thread % kWarp);
      });
    } else if (reading == Reading::kMatrices) {
      load_matrices<kWords / 2>(warp, to_left,
                                [&](int m, int r) { return of_a + (m % 2 * 8 + r) * kPitch + m / 2 * 4; });
      load_matrices<kWords / 4>(warp, to_right, [&](int m, int r) { return of_b + r * kPitch + m * 4; });
    } else if constexpr (kPerWord<T> == 2 && kWords == 8) {
      load_transposed<4>(warp, to_left, [&](int m, int r) { return of_a + (m / 2 * 8 + r) * kPitch + m % 2 * 4; });
      load_transposed<2>(warp, to_right, [&](int m, int r) { return of_b + (m * 8 + r) * kPitch; });
    }
    auto each = [&](const auto& f) {
      warp.lanes([&](int thread) {
        for (int i = 0; i < 4; ++i) {
          const Place at = place_in_c(thread % kWarp, i);
          f(c[at.row * 8 + at.column], sum[thread].value[i]);
        }
      });
    };
    each([](float memory, float& own) { own = memory; });
    multiply_add<T, kWords>(warp, to_sum, to_left, to_right);
    each([](float& memory, float own) { memory = own; });
  });
}

}  // namespace mfef::cuda

// A (16, K), B (K, 8), C (16, 8); false for a type and K that tensor cores do not have, or cannot read so.
extern "C" __attribute__((visibility("default"))) bool mfef_cuda_host_multiply(const char* type, int depth,
                                                                               const float* a, const float* b, float* c,
                                                                               int reading) {
  using namespace mfef::cuda;
  const std::string of = type;
  const Reading how = static_cast<Reading>(reading);
  if (how == Reading::kTransposed && depth != 16) return false;
  if (of == "tf32" && depth == 8) {
    multiply_on_host<Tf32, 8>(a, b, c, how);
  } else if (of == "tf32" && depth == 4) {
    multiply_on_host<Tf32, 4>(a, b, c, how);
  } else if (of == "bfloat16" && depth == 16) {
    multiply_on_host<c10::BFloat16, 8>(a, b, c, how);
  } else if (of == "bfloat16" && depth == 8) {
    multiply_on_host<c10::BFloat16, 4>(a, b, c, how);
  } else if (of == "float16" && depth == 16) {
    multiply_on_host<c10::Half, 8>(a, b, c, how);
  } else if (of == "float16" && depth == 8) {
    multiply_on_host<c10::Half, 4>(a, b, c, how);
  } else {
    return false;
  }
  return true;
}

extern "C" __attribute__((visibility("default"))) void mfef_cuda_host_settings(int64_t shared_limit, bool backwards,
                                                                               int adding, bool one_slice,
                                                                               int64_t most_partials) {
  using namespace mfef::cuda;
  host_shared_limit = shared_limit;
  host_backwards = backwards;
  host_adding = static_cast<Adding>(adding);
  host_one_slice = one_slice;
  host_most_partials = most_partials >= 0 ? most_partials : kMostPartials;
}

// Bytes of scratch that calls had since the last question.
extern "C" __attribute__((visibility("default"))) int64_t mfef_cuda_host_scratch() {
  return std::exchange(mfef::cuda::host_scratch_bytes, 0);
}
