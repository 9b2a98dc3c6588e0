// The operators on CUDA tensors: from checked tensors to BlockArgs, a plan, launches, and back. Their schemas are in
// csrc/schemas.cpp, which _C registers first.
#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>

#include <deque>
#include <string>
#include <vector>

#include "launch.h"
#include "operators.h"

namespace mfef::cuda {

// --- the device -------------------------------------------------------------------------------

// The device of a tensor is the current one while this lives, and `stream` its current stream.
struct Device {
  explicit Device(const Tensor& x) : guard_(x.get_device_index()) {
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
  }
  // Bytes of shared memory that a thread block may have.
  int64_t shared_limit() const {
    int device = 0, bytes = 0;
    STD_CUDA_CHECK(cudaGetDevice(&device));
    STD_CUDA_CHECK(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
    return bytes;
  }
#ifdef MFEF_CUDA_NAMESPACE
  static int64_t most_partials() { return test_settings.most_partials; }
#else
  static constexpr int64_t most_partials() { return kMostPartials; }
#endif
  void* stream = nullptr;

 private:
  torch::stable::accelerator::DeviceGuard guard_;
};

namespace {

// --- one call --------------------------------------------------------------------------------

Element checked_element(const Tensor& x) {
  const std::optional<Element> element = element_of(x.scalar_type());
  STD_TORCH_CHECK(element && *element != Element::kDouble,
                  "mfef: the CUDA kernels take float32, bfloat16 and float16 only");
  return *element;
}

// Null for a tensor without elements: one that is not there, or not wanted.
Parameter parameter(const Tensor& t) {
  check_memory(t);
  Parameter p{};
  if (t.numel() == 0) return p;
  p.data = t.data_ptr();
  for (int64_t d = 0; d < t.dim(); ++d) p.stride[d] = t.stride(d);
  return p;
}
Parameter parameter(const std::optional<Tensor>& t) { return t ? parameter(*t) : Parameter{}; }

float* floats(const Tensor& t) { return t.numel() ? static_cast<float*>(t.data_ptr()) : nullptr; }
int32_t* indices(const Tensor& t) { return t.numel() ? static_cast<int32_t*>(t.data_ptr()) : nullptr; }

// The plan of a problem. It takes from 4 microseconds to some milliseconds to make (wide dense groups), and a step of
// training asks for those of every layer, forward and backward: a thread keeps the last that it made.
const Plan& plan_for(const Sizes& sizes, int64_t limit, int64_t most_partials) {
  constexpr size_t kMostPlans = 64;
  struct Made {
    Sizes sizes;
    int64_t limit, most_partials;
    Plan plan;
  };
  thread_local std::deque<Made> made;
  for (const Made& one : made) {
    if (one.limit == limit && one.most_partials == most_partials && one.sizes == sizes) return one.plan;
  }
  if (made.size() == kMostPlans) made.pop_back();
  made.push_front({sizes, limit, most_partials, make_plan(sizes, limit, most_partials)});
  return made.front().plan;
}

// BlockArgs with the scratch that it points to.
class Call {
 public:
  static constexpr size_t kMaxBranches = cuda::kMaxBranches;

  Call(const Tensor& x, const MapSize& size) : device_(x), x_(x) {
    args.element = args.sizes.element = checked_element(x);
    // Sizes that no thread block could hold must not wrap around before the planner refuses them.
    constexpr int64_t kMost = int64_t(1) << 30;
    STD_TORCH_CHECK(size.c < kMost, "mfef: the CUDA kernels take fewer than 2^30 channels, got ", size.c);
    args.sizes.batch = size.n;
    args.sizes.in = args.sizes.out = int(size.c);
    args.sizes.height = int(size.h);
    args.sizes.width = int(size.w);
    args.x = map_of(x);
  }

#ifdef MFEF_CUDA_NAMESPACE
  ~Call() {
    for (const Tensor& t : memory_) test_settings.scratch_bytes += t.numel() * int64_t(t.element_size());
  }
#endif

