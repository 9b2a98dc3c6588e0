// The launches that ops_cuda.cu makes. Each returns null or what CUDA says is wrong.
#pragma once

#include "plan.h"

namespace mfef::cuda {

using Launch = const char* (*)(const BlockArgs&, const Plan&, void* stream);

const char* launch_forward(const BlockArgs&, const Plan&, void* stream);
const char* launch_backward(const BlockArgs&, const Plan&, void* stream);
const char* launch_weight_gradient(const BlockArgs&, const Plan&, void* stream);
const char* launch_sums(const BlockArgs&, const Plan&, void* stream);

}  // namespace mfef::cuda
