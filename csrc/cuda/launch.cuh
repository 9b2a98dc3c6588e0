// How a kernel is launched, and its __global__ function.
#pragma once

#include <cuda_runtime.h>

#include <atomic>

#include "device.cuh"
#include "launch.h"

namespace mfef::cuda {

// More parameters only drivers of CUDA 12.1 and later take.
static_assert(sizeof(BlockArgs) <= 4096);

template <class Kernel, int kThreads, int kResident>
__global__ void __launch_bounds__(kThreads, kResident) kernel(const __grid_constant__ BlockArgs args) {
  extern __shared__ __align__(16) float shared[];
  Kernel::run(args, Block{int64_t(blockIdx.x), int64_t(gridDim.x), int(blockDim.x), shared});
}

// Thread blocks take turns beyond the largest grid. Shared memory above 48 KiB has to be asked for, once per device
// and kernel, so that a launch is nothing but a launch (CUDA graphs). kResident: thread blocks that a multiprocessor
// has registers for, at least.
template <class Kernel, int kThreads, int kResident = 1>
const char* launch(const BlockArgs& args, int64_t blocks, int threads, int64_t shared, void* stream) {
  constexpr int64_t kMostBlocks = (int64_t(1) << 31) - 1;
  constexpr int kMostDevices = 64;
  static std::atomic<bool> allowed[kMostDevices];
  int device = 0, limit = 0;
  cudaError_t status = cudaGetDevice(&device);
  if (status == cudaSuccess && shared > 48 * 1024 && (device >= kMostDevices || !allowed[device].load())) {
    status = cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    if (status == cudaSuccess) {
      status =
          cudaFuncSetAttribute(kernel<Kernel, kThreads, kResident>, cudaFuncAttributeMaxDynamicSharedMemorySize, limit);
    }
    if (status == cudaSuccess && device < kMostDevices) allowed[device].store(true);
  }
  if (status == cudaSuccess) {
    const unsigned grid = unsigned(blocks < kMostBlocks ? blocks : kMostBlocks);
    kernel<Kernel, kThreads, kResident><<<grid, threads, size_t(shared), static_cast<cudaStream_t>(stream)>>>(args);
    status = cudaGetLastError();
  }
  return status == cudaSuccess ? nullptr : cudaGetErrorString(status);
}

// The table of instantiations of a kernel: one per width of a row in shared memory. Rows of 16 take all the registers
// that there are.
template <template <int> class Kernel, int kThreads, int kResident = 1>
const char* launch_for_row(const BlockArgs& args, const Plan& plan, int64_t blocks, int threads, int64_t shared,
                           void* stream) {
  switch (plan.row) {
    case 2:
      return launch<Kernel<2>, kThreads, kResident>(args, blocks, threads, shared, stream);
    case 4:
      return launch<Kernel<4>, kThreads, kResident>(args, blocks, threads, shared, stream);
    case 8:
      return launch<Kernel<8>, kThreads, kResident>(args, blocks, threads, shared, stream);
    case 16:
      return launch<Kernel<16>, kThreads>(args, blocks, threads, shared, stream);
    default:
      return "no kernel for rows of this width";
  }
}

}  // namespace mfef::cuda
