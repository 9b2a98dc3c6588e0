// The bodies of the operators, once for every native backend: they check the arguments, allocate the results, and
// leave the computation to the backend's Call. csrc/schemas.cpp has the schemas.
//
// A Call is one call of an operator. It is made of the operator's input and has
//   kMaxBranches                             the branches that it takes at most
//   args                                     with the maps x (the input, already there), y, result, grad_result, grad_x
//   compute_dtype()                          the dtype of what the attention saves
//   convolution(parameters, channels, tf32)  what is computed: one of these or both
//   attention(parameters)
//   saved(tensors)                           where the attention's forward saves, and its backward finds, what it needs
//   forward()                                into args.result, and into args.y where there is one
//   backward(grads)                          into args.grad_x, where there is one, and into the parameters' gradients
#pragma once

#include <tuple>
#include <vector>

#include "common/checks.h"

namespace mfef {

template <class Call>
struct Operators {
  using Tensors = std::vector<Tensor>;
  using Sizes = std::vector<int64_t>;
  using Optional = std::optional<Tensor>;

  static Tensor multi_scale_conv2d(const Tensor& x, const Tensors& weights, const Sizes& groups, bool split,
                                   const Optional& bias, bool allow_tf32) {
    const MapSize size = check_map("x", x);
    const ConvolutionParameters p{weights, groups, split, bias};
    const int64_t channels = p.check(x, Call::kMaxBranches);
    Call call(x, size);
    call.convolution(p, channels, allow_tf32);
    Tensor result = empty_map_like(x, channels);
    call.args.result = map_of(result);
    call.forward();
    return result;
  }

  static std::tuple<Tensor, Tensors, Tensor> multi_scale_conv2d_backward(const Tensor& grad, const Tensor& x,
                                                                         const Tensors& weights, const Sizes& groups,
                                                                         bool split, const Optional& bias, bool need_x,
                                                                         bool need_parameters, bool allow_tf32) {
    const MapSize size = check_map("x", x);
    const ConvolutionParameters p{weights, groups, split, bias};
    const int64_t channels = p.check(x, Call::kMaxBranches);
    check_grad(grad, x, size, channels);
    Call call(x, size);
    call.convolution(p, channels, allow_tf32);
    const ConvolutionGrads grads(p, need_parameters);
    Tensor grad_x = backward(call, grad, x, need_x, {need_parameters, &grads, nullptr});
    return {grad_x, grads.weights, grads.bias ? *grads.bias : nothing(x)};
  }

  static std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> dual_attention(
      const Tensor& y, const Tensor& fc1_weight, const Optional& fc1_bias, const Tensor& fc2_weight,
      const Optional& fc2_bias, const Tensor& spatial_weight, bool save) {
    const MapSize size = check_map("y", y);
    const AttentionParameters p{fc1_weight, fc2_weight, spatial_weight, fc1_bias, fc2_bias};
    p.check(y, size.c);
    Call call(y, size);
    call.attention(p);
    Tensor result = empty_map_like(y, size.c);
    const Saved s(y, size, size.c, call.compute_dtype(), save);
    call.saved(s);
    call.args.result = map_of(result);
    call.forward();
    return {result, s.mean, s.max, s.max_index, s.spatial_gate, s.channel_index};
  }

  static std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> dual_attention_backward(
      const Tensor& grad, const Tensor& y, const Tensor& fc1_weight, const Optional& fc1_bias, const Tensor& fc2_weight,
      const Optional& fc2_bias, const Tensor& spatial_weight, const Tensor& mean, const Tensor& max,
      const Tensor& max_index, const Tensor& spatial_gate, const Tensor& channel_index, bool need_x,
      bool need_parameters) {
    const MapSize size = check_map("y", y);
    const AttentionParameters p{fc1_weight, fc2_weight, spatial_weight, fc1_bias, fc2_bias};
    p.check(y, size.c);
    check_grad(grad, y, size, size.c);
    Call call(y, size);
    const Saved s(mean, max, max_index, spatial_gate, channel_index);
    s.check(y, size, size.c, call.compute_dtype());
    call.attention(p);
    call.saved(s);
    call.args.y = map_of(y);
    const AttentionGrads grads(p, need_parameters, y);
    Tensor grad_y = backward(call, grad, y, need_x, {need_parameters, nullptr, &grads});
    return {grad_y, grads.fc1_weight, grads.fc1_bias, grads.fc2_weight, grads.fc2_bias, grads.spatial_weight};
  }

