#include "backward.cuh"

#include "launch.cuh"

namespace mfef::cuda {

const char* launch_backward(const BlockArgs& args, const Plan& plan, void* stream) {
  if (plan.matrices) {
    return launch<MatrixBackward, kMostThreads>(args, args.blocks, plan.threads, plan.shared_backward, stream);
  }
  return launch_for_row<Backward, kMostThreads>(args, plan, args.blocks, plan.threads, plan.shared_backward, stream);
}

}  // namespace mfef::cuda
