#include "large_conv.cuh"
#include "launch.cuh"

namespace mfef::cuda {

const char* launch_large_matrix_convolution(const BlockArgs& args, const Plan& plan, void* stream) {
  const LargeArgs& l = args.large;
  return launch<LargeMatrixConvolution, kConvolutionThreads, kConvolutionBlocks>(
      args, args.sizes.batch * l.tiles.count() * l.units.count, kConvolutionThreads,
      l.backward ? plan.maps.shared_matrices_backward : plan.maps.shared_matrices, stream);
}

}  // namespace mfef::cuda
