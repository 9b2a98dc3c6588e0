// Arguments of the operators, checked: what every native backend shares.
//
// The Python front refuses bad input with longer sentences; these checks stand behind it, so that a
// direct call of torch.ops.mfef.* raises and never reads outside a tensor.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "types.h"

namespace mfef {

using torch::headeronly::DeviceType;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline std::string text_of(const std::vector<int64_t>& shape) {
  std::string s = "(";
  for (size_t i = 0; i < shape.size(); ++i) s += (i ? ", " : "") + std::to_string(shape[i]);
  return s + ")";
}

inline std::string shape_of(const Tensor& t) {
  std::vector<int64_t> shape;
  for (int64_t i = 0; i < t.dim(); ++i) shape.push_back(t.size(i));
  return text_of(shape);
}

inline void check_shape(const char* name, const Tensor& t, const std::vector<int64_t>& shape) {
  bool same = t.dim() == int64_t(shape.size());
  for (size_t i = 0; same && i < shape.size(); ++i) same = t.size(int64_t(i)) == shape[i];
  STD_TORCH_CHECK(same, "mfef: ", name, " has shape ", shape_of(t), ", expected ", text_of(shape));
}

inline void check_like(const char* name, const Tensor& t, const Tensor& x) {
  STD_TORCH_CHECK(t.device() == x.device(), "mfef: ", name, " is not on the device of the input");
  STD_TORCH_CHECK(t.scalar_type() == x.scalar_type(), "mfef: ", name, " does not have the dtype of the input");
}

// Null for the dtypes that no kernel takes.
inline std::optional<Element> element_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return Element::kFloat;
    case ScalarType::BFloat16:
      return Element::kBFloat16;
    case ScalarType::Half:
      return Element::kHalf;
    case ScalarType::Double:
      return Element::kDouble;
    default:
      return std::nullopt;
  }
}
inline ScalarType compute_dtype(Element e) {
  return compute_element(e) == Element::kDouble ? ScalarType::Double : ScalarType::Float;
}

inline void check_count(const std::string& name, double count) {
  STD_TORCH_CHECK(count <= double(kMaxElements), "mfef: ", name, " has about ", count,
                  " elements, at most 2^40 are supported");
}
inline void check_batch(const std::string& name, int64_t n, double count) {
  check_count("an image of " + name, count);
  check_count(name, double(n) * count);
}

// Every element that the strides reach lies inside the storage: a storage can be shrunk or freed behind a
// tensor's back.
inline void check_memory(const Tensor& t) {
  if (t.numel() == 0) return;
  int64_t last = 0, bytes = 0, offset = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(t.get(), &bytes));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_offset(t.get(), &offset));
  bool beyond = __builtin_add_overflow(offset, int64_t(1), &last);
  for (int64_t d = 0; d < t.dim(); ++d) {
    int64_t of_dim = 0;
    beyond |=
        __builtin_mul_overflow(t.size(d) - 1, t.stride(d), &of_dim) || __builtin_add_overflow(last, of_dim, &last);
  }
  beyond |= __builtin_mul_overflow(last, int64_t(t.element_size()), &last);
  STD_TORCH_CHECK(!beyond && last <= bytes, "mfef: a tensor of shape ", shape_of(t), " reaches beyond its storage of ",
                  bytes, " bytes; was the storage resized?");
}

// The sizes of an (N, C, H, W) input; only N may be 0.
struct MapSize {
  int64_t n, c, h, w;
};

inline MapSize check_map(const char* name, const Tensor& x) {
  STD_TORCH_CHECK(x.dim() == 4, "mfef: ", name, " must be 4-D (N, C, H, W), got shape ", shape_of(x));
  const MapSize s{x.size(0), x.size(1), x.size(2), x.size(3)};
  STD_TORCH_CHECK(s.c > 0 && s.h > 0 && s.w > 0, "mfef: ", name, " has shape ", shape_of(x),
                  ": C, H and W must be at least 1");
  STD_TORCH_CHECK(s.h <= ((int64_t(1) << 31) - 1) / s.w, "mfef: ", name, " has shape ", shape_of(x),
                  ": H * W must be below 2^31");
  check_batch(name, s.n, double(s.c) * double(s.h) * double(s.w));
  return s;
}

// The convolution's parameters: of every branch a weight and a number of groups, and one bias.
struct ConvolutionParameters {
  const std::vector<Tensor>& weights;
  const std::vector<int64_t>& groups;
  bool split;
  const std::optional<Tensor>& bias;

