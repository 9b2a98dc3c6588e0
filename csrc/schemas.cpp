// The schemas of all operators: the only place where they stand.
//
// An operator with a backward returns what its backward needs, and takes `save`: without it those
// outputs are empty and the memory is never touched. `allow_tf32` is whether CUDA's kernels may round what convolutions
// multiply to TF32. Fakes, autograd and autocast are in
// mfef_ext/ops/.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(mfef, m) {
  m.def(
      "multi_scale_conv2d(Tensor x, Tensor[] weights, int[] groups, bool split, Tensor? bias, bool allow_tf32=False) "
      "-> Tensor");
  m.def(
      "multi_scale_conv2d_backward(Tensor grad, Tensor x, Tensor[] weights, int[] groups, bool split, Tensor? bias, "
      "bool need_x, bool need_parameters, bool allow_tf32=False) -> (Tensor grad_x, "
      "Tensor[] grad_weights, Tensor grad_bias)");
  m.def(
      "dual_attention(Tensor y, Tensor fc1_weight, Tensor? fc1_bias, Tensor fc2_weight, Tensor? fc2_bias, "
      "Tensor spatial_weight, bool save) -> (Tensor out, Tensor mean, Tensor max, Tensor max_index, "
      "Tensor spatial_gate, Tensor channel_index)");
  m.def(
      "dual_attention_backward(Tensor grad, Tensor y, Tensor fc1_weight, Tensor? fc1_bias, Tensor fc2_weight, "
      "Tensor? fc2_bias, Tensor spatial_weight, Tensor mean, Tensor max, Tensor max_index, "
      "Tensor spatial_gate, Tensor channel_index, bool need_x, bool need_parameters) -> (Tensor grad_y, "
      "Tensor grad_fc1_weight, Tensor grad_fc1_bias, Tensor grad_fc2_weight, Tensor grad_fc2_bias, "
      "Tensor grad_spatial_weight)");
  m.def(
      "mfef_block(Tensor x, Tensor[] conv_weights, int[] groups, bool split, Tensor fc1_weight, Tensor? fc1_bias, "
      "Tensor fc2_weight, Tensor? fc2_bias, Tensor spatial_weight, bool save, bool allow_tf32=False) -> (Tensor out, "
      "Tensor y, Tensor mean, Tensor max, Tensor max_index, Tensor spatial_gate, Tensor channel_index)");
  m.def(
      "mfef_block_backward(Tensor grad, Tensor x, Tensor[] conv_weights, int[] groups, bool split, "
      "Tensor fc1_weight, Tensor? fc1_bias, Tensor fc2_weight, Tensor? fc2_bias, Tensor spatial_weight, Tensor y, "
      "Tensor mean, Tensor max, Tensor max_index, Tensor spatial_gate, Tensor channel_index, "
      "bool need_x, bool need_parameters, bool allow_tf32=False) -> (Tensor grad_x, "
      "Tensor[] grad_conv_weights, Tensor grad_fc1_weight, Tensor grad_fc1_bias, Tensor grad_fc2_weight, Tensor "
      "grad_fc2_bias, Tensor grad_spatial_weight)");
  m.def("cuda_build_info() -> str");
}
