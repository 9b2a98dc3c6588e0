// The operators of one instruction set, compiled once per instruction set: the table that isa.cpp
// chooses from.
#include "cpu/block_images.h"
#include "cpu/block_pixels.h"

namespace mfef::cpu::MFEF_ISA {

namespace {

// Calls f with a value of the element type and one of the compute type.
template <class F>
MFEF_INLINE auto with_types(Element element, const F& f) {
  switch (element) {
    case Element::kBFloat16:
      return f(BFloat16{}, float{});
    case Element::kDouble:
      return f(double{}, double{});
    case Element::kFloat:
    case Element::kHalf:  // ops_cpu.cpp refuses it
      return f(float{}, float{});
  }
  __builtin_unreachable();
}

int64_t choose(BlockArgs& a, bool backward) {
  return with_types(a.element, [&](auto, auto t) {
    using T = decltype(t);
    int64_t count = 0;
    for (int i = 0; i < a.branch_count; ++i) {
      Branch& b = a.branches[i];
      b.fft_size = choose_fft<T>(a, b);
      b.fft_gradient = backward && b.fft_size && choose_fft_gradient<T>(a, b);
      b.packed_first = count;
      const auto shape = branch_shape<T>(a, b, backward);
      count += b.fft_size ? fft_packed_elements(shape, b.fft_size) : shape.weight_count();
    }
    return count;
  });
}

// f(branch, its shape, begin, end) for the packing tasks of each branch in [begin, end), which are counted over all
// branches. Returns the number of all tasks.
template <class T, class F>
MFEF_INLINE int64_t for_pack_tasks(const BlockArgs& a, bool backward, int64_t begin, int64_t end, const F& f) {
  int64_t first = 0;
  for (int i = 0; i < a.branch_count; ++i) {
    const Branch& b = a.branches[i];
    const auto shape = branch_shape<T>(a, b, backward);
    const int64_t tasks = b.fft_size ? fft_pack_tasks(shape, b.fft_size) : shape.groups * tiles_per_group(shape);
    if (first < end && first + tasks > begin) f(b, shape, max<int64_t>(0, begin - first), min(tasks, end - first));
    first += tasks;
  }
  return first;
}

int64_t pack_tasks(const BlockArgs& a, bool backward) {
  return with_types(a.element, [&](auto, auto t) {
    return for_pack_tasks<decltype(t)>(a, backward, 0, 0, [](auto&, auto&, int64_t, int64_t) {});
  });
}

void pack(const BlockArgs& a, bool backward, int64_t begin, int64_t end) {
  with_types(a.element, [&](auto e, auto t) {
    using T = decltype(t);
    for_pack_tasks<T>(a, backward, begin, end,
                      [&](const Branch& b, const ConvShape<T>& shape, int64_t from, int64_t until) {
                        const WeightView<const decltype(e)> view(shape, backward, b);
                        T* to = static_cast<T*>(backward ? a.packed_backward : a.packed) + b.packed_first;
                        if (b.fft_size) {
                          fft_pack(shape, *fft_table<T>(a.height, b.k), backward, view, to, from, until);
                        } else {
                          pack_weights(shape, view, to, from, until);
                        }
                      });
  });
}

int64_t units(const BlockArgs& a) {
  if (a.plan == Plan::kPixels) return a.batch;
  return divide_up(a.batch, kVectorBytes / compute_bytes(a.element));
}

int64_t lay_out(BlockArgs& a) {
  return with_types(a.element, [&](auto, auto t) {
    using T = decltype(t);
    const int64_t blocks = units(a);
    int64_t conv = 0;
    a.kept_x_elements = a.kept_grad_elements = a.channel_sum_elements = 0;
    for (int i = 0; i < a.branch_count; ++i) {
      Branch& b = a.branches[i];
      const auto shape = gradient_shape<T>(a, b);
      b.by_channels = !b.fft_gradient && weight_grad_by_channels(shape);
      int64_t& sums = b.by_channels ? a.channel_sum_elements : conv;
      b.grad_first = sums;
      sums += round_up(b.fft_gradient ? fft_grad_elements(shape) : weight_grad_elements(shape), 16);
      if (!b.by_channels) continue;
      b.kept_x_first = a.kept_x_elements;
      b.kept_grad_first = a.kept_grad_elements;
      a.kept_x_elements += blocks * b.in * shape.channel;
      a.kept_grad_elements += blocks * kLanes<T> * a.height * a.width * channel_row<T>(b.out);
    }
    return conv;
  });
}

// f(branch, its shape, task within the branch) for a task counted over all branches. Returns the number of all tasks.
template <class T, class F>
MFEF_INLINE int64_t for_channel_task(const BlockArgs& a, int64_t task, const F& f) {
  int64_t first = 0;
  for (int i = 0; i < a.branch_count; ++i) {
    if (!a.branches[i].by_channels) continue;
    const auto shape = gradient_shape<T>(a, a.branches[i]);
    const int64_t tasks = shape.groups * channel_blocks_out(shape) * channel_blocks_in(shape);
    if (task >= first && task < first + tasks) f(a.branches[i], shape, task - first);
    first += tasks;
  }
  return first;
}

int64_t channel_tasks(const BlockArgs& a) {
  return with_types(a.element,
                    [&](auto, auto t) { return for_channel_task<decltype(t)>(a, -1, [](auto&, auto&, int64_t) {}); });
}

void channel_task(const BlockArgs& a, int64_t task) {
  with_types(a.element, [&](auto, auto t) {
    using T = decltype(t);
    for_channel_task<T>(a, task, [&](const Branch& b, const ConvShape<T>& shape, int64_t at) {
      weight_grad_channels<T>(shape, at, a.batch, static_cast<const T*>(a.kept_x) + b.kept_x_first,
                              static_cast<const T*>(a.kept_grad) + b.kept_grad_first,
                              static_cast<T*>(a.channel_sums) + b.grad_first);
    });
  });
}

void read_weight_grad(const BlockArgs& a, int branch, int64_t group, void* to, const int64_t stride[4]) {
  with_types(a.element, [&](auto e, auto t) {
    using T = decltype(t);
    using E = decltype(e);
    const Branch& b = a.branches[branch];
    const T* sums =
        b.by_channels ? static_cast<const T*>(a.channel_sums) : static_cast<const T*>(a.partials) + a.partial.conv;
    const auto shape = gradient_shape<T>(a, b);
    const WeightView<E> grads(shape, false, static_cast<E*>(to), b.full_k, stride);
    auto read = b.fft_gradient ? read_fft_grad<T, E> : MFEF_ISA::read_weight_grad<T, E>;
    read(shape, sums + b.grad_first, group, grads);
  });
}

// The block of the plan, with its element and compute types.
template <class F>
MFEF_INLINE auto with_block(const BlockArgs& a, Scratch scratch, bool backward, const F& f) {
  return with_types(a.element, [&](auto e, auto t) {
    using T = decltype(t);
    if (a.plan == Plan::kImages) {
      BlockImages<T> block(a, scratch, backward);
      return f(block, e, t);
    }
    BlockPixels<T> block(a, scratch, backward);
    return f(block, e, t);
  });
}

int64_t unit_scratch(const BlockArgs& a, bool backward) {
  return with_block(a, {}, backward, [](auto& block, auto, auto) { return block.carver.used; });
}
int64_t branch_scratch(const BlockArgs& a, bool backward) {
  return with_block(a, {}, backward, [](auto& block, auto, auto) { return block.branch_carver.used; });
}

void forward(const BlockArgs& a, int64_t unit, int step, Scratch scratch) {
  with_block(a, scratch, false, [&](auto& block, auto e, auto) { block.template forward<decltype(e)>(unit, step); });
}

void backward(const BlockArgs& a, int64_t slot, int step, Scratch scratch) {
  with_block(a, scratch, true, [&](auto& block, auto e, auto t) {
    using T = decltype(t);
    T* partials = static_cast<T*>(a.partials) + slot * a.partial.total;
    if (step == kWhole || step == kAttention) {
      for (int64_t i = 0; i < a.partial.total && a.need_parameters; ++i) partials[i] = T(0);
    }
    const int64_t count = units(a);
    for (int64_t unit = slot * count / a.slots; unit < (slot + 1) * count / a.slots; ++unit) {
      block.template backward<decltype(e)>(unit, step, partials);
    }
  });
}

// Twelve chains per port keep two multiply-add units busy at a latency of four to six cycles.
int64_t fma_chain(int64_t iterations) {
  constexpr int kChains = kRegisters == 32 ? 24 : 12;
  Vec<float> acc[kChains];
  for (int i = 0; i < kChains; ++i) acc[i] = splat(float(i));
  Vec<float> a = splat(0.999f), b = splat(0.001f);
  for (int64_t i = 0; i < iterations; ++i) {
    __asm__ volatile("" : "+x"(a), "+x"(b));
    static_for<kChains>([&]<int j>() { acc[j] = acc[j] * a + b; });
  }
  Vec<float> sum{};
  for (int i = 0; i < kChains; ++i) sum += acc[i];
  volatile float keep = sum_of_lanes<float>(sum);
  (void)keep;
  return iterations * kChains * kLanes<float> * 2;
}

}  // namespace

#define MFEF_STRING_(x) #x
#define MFEF_STRING(x) MFEF_STRING_(x)

extern const Kernels kKernels;
const Kernels kKernels = {
    .name = MFEF_STRING(MFEF_ISA),
    .vector_bytes = kVectorBytes,
    .choose = choose,
    .pack_tasks = pack_tasks,
    .pack = pack,
    .lay_out = lay_out,
    .channel_tasks = channel_tasks,
    .channel_task = channel_task,
    .read_weight_grad = read_weight_grad,
    .units = units,
    .unit_scratch = unit_scratch,
    .branch_scratch = branch_scratch,
    .forward = forward,
    .backward = backward,
    .fma_chain = fma_chain,
};

}  // namespace mfef::cpu::MFEF_ISA