  ScalarType compute_dtype() const { return mfef::compute_dtype(args.element); }

  void convolution(const ConvolutionParameters& p, int64_t out_channels, bool tf32) {
    Sizes& s = args.sizes;
    STD_TORCH_CHECK(out_channels < int64_t(1) << 30, "mfef: the CUDA kernels take fewer than 2^30 channels, got ",
                    out_channels);
    s.split = p.split;
    s.tf32 = tf32 && s.element == Element::kFloat;
    s.out = int(out_channels);
    s.branch_count = int(p.weights.size());
    for (int i = 0; i < s.branch_count; ++i) {
      s.branches[i] = p.shape<int>(size_t(i), i ? &s.branches[i - 1] : nullptr, s.height, s.width);
      args.conv_weights[i] = parameter(p.weights[size_t(i)]);
    }
    args.bias = parameter(p.bias);
  }

  void attention(const AttentionParameters& p) {
    Sizes& s = args.sizes;
    STD_TORCH_CHECK(p.fc1_weight.size(0) < int64_t(1) << 30, "mfef: fc1_weight has too many hidden units");
    s.hidden = int(p.fc1_weight.size(0));
    s.spatial_full = int(p.spatial_weight.size(2));
    s.spatial_k = int(live_taps(s.spatial_full, s.height, s.width));
    args.fc1_weight = parameter(p.fc1_weight);
    args.fc1_bias = parameter(p.fc1_bias);
    args.fc2_weight = parameter(p.fc2_weight);
    args.fc2_bias = parameter(p.fc2_bias);
    args.spatial_weight = parameter(p.spatial_weight);
  }

  void saved(const Saved& s) {
    args.mean = floats(s.mean);
    args.max = floats(s.max);
    args.max_index = indices(s.max_index);
    args.spatial_gate = floats(s.spatial_gate);
    args.channel_index = indices(s.channel_index);
  }

  void forward() {
    plan();
    if (plan_.large) return large_forward();
    args.stages = plan_.stages;
    args.weights = plan_.weights;
    if (args.blocks) run(launch_forward);
  }

  void backward(const ParameterGrads& grads) {
    const bool need_parameters = grads.need;
    args.bias = {};  // which the forward adds, and the data gradient, the same convolution, must not
    if (grads.convolution) outputs(*grads.convolution);
    if (grads.attention) outputs(*grads.attention);
    plan();
    Sizes& s = args.sizes;
    Gradients& g = args.grads;
    const int64_t n = s.batch;
    const Scratch scratch(s, plan_, true, {.parameters = need_parameters, .bias = g.bias.data != nullptr});
    g.logit = room(scratch.logit);
    g.hidden_sum = room(scratch.hidden_sum);
    g.hidden_mean = room(scratch.hidden_mean);
    g.hidden_max = room(scratch.hidden_max);
    g.spatial = room(scratch.spatial);
    g.channel_sums = room(scratch.channel_sums);
    g.weights = room(scratch.weights);
    args.bias_terms = plan_.large ? n * plan_.maps.tiles.count() : n;
    if (plan_.large) return large_backward(scratch, need_parameters);
    g.dy = room(scratch.dy);
    args.stages = plan_.stages_backward;
    args.weights = plan_.weights_backward;
    const bool weights = plan_.weights_in_backward && g.weights;
    if (args.blocks && (s.hidden || args.grad_x.data || g.channel_sums || weights)) run(launch_backward);
    if (!need_parameters) return;
    if (args.tiles && n) {
      args.step = plan_.tile_step;
      run(launch_weight_gradient);
    }
    run(launch_sums);
  }

  BlockArgs args{};

