// The pybind11 surface of _C: what was built, what is in use, what would be planned. No tensors; the
// operators are reached through torch.ops.mfef.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/isa.h"
#include "cpu/pool.h"
#include "cuda/plan.h"

namespace py = pybind11;

namespace {

using mfef::Element;
using mfef::cpu::BlockArgs;
using mfef::cpu::Kernels;
using mfef::cpu::Plan;

py::dict build_info() {
  py::dict info;
  info["version"] = MFEF_VERSION;
  info["compiler"] = __VERSION__;
  info["torch_built_against"] = MFEF_TORCH_VERSION;
  info["cuda"] = MFEF_CUDA_STATUS;
  info["cpu_isas_built"] = mfef::cpu::compiled_isas();
  info["cpu_isas_usable"] = mfef::cpu::usable_isas();
  return info;
}

// A problem as mfef_ext.problem.Problem.sizes() has it. branches: (in, out, groups, k) each; hidden 0: no attention.
struct Problem {
  Element element;
  int64_t batch, channels, height, width, hidden, spatial_k;
  bool split;
  std::vector<std::tuple<int64_t, int64_t, int64_t, int64_t>> branches;

  explicit Problem(const py::dict& sizes)
      : element(element_named(sizes["dtype"].cast<std::string>())),
        batch(sizes["batch"].cast<int64_t>()),
        channels(sizes["channels"].cast<int64_t>()),
        height(sizes["height"].cast<int64_t>()),
        width(sizes["width"].cast<int64_t>()),
        hidden(sizes["hidden"].cast<int64_t>()),
        spatial_k(sizes["spatial_k"].cast<int64_t>()),
        split(sizes["split"].cast<bool>()),
        branches(sizes["branches"].cast<decltype(branches)>()) {
    // What no kernel takes must not wrap around before a planner refuses it.
    constexpr int64_t kMax = int64_t(1) << 30;
    auto check = [](const char* name, int64_t value) {
      if (value >= kMax) throw std::invalid_argument(std::string(name) + " must be below 2^30");
    };
    check("channels", channels);
    check("hidden", hidden);
    check("spatial_k", spatial_k);
    for (const auto& [in, out, groups, k] : branches) {
      check("a branch's channels", in > out ? in : out);
      check("a kernel size", k);
    }
    if (height >= (int64_t(1) << 31) / width) throw std::invalid_argument("height * width must be below 2^31");
  }

  // Fills in `shapes`, of which there are `count`; returns the output channels of all.
  template <class Shape, class To>
  int64_t shapes(To* to, int count) const {
    if (branches.size() > size_t(count)) throw std::invalid_argument("too many branches");
    const Shape* before = nullptr;
    for (const auto& [in, out, groups, k] : branches) {
      static_cast<Shape&>(*to = {}) = Shape::after(before, split, in, out, groups, k, height, width);
      before = to++;
    }
    return before ? before->out_first + before->out : channels;
  }

