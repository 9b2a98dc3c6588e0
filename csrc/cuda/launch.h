// The launches that ops_cuda.cu makes. Each returns null or what CUDA says is wrong.
#pragma once

#include "plan.h"

namespace mfef::cuda {

using Launch = const char* (*)(const BlockArgs&, const Plan&, void* stream);

const char* launch_forward(const BlockArgs&, const Plan&, void* stream);
const char* launch_backward(const BlockArgs&, const Plan&, void* stream);
const char* launch_weight_gradient(const BlockArgs&, const Plan&, void* stream);
const char* launch_sums(const BlockArgs&, const Plan&, void* stream);

// Of large maps, whose last launch of a backward is launch_sums too.
const char* launch_large_convolution(const BlockArgs&, const Plan&, void* stream);
const char* launch_large_matrix_convolution(const BlockArgs&, const Plan&, void* stream);
const char* launch_channel_gates(const BlockArgs&, const Plan&, void* stream);
const char* launch_pool_channels(const BlockArgs&, const Plan&, void* stream);
const char* launch_gate_map(const BlockArgs&, const Plan&, void* stream);
const char* launch_pixel_gradient(const BlockArgs&, const Plan&, void* stream);
const char* launch_channel_gradient(const BlockArgs&, const Plan&, void* stream);
const char* launch_mlp_backward(const BlockArgs&, const Plan&, void* stream);
const char* launch_map_gradient(const BlockArgs&, const Plan&, void* stream);
const char* launch_large_weight_gradient(const BlockArgs&, const Plan&, void* stream);
const char* launch_large_matrix_weight_gradient(const BlockArgs&, const Plan&, void* stream);

#ifdef MFEF_CUDA_NAMESPACE  // of a test that executes the kernels' PTX on CPU tensors (tests/ptx)
struct TestSettings {
  int64_t most_partials, scratch_bytes;
  bool one_slice;  // a weight gradient of a launch of its own sums all of the batch in one chain
};
extern TestSettings test_settings;
#endif

}  // namespace mfef::cuda