  // Returns the output channels of all branches.
  int64_t check(const Tensor& x, size_t max_branches) const {
    STD_TORCH_CHECK(!weights.empty(), "mfef: weights is empty");
    STD_TORCH_CHECK(weights.size() <= max_branches, "mfef: weights has ", weights.size(), " branches, at most ",
                    max_branches, " are supported");
    STD_TORCH_CHECK(weights.size() == groups.size(), "mfef: weights has ", weights.size(), " branches but groups has ",
                    groups.size(), " entries");
    int64_t in = 0, out = 0;
    for (size_t i = 0; i < weights.size(); ++i) {
      const Tensor& w = weights[i];
      check_like("a weight", w, x);
      STD_TORCH_CHECK(w.dim() == 4 && w.size(2) == w.size(3) && w.size(2) % 2 == 1 && w.size(0) > 0 && w.size(1) > 0,
                      "mfef: weights[", i, "] must have shape (Cout, Cin / groups, k, k) with k odd, got ",
                      shape_of(w));
      // Padded maps are addressed with k as an int; no useful kernel comes near this bound.
      STD_TORCH_CHECK(w.size(2) < 4096, "mfef: the kernel size of weights[", i, "] is ", w.size(2), ", at most 4095");
      const int64_t g = groups[i];
      STD_TORCH_CHECK(g > 0 && g <= w.size(0) && w.size(0) % g == 0, "mfef: groups[", i, "]=", g,
                      " must divide Cout=", w.size(0));
      STD_TORCH_CHECK(w.size(1) <= x.size(1) / g, "mfef: weights[", i, "] takes more channels than the input has");
      check_count("a weight", double(w.size(0)) * double(w.size(1)) * double(w.size(2)) * double(w.size(3)));
      STD_TORCH_CHECK(split || w.size(1) * g == x.size(1), "mfef: weights[", i, "] takes ", w.size(1) * g,
                      " channels but the input has ", x.size(1));
      in += w.size(1) * g;
      out += w.size(0);
    }
    STD_TORCH_CHECK(!split || in == x.size(1), "mfef: the branches take ", in, " channels but the input has ",
                    x.size(1));
    check_batch("the result", x.size(0), double(out) * double(x.size(2)) * double(x.size(3)));
    if (bias) {
      check_like("bias", *bias, x);
      check_shape("bias", *bias, {out});
    }
    return out;
  }

  // The shape of branch i, which lies behind `before`, for maps of height x width.
  template <class Int>
  BranchShape<Int> shape(size_t i, const BranchShape<Int>* before, int64_t height, int64_t width) const {
    const Tensor& w = weights[i];
    return BranchShape<Int>::after(before, split, w.size(1) * groups[i], w.size(0), groups[i], w.size(2), height,
                                   width);
  }
};

// The attention's parameters.
struct AttentionParameters {
  const Tensor &fc1_weight, &fc2_weight, &spatial_weight;
  const std::optional<Tensor>&fc1_bias, &fc2_bias;

  void check(const Tensor& like, int64_t channels) const {
    check_like("fc1_weight", fc1_weight, like);
    check_like("fc2_weight", fc2_weight, like);
    check_like("spatial_weight", spatial_weight, like);
    STD_TORCH_CHECK(fc1_weight.dim() == 2 && fc1_weight.size(0) > 0,
                    "mfef: fc1_weight must have shape (hidden, C), got ", shape_of(fc1_weight));
    const int64_t hidden = fc1_weight.size(0);
    check_count("fc1_weight", double(hidden) * double(channels));
    check_batch("the layer of hidden units", like.size(0), double(hidden));
    check_shape("fc1_weight", fc1_weight, {hidden, channels});
    check_shape("fc2_weight", fc2_weight, {channels, hidden});
    if (fc1_bias) {
      check_like("fc1_bias", *fc1_bias, like);
      check_shape("fc1_bias", *fc1_bias, {hidden});
    }
    if (fc2_bias) {
      check_like("fc2_bias", *fc2_bias, like);
      check_shape("fc2_bias", *fc2_bias, {channels});
    }
    STD_TORCH_CHECK(spatial_weight.dim() == 4 && spatial_weight.size(2) % 2 == 1 && spatial_weight.size(2) < 4096,
                    "mfef: spatial_weight must have shape (1, 2, k, k) with k odd, got ", shape_of(spatial_weight));
    check_shape("spatial_weight", spatial_weight, {1, 2, spatial_weight.size(2), spatial_weight.size(2)});
  }
};

// Whether the elements lie in the order (n, h, w, c). Asked only after the contiguous order has been
// ruled out: where extents are 1 the strides alone do not tell.
inline bool is_channels_last(const Tensor& x) {
  int64_t expected = 1;
  for (int64_t d : {1, 3, 2, 0}) {
    if (x.size(d) == 1) continue;
    if (x.stride(d) != expected) return false;
    expected *= x.size(d);
  }
  return true;
}

inline Tensor empty_strided(const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides, ScalarType dtype,
                            const Tensor& like) {
  AtenTensorHandle handle;
  const auto error =
      aoti_torch_empty_strided(int64_t(sizes.size()), sizes.data(), strides.data(),
                               torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)),
                               torch::stable::detail::to<int32_t>(torch::stable::detail::from(like.device().type())),
                               like.device().index(), &handle);
  // Under torch 2.10 the error that the function hides has no message.
  STD_TORCH_CHECK(error == AOTI_TORCH_SUCCESS, "mfef: torch has no memory for a tensor of shape ", text_of(sizes));
  return Tensor(handle);
}

