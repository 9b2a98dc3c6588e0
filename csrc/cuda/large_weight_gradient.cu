#include "large_weight_gradient.cuh"

#include "launch.cuh"

namespace mfef::cuda {

const char* launch_large_weight_gradient(const BlockArgs& args, const Plan& plan, void* stream) {
  return launch<LargeWeightGradient, kTileThreads>(args, int64_t(plan.tiles) * plan.slices, kTileThreads,
                                                   plan.maps.shared_weights, stream);
}

}  // namespace mfef::cuda
