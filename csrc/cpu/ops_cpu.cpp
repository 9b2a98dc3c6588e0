// The operators on CPU tensors: from checked tensors to BlockArgs, scratch, threads, and back.
#include <atomic>
#include <cstring>
#include <utility>

#include "common/problem.h"
#include "isa.h"
#include "pool.h"

namespace mfef::cpu {
namespace {

// --- work on threads -------------------------------------------------------------------------

// f(i, scratch) for every i in [0, count) on torch's threads, each taking the next i when it is free: units
// may differ in work, and threads in speed. Which thread does which must not matter to f.
template <class F>
void parallel(int64_t count, int64_t scratch_bytes, const F& f) {
  std::atomic<bool> out_of_memory{false};
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, count, 1, [&](int64_t, int64_t) {
    Pool::Piece scratch = pool.take(scratch_bytes);
    if (!scratch.memory) {
      out_of_memory = true;  // an exception must not leave a worker thread
      return;
    }
    for (int64_t i = next++; i < count; i = next++) f(i, scratch.memory.get());
    pool.give(std::move(scratch));
  });
  STD_TORCH_CHECK(!out_of_memory, "mfef: not enough memory for ", scratch_bytes, " bytes of scratch per thread");
}

// --- elements --------------------------------------------------------------------------------

Element element_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return Element::kFloat;
    case ScalarType::BFloat16:
      return Element::kBFloat16;
    case ScalarType::Double:
      return Element::kDouble;
    default:
      STD_TORCH_CHECK(false, "mfef: the CPU kernels take float32, bfloat16 and float64 only");
  }
}

constexpr int64_t kElements = 8192;  // fewer are not worth a thread

ScalarType compute_type(Element e) { return e == Element::kDouble ? ScalarType::Double : ScalarType::Float; }
int64_t compute_size(Element e) { return e == Element::kDouble ? 8 : 4; }
int64_t element_size(Element e) { return e == Element::kBFloat16 ? 2 : compute_size(e); }

float widen(uint16_t bits) {
  const uint32_t word = uint32_t(bits) << 16;
  float f;
  __builtin_memcpy(&f, &word, 4);
  return f;
}

