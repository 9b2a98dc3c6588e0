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

using mfef::cpu::BlockArgs;
using mfef::cpu::Branch;
using mfef::cpu::Element;
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

// How the CPU would run a problem. branches: (in, out, groups, k) each; hidden 0: no attention.
py::dict cpu_plan(int64_t batch, int64_t channels, int64_t height, int64_t width,
                  const std::vector<std::tuple<int64_t, int64_t, int64_t, int64_t>>& branches, bool split,
                  int64_t hidden, int64_t spatial_k, const std::string& dtype) {
  BlockArgs a{};
  a.element = dtype == "float64" ? Element::kDouble : dtype == "bfloat16" ? Element::kBFloat16 : Element::kFloat;
  a.batch = batch;
  a.in = a.out = channels;
  a.height = height;
  a.width = width;
  a.split = split;
  a.hidden = hidden;
  a.spatial_k = spatial_k;
  if (int64_t(branches.size()) > mfef::cpu::kMaxBranches) throw std::invalid_argument("too many branches");
  int64_t in_first = 0, out_first = 0;
  for (const auto& [in, out, groups, k] : branches) {
    Branch& b = a.branches[a.branch_count++];
    b = {};
    b.in_first = split ? in_first : 0;
    b.in = in;
    b.out_first = out_first;
    b.out = out;
    b.groups = groups;
    b.k = mfef::cpu::live_taps(k, height, width);
    in_first += in;
    out_first += out;
  }
  if (a.branch_count) a.out = out_first;
  const Kernels& kernels = mfef::cpu::kernels();
  const int lanes = kernels.vector_bytes / (a.element == Element::kDouble ? 8 : 4);
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
    std::vector<int> spectra;
    for (int i = 0; i < a.branch_count; ++i) spectra.push_back(a.branches[i].spectrum);
    plan[(direction + "_spectra").c_str()] = spectra;
    plan[(direction + "_scratch_bytes").c_str()] =
        kernels.unit_scratch(a, backward) + kernels.branch_scratch(a, backward);
  }
  return plan;
}

// How CUDA would run a problem where a thread block may have `shared_limit` bytes of shared memory. Sizes as for
// cpu_plan; here "reason" says why not where "fits" is false, and then there is no more. The last three are what
// scratch depends on: whether the forward saves, whether the backward has parameters' gradients and a bias' among them.
py::dict cuda_plan(int64_t batch, int64_t channels, int64_t height, int64_t width,
                   const std::vector<std::tuple<int64_t, int64_t, int64_t, int64_t>>& branches, bool split,
                   int64_t hidden, int64_t spatial_k, const std::string& dtype, bool tf32, int64_t shared_limit,
                   bool save, bool need_parameters, bool bias) {
  using namespace mfef::cuda;
  // What no thread block could hold must not wrap around before the planner refuses it.
  if (channels >= int64_t(1) << 30 || hidden >= int64_t(1) << 30) throw std::invalid_argument("too many channels");
  Sizes s{};
  s.element = dtype == "bfloat16"  ? mfef::cuda::Element::kBFloat16
              : dtype == "float16" ? mfef::cuda::Element::kHalf
                                   : mfef::cuda::Element::kFloat;
  s.tf32 = tf32 && s.element == mfef::cuda::Element::kFloat;
  s.batch = batch;
  s.in = s.out = int(channels);
  s.height = int(height);
  s.width = int(width);
  s.split = split;
  s.hidden = int(hidden);
  s.spatial_full = int(spatial_k);
  s.spatial_k = hidden ? live_taps(spatial_k, height, width) : 0;
  if (int64_t(branches.size()) > kMaxBranches) throw std::invalid_argument("too many branches");
  int in_first = 0, out_first = 0;
  for (const auto& [in, out, groups, k] : branches) {
    s.branches[s.branch_count++] = {split ? in_first : 0,       int(in), out_first, int(out), int(groups), int(k),
                                    live_taps(k, height, width)};
    in_first += int(in);
    out_first += int(out);
  }
  if (s.branch_count) s.out = out_first;
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
    plan["blocks"] = (batch + p.images - 1) / p.images;
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
  m.def("cpu_plan", &cpu_plan, py::arg("batch"), py::arg("channels"), py::arg("height"), py::arg("width"),
        py::arg("branches"), py::arg("split"), py::arg("hidden"), py::arg("spatial_k"), py::arg("dtype"));
  m.def("cuda_plan", &cuda_plan, py::arg("batch"), py::arg("channels"), py::arg("height"), py::arg("width"),
        py::arg("branches"), py::arg("split"), py::arg("hidden"), py::arg("spatial_k"), py::arg("dtype"),
        py::arg("tf32"), py::arg("shared_limit"), py::arg("save") = true, py::arg("need_parameters") = true,
        py::arg("bias") = false);
  m.def(
      "poison_buffers", [](bool on) { mfef::cpu::poison_buffers = on; }, py::arg("on"),
      "For tests: fills every buffer of the kernels with NaN before use.");
  m.def(
      "fma_chain", [](int64_t iterations) { return mfef::cpu::kernels().fma_chain(iterations); }, py::arg("iterations"),
      py::call_guard<py::gil_scoped_release>(),
      "Runs multiply-adds in registers on this thread; returns the floating-point operations done.");
}
