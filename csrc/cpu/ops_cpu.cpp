// The operators on CPU tensors: from checked tensors to BlockArgs, scratch, threads, and back.
#include <torch/headeronly/util/BFloat16.h>

#include <atomic>
#include <cstring>
#include <utility>

#include "isa.h"
#include "operators.h"
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

constexpr int64_t kMinElements = 8192;  // fewer are not worth a thread

Element checked_element(const Tensor& x) {
  const std::optional<Element> element = element_of(x.scalar_type());
  STD_TORCH_CHECK(element && *element != Element::kHalf,
                  "mfef: the CPU kernels take float32, bfloat16 and float64 only");
  return *element;
}

// f(zero of the type in memory, zero of the compute type).
template <class F>
void with_types(Element e, const F& f) {
  switch (e) {
    case Element::kFloat:
      return f(0.0f, 0.0f);
    case Element::kBFloat16:
      return f(c10::BFloat16(0.0f), 0.0f);
    case Element::kDouble:
      return f(0.0, 0.0);
    case Element::kHalf:
      break;  // checked_element() refuses it
  }
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
  with_types(e, [&](auto memory, auto compute) {
    const auto* from = static_cast<const decltype(memory)*>(t.data_ptr());
    auto* next = static_cast<decltype(compute)*>(to);
    for_each_element(t, [&](int64_t i) { *next++ = static_cast<decltype(compute)>(from[i]); });
  });
}

// Adds the slots of partial sums into the first one, in order.
template <class T>
void add_slots(T* partials, int64_t slots, int64_t total) {
  torch::stable::parallel_for(0, total, kMinElements, [&](int64_t begin, int64_t end) {
    for (int64_t s = 1; s < slots; ++s) {
      const T* from = partials + s * total;
      for (int64_t i = begin; i < end; ++i) partials[i] += from[i];
    }
  });
}

// --- one call --------------------------------------------------------------------------------

// BlockArgs with the memory that it points to.
class Call {
 public:
  Call(const Call&) = delete;
  ~Call() {
    for (Pool::Piece& piece : memory_) pool.give(std::move(piece));
  }

  static constexpr size_t kMaxBranches = cpu::kMaxBranches;

  Call(const Tensor& x, const MapSize& size) {
    args.element = checked_element(x);
    args.convolution = forced_convolution();
    args.batch = size.n;
    args.in = args.out = size.c;
    args.height = size.h;
    args.width = size.w;
    args.x = map_of(x);
  }

  ScalarType compute_dtype() const { return mfef::compute_dtype(args.element); }

