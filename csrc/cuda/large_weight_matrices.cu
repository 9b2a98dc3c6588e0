#include "large_weight_matrices.cuh"

#include "launch.cuh"

namespace mfef::cuda {

const char* launch_large_matrix_weight_gradient(const BlockArgs& args, const Plan& plan, void* stream) {
  return launch<LargeMatrixWeightGradient, kConvolutionThreads, kConvolutionBlocks>(
      args, int64_t(plan.maps.matrix_tiles) * plan.slices, kConvolutionThreads, plan.maps.shared_matrix_weights,
      stream);
}

}  // namespace mfef::cuda
