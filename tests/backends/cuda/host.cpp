// The CUDA backend compiled by the C++ compiler: every thread block of a kernel runs on the host, phase by phase, a
// loop over its threads between barriers. Registers the same operators for CPU tensors, in the namespace
// mfef_cuda_host whose schemas the test defines. conftest.py compiles and loads this.
//
// Shared memory is full of NaN when a thread block starts and has a guard behind it. Threads run in ascending or in
// descending order: where that changes a bit, threads of one phase depend on one another, which is a race.
#include "cuda/backward.cu"
#include "cuda/forward.cu"
#include "cuda/large_attention.cu"
#include "cuda/large_conv.cu"
#include "cuda/large_weight_gradient.cu"
#include "cuda/ops_cuda.cu"
#include "cuda/weight_gradient.cu"

namespace mfef::cuda {

int64_t host_shared_limit = 227 * 1024;
static bool host_backwards = false;

const char* run_on_host(Run run, const BlockArgs& args, int64_t blocks, int threads, int64_t shared) {
  constexpr int64_t kMostBlocks = 5;  // as on the device, thread blocks take turns beyond the largest grid
  constexpr int kGuard = 64;
  constexpr float kMark = 12345.0f;
  if (shared > host_shared_limit) return "more shared memory than the device has";
  const int64_t grid = blocks < kMostBlocks ? blocks : kMostBlocks;
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

}  // namespace mfef::cuda

extern "C" __attribute__((visibility("default"))) void mfef_cuda_host_settings(int64_t shared_limit, bool backwards) {
  mfef::cuda::host_shared_limit = shared_limit;
  mfef::cuda::host_backwards = backwards;
}