 private:
  static Element element_named(const std::string& dtype) {
    if (dtype == "float32") return Element::kFloat;
    if (dtype == "bfloat16") return Element::kBFloat16;
    if (dtype == "float16") return Element::kHalf;
    if (dtype == "float64") return Element::kDouble;
    throw std::invalid_argument("no kernel takes dtype " + dtype);
  }
};

// How the CPU would run a problem.
py::dict cpu_plan(const py::dict& sizes) {
  const Problem problem(sizes);
  BlockArgs a{};
  a.element = problem.element;
  a.batch = problem.batch;
  a.in = problem.channels;
  a.height = problem.height;
  a.width = problem.width;
  a.split = problem.split;
  a.hidden = problem.hidden;
  a.spatial_k = problem.spatial_k;
  a.branch_count = int(problem.branches.size());
  a.out = problem.shapes<mfef::BranchShape<int64_t>>(a.branches, mfef::cpu::kMaxBranches);
  const Kernels& kernels = mfef::cpu::kernels();
  const int lanes = int(kernels.vector_bytes / compute_bytes(a.element));
  a.plan = mfef::cpu::choose_plan(a, lanes);
  a.convolution = mfef::cpu::forced_convolution();
  py::dict plan;
  plan["isa"] = kernels.name;
  plan["lanes"] = lanes;
  plan["plan"] = a.plan == Plan::kImages ? "images" : "pixels";
  plan["units"] = kernels.units(a);
  for (const bool backward : {false, true}) {
    const std::string direction = backward ? "backward" : "forward";
    kernels.choose(a, backward);
    std::vector<int> sizes;
    for (int i = 0; i < a.branch_count; ++i) sizes.push_back(a.branches[i].fft_size);
    plan[(direction + "_fft_sizes").c_str()] = sizes;
    plan[(direction + "_scratch_bytes").c_str()] =
        kernels.unit_scratch(a, backward) + kernels.branch_scratch(a, backward);
  }
  return plan;
}

// How CUDA would run a problem where a thread block may have `shared_limit` bytes of shared memory; "reason" says why
// not where "fits" is false, and then there is no more. The last three are what scratch depends on: whether the
// forward saves, whether the backward has parameters' gradients and a bias' among them.
py::dict cuda_plan(const py::dict& sizes, bool tf32, int64_t shared_limit, bool save, bool need_parameters, bool bias) {
  using namespace mfef::cuda;
  const Problem problem(sizes);
  Sizes s{};
  s.element = problem.element;
  s.tf32 = tf32 && s.element == Element::kFloat;
  s.batch = problem.batch;
  s.in = int(problem.channels);
  s.height = int(problem.height);
  s.width = int(problem.width);
  s.split = problem.split;
  s.hidden = int(problem.hidden);
  s.spatial_full = int(problem.spatial_k);
  s.spatial_k = s.hidden ? int(mfef::live_taps(problem.spatial_k, s.height, s.width)) : 0;
  s.branch_count = int(problem.branches.size());
  s.out = int(problem.shapes<mfef::cuda::Branch>(s.branches, kMaxBranches));
  const mfef::cuda::Plan p = make_plan(s, shared_limit);
  py::dict plan;
  plan["fits"] = p.fits;
  plan["reason"] = p.reason;
  if (!p.fits) return plan;
  plan["plan"] = p.large ? "large-map" : "small-map";
  auto branches_where = [&](auto condition) {
    std::vector<int> found;
    for (int b = 0; b < s.branch_count; ++b) {
      if (condition(b)) found.push_back(b);
    }
    return found;
  };
  for (const bool backward : {false, true}) {
    const std::string direction = backward ? "backward_" : "forward_";
    plan[(direction + "launches").c_str()] = launches(s, p, backward);
    plan[(direction + "scratch_bytes").c_str()] =
        Scratch(s, p, backward, {.save = save, .parameters = need_parameters, .bias = bias}).bytes(s);
    plan[(direction + "tensor_core_branches").c_str()] = branches_where([&](int b) {
      if (!p.large) return by_matrices(s, s.branches[b]);
      return (backward ? p.maps.units_backward : p.maps.units).rows[b] > 0;
    });
    if (p.large) {
      const Units& of = backward ? p.maps.units_backward : p.maps.units;
      std::vector<std::tuple<int, int, int>> rounds;
      for (int b = 0; b < s.branch_count; ++b) {
        if (of.rows[b]) rounds.emplace_back(of.stage[b], of.rows[b], of.buffers[b]);
      }
      plan[(direction + "tensor_core_rounds").c_str()] = rounds;
      plan[(direction + "units").c_str()] = of.count;
      plan[(direction + "shared_bytes").c_str()] =
          backward ? std::max(p.maps.shared_backward, p.maps.shared_matrices_backward)
                   : std::max(p.maps.shared, p.maps.shared_matrices);
    } else {
      plan[(direction + "stages").c_str()] = s.branch_count ? (backward ? p.stages_backward : p.stages).total(s) : 0;
      plan[(direction + "shared_bytes").c_str()] = backward ? p.shared_backward : p.shared;
    }
  }
  plan["weight_gradient_tensor_core_branches"] = branches_where([&](int b) {
    return (p.large ? LargeMatrixTiles::count(s, b) : MatrixTile::count(s, b)) > 0 && !p.weights_in_backward;
  });
  if (p.large) {
    plan["tiles"] = p.maps.tiles.count();
    plan["tile"] = std::make_tuple(p.maps.tiles.rows, p.maps.tiles.columns);
    plan["pieces"] = p.maps.pieces.count();
    plan["piece"] = std::make_tuple(p.maps.pieces.rows, p.maps.pieces.columns);
    plan["threads"] = kConvolutionThreads;
    plan["weight_gradient_buffers"] = p.maps.matrix_buffers;
  } else {
    plan["images"] = p.images;
    plan["blocks"] = (s.batch + p.images - 1) / p.images;
    plan["threads"] = p.threads;
    plan["row"] = p.row;
  }
  plan["weights_in_backward"] = p.weights_in_backward;
  plan["weight_gradient_tiles"] = p.tiles + p.maps.matrix_tiles;
  plan["weight_gradient_slices"] = p.slices;
  plan["weight_gradient_shared_bytes"] =
      p.large ? std::max(p.maps.shared_weights, p.maps.shared_matrix_weights) : p.shared_weights;
  return plan;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native part of mfef_ext: build information and planner. Operators: torch.ops.mfef.";
  m.def("build_info", &build_info);
  m.def("cpu_isa", [] { return std::string(mfef::cpu::kernels().name); });
  m.def("force_cpu_isa", &mfef::cpu::force_isa, py::arg("name"));
  m.def("forced_cpu_plan", &mfef::cpu::forced_plan);
  m.def("force_cpu_plan", &mfef::cpu::force_plan, py::arg("name"));
  m.def("forced_cpu_convolution", &mfef::cpu::forced_convolution_name);
  m.def("force_cpu_convolution", &mfef::cpu::force_convolution, py::arg("name"));
  m.attr("CPU_MAX_BRANCHES") = int(mfef::cpu::kMaxBranches);
  m.attr("CUDA_MAX_BRANCHES") = int(mfef::cuda::kMaxBranches);
  m.attr("MAX_ELEMENTS") = mfef::kMaxElements;
  m.def("cpu_plan", &cpu_plan, py::arg("sizes"));
  m.def("cuda_plan", &cuda_plan, py::arg("sizes"), py::arg("tf32"), py::arg("shared_limit"), py::arg("save") = true,
        py::arg("need_parameters") = true, py::arg("bias") = false);
  m.def(
      "poison_buffers", [](bool on) { mfef::cpu::poison_buffers = on; }, py::arg("on"),
      "For tests: fills every buffer of the kernels with NaN before use.");
  m.def(
      "fma_chain", [](int64_t iterations) { return mfef::cpu::kernels().fma_chain(iterations); }, py::arg("iterations"),
      py::call_guard<py::gil_scoped_release>(),
      "Runs multiply-adds in registers on this thread; returns the floating-point operations done.");
}