 private:
  // Where the gradient of a parameter goes; one more output of the last launch.
  Parameter output(const Tensor& grad) {
    args.outputs += grad.numel();
    return parameter(grad);
  }
  void outputs(const ConvolutionGrads& grads) {
    for (size_t i = 0; i < grads.weights.size(); ++i) args.grads.branches[i] = output(grads.weights[i]);
    if (grads.bias) args.grads.bias = output(*grads.bias);
  }
  void outputs(const AttentionGrads& grads) {
    args.grads.fc1_weight = output(grads.fc1_weight);
    args.grads.fc1_bias = output(grads.fc1_bias);
    args.grads.fc2_weight = output(grads.fc2_weight);
    args.grads.fc2_bias = output(grads.fc2_bias);
    args.grads.spatial_weight = output(grads.spatial_weight);
  }

  void plan() {
    plan_ = plan_for(args.sizes, device_.shared_limit(), device_.most_partials());
    STD_TORCH_CHECK(plan_.fits, "mfef: no CUDA kernel for this call: ", plan_.reason);
    if (plan_.large) {
      LargeArgs& l = args.large;
      l.tiles = plan_.maps.tiles;
      l.pieces = plan_.maps.pieces;
      l.weight_pieces = plan_.maps.weight_pieces;
      l.matrix_pieces = plan_.maps.matrix_pieces;
      l.matrix_tiles = plan_.maps.matrix_tiles;
      l.matrix_buffers = plan_.maps.matrix_buffers;
      l.matrix_slice = plan_.maps.matrix_slice;
      l.reduce_parts = plan_.maps.reduce_parts;
      args.blocks = args.sizes.batch * l.pieces.count();
    } else {
      args.images = plan_.images;
      args.step = plan_.step;
      args.blocks = (args.sizes.batch + plan_.images - 1) / plan_.images;
    }
    args.weights_in_backward = plan_.weights_in_backward;
    args.tiles = plan_.tiles;
    args.slices = plan_.slices;
    args.slice_images = plan_.slice_images;
    args.pass_images = plan_.pass_images;
    args.matrix_tiles = plan_.matrix_tiles;
    args.matrix_images = plan_.matrix_images;
#ifdef MFEF_CUDA_NAMESPACE
    if (test_settings.one_slice && !args.weights_in_backward) {
      args.slice_images *= args.slices;
      args.large.matrix_slice *= args.slices;
      args.slices = 1;
    }
#endif
  }

  // The convolution from `source` to `dest`, where there is one; with statistics where there is room for them.
  void large_convolution(bool backward, const Map& source, Element element, const Map& dest) {
    LargeArgs& l = args.large;
    l.backward = backward;
    l.source = source;
    l.source_element = element;
    l.dest = dest;
    const Units& units = backward ? plan_.maps.units_backward : plan_.maps.units;
    for (const bool matrices : {false, true}) {
      l.units = units.of_launch(args.sizes, backward, matrices);
      if (l.units.count) run(matrices ? launch_large_matrix_convolution : launch_large_convolution);
    }
  }

  void large_forward() {
    const Sizes& s = args.sizes;
    LargeArgs& l = args.large;
    if (!s.batch) return;
    if (!s.hidden) return large_convolution(false, args.x, args.element, args.result);
    const Scratch scratch(s, plan_, false, {.save = args.y.data != nullptr});
    if (scratch.y) {
      memory_.push_back(empty_map_like(x_, s.out));
      args.y = map_of(memory_.back());
    }
    l.tile_sums = room(scratch.tile_sums);
    l.tile_tops = room(scratch.tile_tops);
    l.tile_places = reinterpret_cast<int32_t*>(room(scratch.tile_places));
    l.gate = room(scratch.gate);
    l.pooled = room(scratch.pooled);
    large_convolution(false, args.x, args.element, args.y);
    if (!s.branch_count) args.y = args.x;
    run(launch_channel_gates);
    run(launch_pool_channels);
    run(launch_gate_map);
  }