inline Tensor empty_dense(const std::vector<int64_t>& sizes, ScalarType dtype, const Tensor& like) {
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1;
  for (size_t i = sizes.size(); i-- > 0;) {
    strides[i] = stride;
    stride *= sizes[i] > 0 ? sizes[i] : 1;
  }
  return empty_strided(sizes, strides, dtype, like);
}

// (N, channels, H, W) in the layout of x: contiguous, or channels_last where x is; contiguous for
// everything else. ops/fakes.py says the same to the compiler.
inline Tensor empty_map_like(const Tensor& x, int64_t channels) {
  const int64_t n = x.size(0), h = x.size(2), w = x.size(3);
  if (x.is_contiguous() || !is_channels_last(x)) return empty_dense({n, channels, h, w}, x.scalar_type(), x);
  return empty_strided({n, channels, h, w}, {channels * h * w, 1, channels * w, channels}, x.scalar_type(), x);
}

inline Tensor nothing(const Tensor& like) { return empty_dense({0}, like.scalar_type(), like); }

inline Map map_of(const Tensor& t) {
  check_memory(t);
  return {t.data_ptr(), {t.stride(0), t.stride(1), t.stride(2), t.stride(3)}};
}

inline void check_grad(const Tensor& grad, const Tensor& x, const MapSize& size, int64_t channels) {
  check_like("grad", grad, x);
  check_shape("grad", grad, {size.n, channels, size.h, size.w});
}

// What the attention saves for its backward: (N, C) three times and (N, H, W) twice, N = 0 where it is not to be
// saved; reals in the compute type, indices in int32.
struct Saved {
  Tensor mean, max, max_index, spatial_gate, channel_index;

  Saved(const Tensor& x, const MapSize& size, int64_t channels, ScalarType real, bool save)
      : mean(empty_dense({save ? size.n : 0, channels}, real, x)),
        max(empty_dense({save ? size.n : 0, channels}, real, x)),
        max_index(empty_dense({save ? size.n : 0, channels}, ScalarType::Int, x)),
        spatial_gate(empty_dense({save ? size.n : 0, size.h, size.w}, real, x)),
        channel_index(empty_dense({save ? size.n : 0, size.h, size.w}, ScalarType::Int, x)) {}

  Saved(const Tensor& mean, const Tensor& max, const Tensor& max_index, const Tensor& spatial_gate,
        const Tensor& channel_index)
      : mean(mean), max(max), max_index(max_index), spatial_gate(spatial_gate), channel_index(channel_index) {}

  void check(const Tensor& x, const MapSize& size, int64_t channels, ScalarType real) const {
    auto one = [&](const char* name, const Tensor& t, ScalarType dtype, bool per_channel) {
      STD_TORCH_CHECK(t.scalar_type() == dtype && t.device() == x.device() && t.is_contiguous(), "mfef: ", name,
                      " is not what the forward saved");
      check_memory(t);
      check_shape(name, t,
                  per_channel ? std::vector<int64_t>{size.n, channels} : std::vector<int64_t>{size.n, size.h, size.w});
    };
    one("mean", mean, real, true);
    one("max", max, real, true);
    one("max_index", max_index, ScalarType::Int, true);
    one("spatial_gate", spatial_gate, real, false);
    one("channel_index", channel_index, ScalarType::Int, false);
  }
};

// The gradients of the convolution's parameters; nothing where none are wanted, or there is no bias.
struct ConvolutionGrads {
  std::vector<Tensor> weights;
  std::optional<Tensor> bias;

  ConvolutionGrads(const ConvolutionParameters& p, bool need) {
    if (!need) return;
    for (const Tensor& w : p.weights) weights.push_back(empty_like(w));
    if (p.bias) bias = empty_like(*p.bias);
  }
};

// The gradients of the attention's parameters; without elements where not wanted or absent.
struct AttentionGrads {
  Tensor fc1_weight, fc1_bias, fc2_weight, fc2_bias, spatial_weight;

  AttentionGrads(const AttentionParameters& p, bool need, const Tensor& like)
      : fc1_weight(need ? empty_like(p.fc1_weight) : nothing(like)),
        fc1_bias(need && p.fc1_bias ? empty_like(*p.fc1_bias) : nothing(like)),
        fc2_weight(need ? empty_like(p.fc2_weight) : nothing(like)),
        fc2_bias(need && p.fc2_bias ? empty_like(*p.fc2_bias) : nothing(like)),
        spatial_weight(need ? empty_like(p.spatial_weight) : nothing(like)) {}
};

// Those of a call; null for what it does not compute.
struct ParameterGrads {
  bool need;
  const ConvolutionGrads* convolution;
  const AttentionGrads* attention;
};

}  // namespace mfef
