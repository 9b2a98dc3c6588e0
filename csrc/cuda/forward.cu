#include "forward.cuh"

#include "launch.cuh"

namespace mfef::cuda {

const char* launch_forward(const BlockArgs& args, const Plan& plan, void* stream) {
  if (plan.matrices) {
    return launch<MatrixForward, kMostThreads>(args, args.blocks, plan.threads, plan.shared, stream);
  }
  return launch_for_row<Forward, kMostThreads>(args, plan, args.blocks, plan.threads, plan.shared, stream);
}

}  // namespace mfef::cuda