  void large_backward(const Scratch& scratch, bool need_parameters) {
    const Sizes& s = args.sizes;
    LargeArgs& l = args.large;
    const int64_t n = s.batch, pixels = s.pixels();
    l.dy = args.grad_result;
    l.dy_element = args.element;
    if (s.hidden && n) {
      l.gate = room(scratch.gate);
      l.grad_mean = room(scratch.grad_mean);
      l.grad_max = room(scratch.grad_max);
      l.pooled = room(scratch.pooled);
      l.grad_pooled = room(scratch.grad_pooled);
      l.grad_spatial = room(scratch.grad_spatial);
      l.dots = room(scratch.dots);
      run(launch_channel_gates);
      run(launch_pixel_gradient);
      run(launch_channel_gradient);
      run(launch_mlp_backward);
      l.dy = args.grad_x;
      if (s.branch_count) {
        // In the order of y.
        const bool last = args.y.stride[1] == 1;
        l.dy = {room(scratch.dy),
                {s.out * pixels, last ? 1 : pixels, last ? int64_t(s.width) * s.out : s.width, last ? s.out : 1}};
        l.dy_element = Element::kFloat;
      }
      if (l.dy.data) run(launch_map_gradient);
    }
    if (s.branch_count && n && args.grad_x.data) large_convolution(true, l.dy, l.dy_element, args.grad_x);
    if (!need_parameters) return;
    if (args.grads.channel_sums && n) channel_sums();
    if (args.tiles && n) run(launch_large_weight_gradient);
    if (l.matrix_tiles && n) run(launch_large_matrix_weight_gradient);
    run(launch_sums);
  }

  // Sums over the pixels of every tile and channel of the gradient: the statistics of a problem without a convolution.
  void channel_sums() {
    LargeArgs& l = args.large;
    const int branches = args.sizes.branch_count;
    args.sizes.branch_count = 0;
    plan_.maps.units = statistic_units(args.sizes);
    l.tile_sums = args.grads.channel_sums;
    large_convolution(false, args.grad_result, args.element, {});
    args.sizes.branch_count = branches;
  }

  void run(Launch launch) {
    const char* error = launch(args, plan_, device_.stream);
    STD_TORCH_CHECK(!error, "mfef: a CUDA kernel could not be launched: ", error);
  }

  // Scratch for this call; the allocator gives it to nobody before the stream is done with it. Null for nothing.
  float* room(int64_t count) {
    if (!count) return nullptr;
    memory_.push_back(empty_dense({count}, ScalarType::Float, x_));
    return floats(memory_.back());
  }

  Device device_;
  Tensor x_;
  Plan plan_;
  std::vector<Tensor> memory_;
};

// --- the library ------------------------------------------------------------------------------

// CUDA writes 13020 for 13.2.
std::string dotted(int version) { return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10); }

// "key=value" lines: architectures compiled, nvcc, runtime linked, driver and device found. The
// questions that fail without a driver are answered by what the CUDA runtime says about it.
std::string cuda_build_info() {
  std::string info = "architectures=" MFEF_CUDA_ARCHS;
  info += "\nnvcc=" + std::to_string(__CUDACC_VER_MAJOR__) + "." + std::to_string(__CUDACC_VER_MINOR__) + "." +
          std::to_string(__CUDACC_VER_BUILD__);
  info += "\nruntime=" + dotted(CUDART_VERSION);
  int driver = 0;
  const cudaError_t status = cudaDriverGetVersion(&driver);
  info += "\ndriver=";
  if (status != cudaSuccess) {
    info += cudaGetErrorString(status);
  } else {
    info += driver == 0 ? "none" : dotted(driver);
  }
  return info;
}

}  // namespace
}  // namespace mfef::cuda

#ifdef MFEF_CUDA_NAMESPACE  // of a test that executes the kernels' PTX (tests/ptx)
STABLE_TORCH_LIBRARY_IMPL(MFEF_CUDA_NAMESPACE, CPU, m) {
#else
STABLE_TORCH_LIBRARY_IMPL(mfef, CompositeExplicitAutograd, m) {
  m.impl("cuda_build_info", TORCH_BOX(&mfef::cuda::cuda_build_info));
}
STABLE_TORCH_LIBRARY_IMPL(mfef, CUDA, m) {
#endif
  mfef::Operators<mfef::cuda::Call>::implement(m);
}
