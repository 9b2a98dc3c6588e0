// The CUDA side of the operators. Their schemas are in csrc/ops.cpp, which _C registers first.
// No kernel of the operators is here yet: cuda_build_info is what proves that the compiler, the
// static CUDA runtime, the stable ABI and the loading in Python work together.

#include <cuda_runtime.h>

#include <torch/csrc/stable/library.h>

#include <string>

namespace mfef::cuda {
namespace {

// CUDA writes 13020 for 13.2.
std::string dotted(int version) { return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10); }

// "key=value" lines: architectures compiled, nvcc, runtime linked, driver and device found. The
// questions that fail without a driver are answered by what the CUDA runtime says about it.
std::string cuda_build_info() {
  std::string info = "architectures=" MFEF_CUDA_ARCHS;
  info += "\nnvcc=" + std::to_string(__CUDACC_VER_MAJOR__) + "." + std::to_string(__CUDACC_VER_MINOR__) + "." +
          std::to_string(__CUDACC_VER_BUILD__);
  info += "\nruntime=" + dotted(CUDART_VERSION);
  int driver = 0;
  const cudaError_t status = cudaDriverGetVersion(&driver);
  info += "\ndriver=";
  if (status != cudaSuccess) {
    info += cudaGetErrorString(status);
  } else {
    info += driver == 0 ? "none" : dotted(driver);
  }
  return info;
}

}  // namespace
}  // namespace mfef::cuda

STABLE_TORCH_LIBRARY_IMPL(mfef, CompositeExplicitAutograd, m) {
  m.impl("cuda_build_info", TORCH_BOX(&mfef::cuda::cuda_build_info));
}