  void convolution(const ConvolutionParameters& p, int64_t out_channels, bool /*tf32*/) {
    args.split = p.split;
    args.branch_count = int(p.weights.size());
    args.out = out_channels;
    for (int i = 0; i < args.branch_count; ++i) {
      const Tensor& w = p.weights[size_t(i)];
      check_memory(w);
      Branch& branch = args.branches[i];
      static_cast<BranchShape<int64_t>&>(branch = {}) =
          p.shape<int64_t>(size_t(i), i ? &args.branches[i - 1] : nullptr, args.height, args.width);
      branch.weights = w.data_ptr();
      for (int64_t d = 0; d < 4; ++d) branch.weight_stride[d] = w.stride(d);
    }
    if (p.bias) args.bias = parameter(*p.bias);
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

  void saved(const Saved& s) {
    args.mean = s.mean.data_ptr();
    args.max = s.max.data_ptr();
    args.max_index = static_cast<int32_t*>(s.max_index.data_ptr());
    args.spatial_gate = s.spatial_gate.data_ptr();
    args.channel_index = static_cast<int32_t*>(s.channel_index.data_ptr());
    args.save = s.mean.size(0) > 0;
  }

  void forward() {
    const Kernels& k = kernels();
    const int64_t packed = choose(k, false);
    if (args.branch_count) pack(k, false, packed);
    run(k.units(args), false, [&](int64_t unit, int step, Scratch scratch) { k.forward(args, unit, step, scratch); });
  }

  void backward(const ParameterGrads& grads) {
    const Kernels& k = kernels();
    args.need_parameters = grads.need;
    const int64_t packed = choose(k, true);
    if (args.branch_count && args.grad_x.data) pack(k, true, packed);
    lay_out_partials(k);
    // The division into slots fixes the order of every sum; it depends on shape, dtype and instruction set.
    constexpr int64_t kMaxSlots = 64, kMaxBytes = int64_t(128) << 20;
    const int64_t units = k.units(args), total = args.partial.total;
    int64_t slots = units < kMaxSlots ? units : kMaxSlots;
    const int64_t affordable = kMaxBytes / (total * compute_bytes(args.element) + 1);
    if (args.need_parameters && slots > affordable) slots = affordable > 4 ? affordable : (units < 4 ? units : 4);
    args.slots = slots;
    if (args.need_parameters) {
      args.partials = allocate((slots ? slots : 1) * total);
      args.kept_x = allocate(args.kept_x_elements);
      args.kept_grad = allocate(args.kept_grad_elements);
      args.channel_sums = allocate(args.channel_sum_elements);
    }
    run(slots, true, [&](int64_t slot, int step, Scratch scratch) { k.backward(args, slot, step, scratch); });
    if (!args.need_parameters) return;
    parallel(k.channel_tasks(args), 0, [&](int64_t task, void*) { k.channel_task(args, task); });
    if (slots == 0) {
      std::memset(args.partials, 0, size_t(total * compute_bytes(args.element)));
      std::memset(args.channel_sums, 0, size_t(args.channel_sum_elements * compute_bytes(args.element)));
    }
    with_types(args.element,
               [&](auto, auto compute) { add_slots(static_cast<decltype(compute)*>(args.partials), slots, total); });
    if (grads.convolution) write(*grads.convolution);
    if (grads.attention) write(*grads.attention);
  }

  BlockArgs args{};

 private:
  void write(const ConvolutionGrads& grads) {
    for (size_t i = 0; i < grads.weights.size(); ++i) write_weights(grads.weights[i], int(i));
    if (grads.bias) write(*grads.bias, args.partial.bias);
  }
  void write(const AttentionGrads& grads) {
    write(grads.fc1_weight, args.partial.fc1_weight);
    write(grads.fc1_bias, args.partial.fc1_bias);
    // Its sums are (hidden, C): the loop that makes them runs over channels.
    const int64_t hidden = args.hidden, channels = args.out, first = args.partial.fc2_weight;
    write(grads.fc2_weight, [=](int64_t i) { return first + i % hidden * channels + i / hidden; });
    write(grads.fc2_bias, args.partial.fc2_bias);
    write(grads.spatial_weight, args.partial.spatial);
  }
  // Writes a gradient whose sums start at `first`.
  void write(const Tensor& grad, int64_t first) {
    write(grad, [first](int64_t i) { return first + i; });
  }
  // Writes a gradient whose element i, in row-major order, is the sum at(i).
  template <class At>
  void write(const Tensor& grad, const At& at) {
    with_types(args.element, [&](auto memory, auto compute) {
      const auto* sums = static_cast<const decltype(compute)*>(args.partials);
      auto* to = static_cast<decltype(memory)*>(grad.mutable_data_ptr());
      int64_t i = 0;
      for_each_element(grad, [&](int64_t offset) { to[offset] = static_cast<decltype(memory)>(sums[at(i++)]); });
    });
  }
  // Writes the gradient of a branch's weights.
  void write_weights(const Tensor& grad, int branch) {
    const Kernels& k = kernels();
    const Branch& b = args.branches[branch];
    const int64_t count = grad.numel();
    void* to = grad.mutable_data_ptr();
    const int64_t stride[4] = {grad.stride(0), grad.stride(1), grad.stride(2), grad.stride(3)};
    // empty_like() keeps the order of dense tensors and makes others contiguous: there are no gaps.
    if (b.k < b.full_k) std::memset(to, 0, size_t(count * element_bytes(args.element)));
    torch::stable::parallel_for(0, b.groups, kMinElements / (count / b.groups + 1) + 1,
                                [&](int64_t begin, int64_t end) {
                                  for (int64_t g = begin; g < end; ++g) k.read_weight_grad(args, branch, g, to, stride);
                                });
  }

  void lay_out_partials(const Kernels& k) {
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
    args.plan = choose_plan(args, k.vector_bytes / int(compute_bytes(args.element)));
    return k.choose(args, backward);
  }

  // f(i, step, scratch) for every i in [0, count): whole, or step by step where they do not go evenly into the
  // threads. The results are the same to the bit, since every step does the same in both.
  template <class F>
  void run(int64_t count, bool backward, const F& f) {
    const Kernels& k = kernels();
    const int64_t threads = torch::stable::get_num_threads();
    constexpr int64_t kMaxBytes = int64_t(256) << 20;
    // Waking threads twice costs about as much as a million multiply-adds.
    constexpr double kMinProducts = 2e6;
    double products = 0;
    for (int i = 0; i < args.branch_count; ++i) {
      const Branch& b = args.branches[i];
      products += double(b.out) * double(b.in / b.groups) * double(b.k * b.k);
    }
    products *= double(args.batch) * double(args.height) * double(args.width);
    args.staged = products >= kMinProducts && args.split && args.branch_count > 1 && count == k.units(args) &&
                  count % threads != 0 && count < 2 * threads && count * k.unit_scratch(args, backward) <= kMaxBytes;
    const int64_t unit = (k.unit_scratch(args, backward) + 63) / 64 * 64, branch = k.branch_scratch(args, backward);
    if (!args.staged) {
      parallel(count, unit + branch,
               [&](int64_t i, void* memory) { f(i, kWhole, {memory, static_cast<char*>(memory) + unit}); });
      return;
    }
    char* units = static_cast<char*>(allocate_bytes(count * unit));
    auto attention = [&] {
      parallel(count, 0, [&](int64_t i, void*) { f(i, kAttention, {units + i * unit, nullptr}); });
    };
    if (backward) attention();
    parallel(count * args.branch_count, branch, [&](int64_t i, void* memory) {
      f(i / args.branch_count, int(i % args.branch_count), {units + i / args.branch_count * unit, memory});
    });
    if (!backward) attention();
  }

  void* allocate(int64_t elements) { return allocate_bytes(elements * compute_bytes(args.element)); }
  void* allocate_bytes(int64_t bytes) {
    memory_.push_back(pool.take(bytes));
    STD_TORCH_CHECK(memory_.back().memory, "mfef: not enough memory for ", bytes, " bytes");
    return memory_.back().memory.get();
  }

  // The elements of t in the compute type, contiguous: t's own where they are that.
  const void* parameter(const Tensor& t) {
    check_memory(t);
    if (args.element == compute_element(args.element) && t.is_contiguous()) return t.data_ptr();
    void* to = allocate(t.numel());
    widen_to(t, args.element, to);
    return to;
  }

  // Weights in the order of the tiles.
  void pack(const Kernels& k, bool backward, int64_t elements) {
    void* to = allocate(elements);
    (backward ? args.packed_backward : args.packed) = to;
    constexpr int64_t kMinTasks = 4;  // fewer are not worth a thread
    torch::stable::parallel_for(0, k.pack_tasks(args, backward), kMinTasks,
                                [&](int64_t begin, int64_t end) { k.pack(args, backward, begin, end); });
  }

  std::vector<Pool::Piece> memory_;
};

}  // namespace
}  // namespace mfef::cpu

STABLE_TORCH_LIBRARY_IMPL(mfef, CPU, m) { mfef::Operators<mfef::cpu::Call>::implement(m); }
