#include "weight_gradient.cuh"

#include "launch.cuh"
#include "sums.cuh"

namespace mfef::cuda {

const char* launch_weight_gradient(const BlockArgs& args, const Plan& plan, void* stream) {
  const int64_t blocks = int64_t(plan.tiles) * plan.slices;
  if (plan.matrix_tiles) {
    // Three thread blocks of a multiprocessor, as kMatrixShared is meant for.
    return launch<MatrixWeightGradient, kTileThreads, 3>(args, blocks, kTileThreads, plan.shared_weights, stream);
  }
  return launch_for_row<WeightGradient, kTileThreads, 3>(args, plan, blocks, kTileThreads, plan.shared_weights, stream);
}

const char* launch_sums(const BlockArgs& args, const Plan&, void* stream) {
  const int outputs = kSumThreads / sum_parts(args);
  return launch<Sums, kSumThreads>(args, (args.outputs + outputs - 1) / outputs, kSumThreads, kSumThreads * 4, stream);
}

}  // namespace mfef::cuda