uint16_t narrow(float f) {
  uint32_t u;
  __builtin_memcpy(&u, &f, 4);
  return f != f ? uint16_t((u >> 16) | 0x40) : uint16_t((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}

// f(offset in t) for each element of t in row-major order, whatever its strides.
template <class F>
void for_each_element(const Tensor& t, const F& f) {
  int64_t size[4] = {1, 1, 1, 1}, stride[4] = {0, 0, 0, 0};
  const int64_t lead = 4 - t.dim();
  for (int64_t d = 0; d < t.dim(); ++d) {
    size[lead + d] = t.size(d);
    stride[lead + d] = t.stride(d);
  }
  for (int64_t a = 0; a < size[0]; ++a)
    for (int64_t b = 0; b < size[1]; ++b)
      for (int64_t c = 0; c < size[2]; ++c)
        for (int64_t d = 0; d < size[3]; ++d) f(a * stride[0] + b * stride[1] + c * stride[2] + d * stride[3]);
}

// Copies t to compute-type elements, in row-major order.
void widen_to(const Tensor& t, Element e, void* to) {
  const void* from = t.data_ptr();
  if (e == Element::kDouble) {
    double* at = static_cast<double*>(to);
    for_each_element(t, [&](int64_t i) { *at++ = static_cast<const double*>(from)[i]; });
  } else if (e == Element::kFloat) {
    float* at = static_cast<float*>(to);
    for_each_element(t, [&](int64_t i) { *at++ = static_cast<const float*>(from)[i]; });
  } else {
    float* at = static_cast<float*>(to);
    for_each_element(t, [&](int64_t i) { *at++ = widen(static_cast<const uint16_t*>(from)[i]); });
  }
}

// Writes t, whose element i (row-major) is sums[at(i)].
template <class T, class At>
void write_elements(const T* sums, const Tensor& t, Element e, const At& at) {
  void* to = t.mutable_data_ptr();
  int64_t i = 0;
  for_each_element(t, [&](int64_t offset) {
    const T sum = sums[at(i++)];
    if (e == Element::kBFloat16) {
      static_cast<uint16_t*>(to)[offset] = narrow(float(sum));
    } else {
      static_cast<T*>(to)[offset] = sum;
    }
  });
}

// Adds the slots of partial sums into the first one, in order.
template <class T>
void add_slots(T* partials, int64_t slots, int64_t total) {
  torch::stable::parallel_for(0, total, kElements, [&](int64_t begin, int64_t end) {
    for (int64_t s = 1; s < slots; ++s) {
      const T* from = partials + s * total;
      for (int64_t i = begin; i < end; ++i) partials[i] += from[i];
    }
  });
}

Map map_of(const Tensor& t) {
  check_memory(t);
  return {t.data_ptr(), {t.stride(0), t.stride(1), t.stride(2), t.stride(3)}};
}

// --- one call --------------------------------------------------------------------------------

// BlockArgs with the memory that it points to.
class Call {
 public:
  Call(const Call&) = delete;
  ~Call() {
    for (Pool::Piece& piece : memory_) pool.give(std::move(piece));
  }

  Call(const Tensor& x, const MapSize& size) {
    args.element = element_of(x);
    args.convolution = forced_convolution();
    args.batch = size.n;
    args.in = args.out = size.c;
    args.height = size.h;
    args.width = size.w;
  }

  void convolution(const std::vector<BranchSize>& branches, const std::vector<Tensor>& weights,
                   const std::optional<Tensor>& bias, bool split, int64_t out_channels) {
    args.split = split;
    args.branch_count = int(branches.size());
    args.out = out_channels;
    int64_t in = 0, out = 0;
    for (size_t i = 0; i < branches.size(); ++i) {
      const BranchSize& b = branches[i];
      const int64_t k = live_taps(b.k, args.height, args.width);
      Branch& branch = args.branches[i];
      branch = {};
      branch.in_first = split ? in : 0;
      branch.in = b.in;
      branch.out_first = out;
      branch.out = b.out;
      branch.groups = b.groups;
      branch.full_k = b.k;
      branch.k = k;
      check_memory(weights[i]);
      branch.weights = weights[i].data_ptr();
      for (int64_t d = 0; d < 4; ++d) branch.weight_stride[d] = weights[i].stride(d);
      in += b.in;
      out += b.out;
    }
    if (bias) args.bias = parameter(*bias);
  }

  void attention(const AttentionParameters& p) {
    args.hidden = p.fc1_weight.size(0);
    args.spatial_k = p.spatial_weight.size(2);
    args.fc1_weight = parameter(p.fc1_weight);
    args.fc2_weight = parameter(p.fc2_weight);
    args.fc1_bias = p.fc1_bias ? parameter(*p.fc1_bias) : nullptr;
    args.fc2_bias = p.fc2_bias ? parameter(*p.fc2_bias) : nullptr;
    args.spatial_weight = parameter(p.spatial_weight);
  }

  void forward() {
    const Kernels& k = kernels();
    const int64_t packed = choose(k, false);
    if (args.branch_count) pack(k, false, packed);
    run(k.units(args), false, [&](int64_t unit, int step, Scratch scratch) { k.forward(args, unit, step, scratch); });
  }

  // Runs the backward; the parameters' gradients are then read with write().
  void backward() {
    const Kernels& k = kernels();
    const int64_t packed = choose(k, true);
    if (args.branch_count && args.grad_x.data) pack(k, true, packed);
    lay_out(k);
    // The division into slots fixes the order of every sum; it depends on shape, dtype and instruction set.
    constexpr int64_t kMostSlots = 64, kMostBytes = int64_t(128) << 20;
    const int64_t units = k.units(args), total = args.partial.total;
    int64_t slots = units < kMostSlots ? units : kMostSlots;
    const int64_t affordable = kMostBytes / (total * compute_size(args.element) + 1);
    if (args.need_parameters && slots > affordable) slots = affordable > 4 ? affordable : (units < 4 ? units : 4);
    args.slots = slots;
    if (args.need_parameters) {
      args.partials = room((slots ? slots : 1) * total);
      args.kept_x = room(args.kept_x_elements);
      args.kept_grad = room(args.kept_grad_elements);
      args.channel_sums = room(args.channel_sum_elements);
    }
    run(slots, true, [&](int64_t slot, int step, Scratch scratch) { k.backward(args, slot, step, scratch); });
    if (!args.need_parameters) return;
    parallel(k.channel_tasks(args), 0, [&](int64_t task, void*) { k.channel_task(args, task); });
    if (slots == 0) {
      std::memset(args.partials, 0, size_t(total * compute_size(args.element)));
      std::memset(args.channel_sums, 0, size_t(args.channel_sum_elements * compute_size(args.element)));
    }
    if (args.element == Element::kDouble) {
      add_slots(static_cast<double*>(args.partials), slots, total);
    } else {
      add_slots(static_cast<float*>(args.partials), slots, total);
    }
  }
  // Writes the gradient whose sums start at `first`.
  void write(const Tensor& grad, int64_t first) {
    write(grad, args.partials, [first](int64_t i) { return first + i; });
  }
  // Writes the gradient of a branch's weights.
  void write_weights(const Tensor& grad, int branch) {
    const Kernels& k = kernels();
    const Branch& b = args.branches[branch];
    const int64_t count = grad.numel();
    void* to = grad.mutable_data_ptr();
    const int64_t stride[4] = {grad.stride(0), grad.stride(1), grad.stride(2), grad.stride(3)};
    // empty_like() keeps the order of dense tensors and makes others contiguous: there are no gaps.
    if (b.k < b.full_k) std::memset(to, 0, size_t(count * element_size(args.element)));
    torch::stable::parallel_for(0, b.groups, kElements / (count / b.groups + 1) + 1, [&](int64_t begin, int64_t end) {
      for (int64_t g = begin; g < end; ++g) k.read_weight_grad(args, branch, g, to, stride);
    });
  }
  // fc2's sums are (hidden, C): the loop that makes them runs over channels.
  void write_fc2(const Tensor& grad) {
    const int64_t hidden = args.hidden, channels = args.out, first = args.partial.fc2_weight;
    write(grad, args.partials, [=](int64_t i) { return first + (i % hidden) * channels + i / hidden; });
  }

  BlockArgs args{};

 private:
  template <class At>
  void write(const Tensor& grad, const void* sums, const At& at) {
    if (args.element == Element::kDouble) {
      write_elements(static_cast<const double*>(sums), grad, args.element, at);
    } else {
      write_elements(static_cast<const float*>(sums), grad, args.element, at);
    }
  }

  // Of the partial sums.
  void lay_out(const Kernels& k) {
    PartialLayout& p = args.partial;
    int64_t next = 0;
    auto take = [&next](int64_t count) {
      const int64_t at = next;
      next += (count + 15) / 16 * 16;
      return at;
    };
    p.conv = take(k.lay_out(args));
    p.bias = take(args.bias ? args.out : 0);
    p.fc1_weight = take(args.hidden * args.out);
    p.fc1_bias = take(args.hidden);
    p.fc2_weight = take(args.hidden * args.out);
    p.fc2_bias = take(args.hidden ? args.out : 0);
    p.spatial = take(args.hidden ? 2 * args.spatial_k * args.spatial_k : 0);
    p.total = next;
  }

  // Returns the elements of packed weights.
  int64_t choose(const Kernels& k, bool backward) {
    args.plan = choose_plan(args, k.vector_bytes / int(compute_size(args.element)));
    return k.choose(args, backward);
  }

  // f(i, step, scratch) for every i in [0, count): whole, or step by step where they do not go evenly into the
  // threads. The results are the same to the bit, since every step does the same in both.
  template <class F>
  void run(int64_t count, bool backward, const F& f) {
    const Kernels& k = kernels();
    const int64_t threads = torch::stable::get_num_threads();
    constexpr int64_t kMost = int64_t(256) << 20;
    // Waking threads twice costs about as much as a million multiply-adds.
    constexpr double kWorthwhile = 2e6;
    double products = 0;
    for (int i = 0; i < args.branch_count; ++i) {
      const Branch& b = args.branches[i];
      products += double(b.out) * double(b.in / b.groups) * double(b.k * b.k);
    }
    products *= double(args.batch) * double(args.height) * double(args.width);
    args.staged = products >= kWorthwhile && args.split && args.branch_count > 1 && count == k.units(args) &&
                  count % threads != 0 && count < 2 * threads && count * k.unit_scratch(args, backward) <= kMost;
    const int64_t unit = (k.unit_scratch(args, backward) + 63) / 64 * 64, branch = k.branch_scratch(args, backward);
    if (!args.staged) {
      parallel(count, unit + branch,
               [&](int64_t i, void* memory) { f(i, kWhole, {memory, static_cast<char*>(memory) + unit}); });
      return;
    }
    char* units = static_cast<char*>(room_bytes(count * unit));
    auto attention = [&] {
      parallel(count, 0, [&](int64_t i, void*) { f(i, kAttention, {units + i * unit, nullptr}); });
    };
    if (backward) attention();
    parallel(count * args.branch_count, branch, [&](int64_t i, void* memory) {
      f(i / args.branch_count, int(i % args.branch_count), {units + i / args.branch_count * unit, memory});
    });
    if (!backward) attention();
  }

  void* room(int64_t elements) { return room_bytes(elements * compute_size(args.element)); }
  void* room_bytes(int64_t bytes) {
    memory_.push_back(pool.take(bytes));
    STD_TORCH_CHECK(memory_.back().memory, "mfef: not enough memory for ", bytes, " bytes");
    return memory_.back().memory.get();
  }

  // The elements of t in the compute type, contiguous: t's own where they are that.
  const void* parameter(const Tensor& t) {
    check_memory(t);
    if (args.element != Element::kBFloat16 && t.is_contiguous()) return t.data_ptr();
    void* to = room(t.numel());
    widen_to(t, args.element, to);
    return to;
  }

  // Weights in the order of the tiles.
  void pack(const Kernels& k, bool backward, int64_t elements) {
    void* to = room(elements);
    (backward ? args.packed_backward : args.packed) = to;
    constexpr int64_t kTiles = 4;  // fewer are not worth a thread
    torch::stable::parallel_for(0, k.packed_tiles(args, backward), kTiles,
                                [&](int64_t begin, int64_t end) { k.prepare(args, backward, begin, end); });
  }

  std::vector<Pool::Piece> memory_;
};

// What the attention saves, entered into the call.
void enter(const Saved& s, BlockArgs& a) {
  a.mean = s.mean.data_ptr();
  a.max = s.max.data_ptr();
  a.max_index = static_cast<int32_t*>(s.max_index.data_ptr());
  a.spatial_gate = s.spatial_gate.data_ptr();
  a.channel_index = static_cast<int32_t*>(s.channel_index.data_ptr());
}

void write(Call& call, const AttentionGrads& grads, const AttentionParameters& p) {
  call.write(grads.fc1_weight, call.args.partial.fc1_weight);
  if (p.fc1_bias) call.write(grads.fc1_bias, call.args.partial.fc1_bias);
  call.write_fc2(grads.fc2_weight);
  if (p.fc2_bias) call.write(grads.fc2_bias, call.args.partial.fc2_bias);
  call.write(grads.spatial_weight, call.args.partial.spatial);
}

void write_weight_grads(Call& call, const std::vector<Tensor>& grads) {
  for (size_t i = 0; i < grads.size(); ++i) {
    call.write_weights(grads[i], int(i));
  }
}

// --- operators -------------------------------------------------------------------------------

Tensor multi_scale_conv2d(const Tensor& x, const std::vector<Tensor>& weights, const std::vector<int64_t>& groups,
                          bool split, const std::optional<Tensor>& bias, bool /*allow_tf32*/) {
  int64_t out;
  const MapSize size = check_map("x", x);
  const auto branches = check_branches(x, weights, groups, split, kMaxBranches, &out);
  if (bias) {
    check_like("bias", *bias, x);
    check_shape("bias", *bias, {out});
  }
  Call call(x, size);
  call.convolution(branches, weights, bias, split, out);
  Tensor result = empty_map_like(x, out);
  call.args.x = map_of(x);
  call.args.result = map_of(result);
  call.forward();
  return result;
}

std::tuple<Tensor, std::vector<Tensor>, Tensor> multi_scale_conv2d_backward(
    const Tensor& grad, const Tensor& x, const std::vector<Tensor>& weights, const std::vector<int64_t>& groups,
    bool split, const std::optional<Tensor>& bias, bool need_x, bool need_parameters, bool /*allow_tf32*/) {
  int64_t out;
  const MapSize size = check_map("x", x);
  const auto branches = check_branches(x, weights, groups, split, kMaxBranches, &out);
  if (bias) {
    check_like("bias", *bias, x);
    check_shape("bias", *bias, {out});
  }
  Call call(x, size);
  call.convolution(branches, weights, bias, split, out);
  check_grad(grad, x, size, out);
  Tensor grad_x = need_x ? empty_map_like(x, size.c) : nothing(x);
  Tensor grad_bias = need_parameters ? like_or_nothing(bias, x) : nothing(x);
  std::vector<Tensor> grads = weight_grads(weights, need_parameters);
  call.args.need_parameters = need_parameters;
  call.args.x = map_of(x);
  call.args.grad_result = map_of(grad);
  if (need_x) call.args.grad_x = map_of(grad_x);
  call.backward();
  write_weight_grads(call, grads);
  if (need_parameters && bias) call.write(grad_bias, call.args.partial.bias);
  return {grad_x, grads, grad_bias};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> dual_attention(const Tensor& y, const Tensor& fc1_weight,
                                                                          const std::optional<Tensor>& fc1_bias,
                                                                          const Tensor& fc2_weight,
                                                                          const std::optional<Tensor>& fc2_bias,
                                                                          const Tensor& spatial_weight, bool save) {
  const MapSize size = check_map("y", y);
  const AttentionParameters p{fc1_weight, fc2_weight, spatial_weight, fc1_bias, fc2_bias};
  p.check(y, size.c);
  Call call(y, size);
  call.attention(p);
  Tensor result = empty_map_like(y, size.c);
  const Saved s(y, size, size.c, compute_type(call.args.element), save);
  enter(s, call.args);
  call.args.save = save;
  call.args.x = map_of(y);
  call.args.result = map_of(result);
  call.forward();
  return {result, s.mean, s.max, s.max_index, s.spatial_gate, s.channel_index};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> dual_attention_backward(
    const Tensor& grad, const Tensor& y, const Tensor& fc1_weight, const std::optional<Tensor>& fc1_bias,
    const Tensor& fc2_weight, const std::optional<Tensor>& fc2_bias, const Tensor& spatial_weight, const Tensor& mean,
    const Tensor& max, const Tensor& max_index, const Tensor& spatial_gate, const Tensor& channel_index, bool need_x,
    bool need_parameters) {
  const MapSize size = check_map("y", y);
  const AttentionParameters p{fc1_weight, fc2_weight, spatial_weight, fc1_bias, fc2_bias};
  p.check(y, size.c);
  Call call(y, size);
  call.attention(p);
  check_grad(grad, y, size, size.c);
  const Saved s{mean, max, max_index, spatial_gate, channel_index};
  s.check(y, size, size.c, compute_type(call.args.element));
  enter(s, call.args);
  Tensor grad_y = need_x ? empty_map_like(y, size.c) : nothing(y);
  const AttentionGrads grads(p, need_parameters, y);
  call.args.need_parameters = need_parameters;
  call.args.y = map_of(y);
  call.args.grad_result = map_of(grad);
  if (need_x) call.args.grad_x = map_of(grad_y);
  call.backward();
  if (need_parameters) write(call, grads, p);
  return {grad_y, grads.fc1_weight, grads.fc1_bias, grads.fc2_weight, grads.fc2_bias, grads.spatial_weight};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> mfef_block(
    const Tensor& x, const std::vector<Tensor>& conv_weights, const std::vector<int64_t>& groups, bool split,
    const Tensor& fc1_weight, const std::optional<Tensor>& fc1_bias, const Tensor& fc2_weight,
    const std::optional<Tensor>& fc2_bias, const Tensor& spatial_weight, bool save, bool /*allow_tf32*/) {
  int64_t out;
  const MapSize size = check_map("x", x);
  const auto branches = check_branches(x, conv_weights, groups, split, kMaxBranches, &out);
  const AttentionParameters p{fc1_weight, fc2_weight, spatial_weight, fc1_bias, fc2_bias};
  p.check(x, out);
  Call call(x, size);
  call.convolution(branches, conv_weights, std::nullopt, split, out);
  call.attention(p);
  Tensor result = empty_map_like(x, out);
  Tensor y = save ? empty_map_like(x, out) : nothing(x);
  const Saved s(x, size, out, compute_type(call.args.element), save);
  enter(s, call.args);
  call.args.save = save;
  call.args.x = map_of(x);
  if (save) call.args.y = map_of(y);
  call.args.result = map_of(result);
  call.forward();
  return {result, y, s.mean, s.max, s.max_index, s.spatial_gate, s.channel_index};
}

std::tuple<Tensor, std::vector<Tensor>, Tensor, Tensor, Tensor, Tensor, Tensor> mfef_block_backward(
    const Tensor& grad, const Tensor& x, const std::vector<Tensor>& conv_weights, const std::vector<int64_t>& groups,
    bool split, const Tensor& fc1_weight, const std::optional<Tensor>& fc1_bias, const Tensor& fc2_weight,
    const std::optional<Tensor>& fc2_bias, const Tensor& spatial_weight, const Tensor& y, const Tensor& mean,
    const Tensor& max, const Tensor& max_index, const Tensor& spatial_gate, const Tensor& channel_index, bool need_x,
    bool need_parameters, bool /*allow_tf32*/) {
  int64_t out;
  const MapSize size = check_map("x", x);
  const auto branches = check_branches(x, conv_weights, groups, split, kMaxBranches, &out);
  const AttentionParameters p{fc1_weight, fc2_weight, spatial_weight, fc1_bias, fc2_bias};
  p.check(x, out);
  Call call(x, size);
  call.convolution(branches, conv_weights, std::nullopt, split, out);
  call.attention(p);
  check_grad(grad, x, size, out);
  check_like("y", y, x);
  check_shape("y", y, {size.n, out, size.h, size.w});
  const Saved s{mean, max, max_index, spatial_gate, channel_index};
  s.check(x, size, out, compute_type(call.args.element));
  enter(s, call.args);
  Tensor grad_x = need_x ? empty_map_like(x, size.c) : nothing(x);
  std::vector<Tensor> conv_grads = weight_grads(conv_weights, need_parameters);
  const AttentionGrads grads(p, need_parameters, x);
  call.args.need_parameters = need_parameters;
  call.args.x = map_of(x);
  call.args.y = map_of(y);
  call.args.grad_result = map_of(grad);
  if (need_x) call.args.grad_x = map_of(grad_x);
  call.backward();
  write_weight_grads(call, conv_grads);
  if (need_parameters) write(call, grads, p);
  return {grad_x, conv_grads, grads.fc1_weight, grads.fc1_bias, grads.fc2_weight, grads.fc2_bias, grads.spatial_weight};
}

}  // namespace
}  // namespace mfef::cpu

STABLE_TORCH_LIBRARY_IMPL(mfef, CPU, m) {
  m.impl("multi_scale_conv2d", TORCH_BOX(&mfef::cpu::multi_scale_conv2d));
  m.impl("multi_scale_conv2d_backward", TORCH_BOX(&mfef::cpu::multi_scale_conv2d_backward));
  m.impl("dual_attention", TORCH_BOX(&mfef::cpu::dual_attention));
  m.impl("dual_attention_backward", TORCH_BOX(&mfef::cpu::dual_attention_backward));
  m.impl("mfef_block", TORCH_BOX(&mfef::cpu::mfef_block));
  m.impl("mfef_block_backward", TORCH_BOX(&mfef::cpu::mfef_block_backward));
}