  static std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> mfef_block(
      const Tensor& x, const Tensors& conv_weights, const Sizes& groups, bool split, const Tensor& fc1_weight,
      const Optional& fc1_bias, const Tensor& fc2_weight, const Optional& fc2_bias, const Tensor& spatial_weight,
      bool save, bool allow_tf32) {
    const MapSize size = check_map("x", x);
    const Optional no_bias;
    const ConvolutionParameters convolution{conv_weights, groups, split, no_bias};
    const int64_t channels = convolution.check(x, Call::kMaxBranches);
    const AttentionParameters attention{fc1_weight, fc2_weight, spatial_weight, fc1_bias, fc2_bias};
    attention.check(x, channels);
    Call call(x, size);
    call.convolution(convolution, channels, allow_tf32);
    call.attention(attention);
    Tensor result = empty_map_like(x, channels);
    Tensor y = save ? empty_map_like(x, channels) : nothing(x);
    const Saved s(x, size, channels, call.compute_dtype(), save);
    call.saved(s);
    if (save) call.args.y = map_of(y);
    call.args.result = map_of(result);
    call.forward();
    return {result, y, s.mean, s.max, s.max_index, s.spatial_gate, s.channel_index};
  }

  static std::tuple<Tensor, Tensors, Tensor, Tensor, Tensor, Tensor, Tensor> mfef_block_backward(
      const Tensor& grad, const Tensor& x, const Tensors& conv_weights, const Sizes& groups, bool split,
      const Tensor& fc1_weight, const Optional& fc1_bias, const Tensor& fc2_weight, const Optional& fc2_bias,
      const Tensor& spatial_weight, const Tensor& y, const Tensor& mean, const Tensor& max, const Tensor& max_index,
      const Tensor& spatial_gate, const Tensor& channel_index, bool need_x, bool need_parameters, bool allow_tf32) {
    const MapSize size = check_map("x", x);
    const Optional no_bias;
    const ConvolutionParameters convolution{conv_weights, groups, split, no_bias};
    const int64_t channels = convolution.check(x, Call::kMaxBranches);
    const AttentionParameters attention{fc1_weight, fc2_weight, spatial_weight, fc1_bias, fc2_bias};
    attention.check(x, channels);
    check_grad(grad, x, size, channels);
    check_like("y", y, x);
    check_shape("y", y, {size.n, channels, size.h, size.w});
    Call call(x, size);
    const Saved s(mean, max, max_index, spatial_gate, channel_index);
    s.check(x, size, channels, call.compute_dtype());
    call.convolution(convolution, channels, allow_tf32);
    call.attention(attention);
    call.saved(s);
    call.args.y = map_of(y);
    const ConvolutionGrads conv_grads(convolution, need_parameters);
    const AttentionGrads grads(attention, need_parameters, x);
    Tensor grad_x = backward(call, grad, x, need_x, {need_parameters, &conv_grads, &grads});
    return {grad_x,           conv_grads.weights, grads.fc1_weight,    grads.fc1_bias,
            grads.fc2_weight, grads.fc2_bias,     grads.spatial_weight};
  }

  template <class Library>
  static void implement(Library& library) {
    library.impl("multi_scale_conv2d", TORCH_BOX(&Operators::multi_scale_conv2d));
    library.impl("multi_scale_conv2d_backward", TORCH_BOX(&Operators::multi_scale_conv2d_backward));
    library.impl("dual_attention", TORCH_BOX(&Operators::dual_attention));
    library.impl("dual_attention_backward", TORCH_BOX(&Operators::dual_attention_backward));
    library.impl("mfef_block", TORCH_BOX(&Operators::mfef_block));
    library.impl("mfef_block_backward", TORCH_BOX(&Operators::mfef_block_backward));
  }

 private:
  // Runs the backward of a call that is otherwise complete; returns the gradient of its input.
  static Tensor backward(Call& call, const Tensor& grad, const Tensor& x, bool need_x, const ParameterGrads& grads) {
    Tensor grad_x = need_x ? empty_map_like(x, x.size(1)) : nothing(x);
    call.args.grad_result = map_of(grad);
    if (need_x) call.args.grad_x = map_of(grad_x);
    call.backward(grads);
    return grad_x;
  }
};

}  // namespace mfef
