// C += A B of one warp (csrc/cuda/mma.cuh), in the ways in which kernels read their operands, for
// tests/backends/cuda/test_mma.py.
#include <string>
#include <type_traits>

#include "cuda/mma.cuh"

namespace mfef::cuda {
namespace {

enum class Reading : int { kWords = 0, kMatrices = 1, kTransposed = 2 };

// A (16, K), B (K, 8), C (16, 8), row by row.
struct Product {
  const float *a, *b;
  float* c;
};

// Operands lie in shared memory with a pitch of 12 words, as kernels have them: by rows of A and columns of B, or by K.
template <class T, int kWords, Reading kReading>
__global__ void multiply(const Product p) {
  constexpr int kDepth = kWords * kPerWord<T>, kPitch = 12;
  __shared__ __align__(16) uint32_t of_a[16 * kPitch];
  __shared__ __align__(16) uint32_t of_b[16 * kPitch];
  const int lane = int(threadIdx.x);
  auto fill = [&](uint32_t* to, int rows, const auto& value) {
    for (int e = lane; e < rows * kWords; e += kWarp) {
      float of_word[kPerWord<T>];
      for (int i = 0; i < kPerWord<T>; ++i) of_word[i] = value(e / kWords, e % kWords * kPerWord<T> + i);
      to[e / kWords * kPitch + e % kWords] = word_of<T>(of_word);
    }
  };
  if constexpr (kReading == Reading::kTransposed) {
    fill(of_a, kDepth, [&](int k, int m) { return p.a[m * kDepth + k]; });
    fill(of_b, kDepth, [&](int k, int n) { return n < 8 ? p.b[k * 8 + n] : 0.0f; });
  } else {
    fill(of_a, 16, [&](int m, int k) { return p.a[m * kDepth + k]; });
    fill(of_b, 8, [&](int n, int k) { return p.b[k * 8 + n]; });
  }
  __syncthreads();
  const Warp warp{0};
  Warp::Registers<FragmentA<kWords>> left;
  Warp::Registers<FragmentB<kWords>> right;
  Warp::Registers<Accumulator> sum;
  auto to_left = [&](int thread) -> auto& { return left[thread]; };
  auto to_right = [&](int thread) -> auto& { return right[thread]; };
  auto to_sum = [&](int thread) -> auto& { return sum[thread]; };
  if constexpr (kReading == Reading::kWords) {
    auto take = [&](auto& fragment, const uint32_t* from, auto place) {
      for (int reg = 0; reg < int(sizeof fragment.word / 4); ++reg) {
        const Place at = place(lane, reg);
        fragment.word[reg] = from[at.row * kPitch + at.column];
      }
    };
    take(left.own, of_a, [](int l, int reg) { return place_in_a(l, reg); });
    take(right.own, of_b, [](int l, int reg) { return place_in_b(l, reg); });
  } else if constexpr (kReading == Reading::kMatrices) {
    load_matrices<kWords / 2>(warp, to_left, [&](int m, int r) { return of_a + (m % 2 * 8 + r) * kPitch + m / 2 * 4; });
    load_matrices<kWords / 4>(warp, to_right, [&](int m, int r) { return of_b + r * kPitch + m * 4; });
  } else {
    load_transposed<4>(warp, to_left, [&](int m, int r) { return of_a + (m / 2 * 8 + r) * kPitch + m % 2 * 4; });
    load_transposed<2>(warp, to_right, [&](int m, int r) { return of_b + (m * 8 + r) * kPitch; });
  }
  auto place = [&](int i) {
    const Place at = place_in_c(lane, i);
    return at.row * 8 + at.column;
  };
  for (int i = 0; i < 4; ++i) sum.own.value[i] = p.c[place(i)];
  multiply_add<T, kWords>(warp, to_sum, to_left, to_right);
  for (int i = 0; i < 4; ++i) p.c[place(i)] = sum.own.value[i];
}

template <class T, int kWords>
void run(const Product& p, Reading reading) {
  if (reading == Reading::kWords) multiply<T, kWords, Reading::kWords><<<1, kWarp>>>(p);
  if (reading == Reading::kMatrices) multiply<T, kWords, Reading::kMatrices><<<1, kWarp>>>(p);
  if constexpr (kPerWord<T> == 2 && kWords == 8) {
    if (reading == Reading::kTransposed) multiply<T, kWords, Reading::kTransposed><<<1, kWarp>>>(p);
  }
}

}  // namespace
}  // namespace mfef::cuda

// What CUDA says of the launch; "unknown operand" for a type and K that tensor cores do not have.
extern "C" __attribute__((visibility("default"))) const char* mfef_ptx_multiply(const char* type, int depth,
                                                                                const float* a, const float* b,
                                                                                float* c, int reading) {
  using namespace mfef::cuda;
  const std::string of = type + std::to_string(depth);
  const auto how = static_cast<Reading>(reading);
  const Product p{a, b, c};
  if (of == "tf328") {
    run<Tf32, 8>(p, how);
  } else if (of == "tf324") {
    run<Tf32, 4>(p, how);
  } else if (of == "bfloat1616") {
    run<c10::BFloat16, 8>(p, how);
  } else if (of == "bfloat168") {
    run<c10::BFloat16, 4>(p, how);
  } else if (of == "float1616") {
    run<c10::Half, 8>(p, how);
  } else if (of == "float168") {
    run<c10::Half, 4>(p, how);
  } else {
    return "unknown operand";
  }
  const cudaError_t status = cudaGetLastError();
  return status == cudaSuccess ? nullptr : cudaGetErrorString(status);
}
