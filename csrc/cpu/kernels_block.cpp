// The operators of one instruction set, compiled once per instruction set: the table that isa.cpp
// chooses from.
#include "block_images.h"
#include "block_pixels.h"

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
      b.spectrum = choose_spectrum<T>(a, b);
      b.spectral_weights = backward && b.spectrum && choose_spectral_weights<T>(a, b);
      b.packed_first = count;
      const auto map = branch_map<T>(a, b, backward);
      count +=
          b.spectrum ? map.groups * (packed_spectra_group(map, b.spectrum) + guard_group(map)) : map.weight_count();
    }
    return count;
  });
}

template <class T>
MFEF_INLINE int64_t packed_pieces(const Branch& b, const ConvMap<T>& map) {
  return b.spectrum ? map.groups + spectrum_blocks(map, b.spectrum) : map.groups * tiles_per_group(map);
}

int64_t packed_tiles(const BlockArgs& a, bool backward) {
  return with_types(a.element, [&](auto, auto t) {
    int64_t count = 0;
    for (int i = 0; i < a.branch_count; ++i) {
      count += packed_pieces(a.branches[i], branch_map<decltype(t)>(a, a.branches[i], backward));
    }
    return count;
  });
}

void prepare(const BlockArgs& a, bool backward, int64_t begin, int64_t end) {
  with_types(a.element, [&](auto e, auto t) {
    using T = decltype(t);
    int64_t first = 0;
    for (int i = 0; i < a.branch_count && first < end; ++i) {
      const Branch& b = a.branches[i];
      const auto map = branch_map<T>(a, b, backward);
      const int64_t tiles = packed_pieces(b, map);
      if (first + tiles > begin) {
        const auto* weights = static_cast<const decltype(e)*>(b.weights);
        T* to = static_cast<T*>(backward ? a.packed_backward : a.packed) + b.packed_first;
        const int64_t from = most<int64_t>(0, begin - first), until = least(tiles, end - first);
        if (b.spectrum) {
          weigh_inputs<T>(map, b.spectrum, backward, weights, b.full_k, b.weight_stride,
                          to + map.groups * packed_spectra_group(map, b.spectrum), from, least(until, map.groups));
          pack_spectra<T>(map, *dft_table<T>(a.height, b.k), backward, weights, b.full_k, b.weight_stride, to,
                          most<int64_t>(0, from - map.groups), until - map.groups);
        } else {
          pack_weights<T>(map, backward, weights, b.full_k, b.weight_stride, to, from, until);
        }
      }
      first += tiles;
    }
  });
}

int64_t units(const BlockArgs& a) {
  if (a.plan == Plan::kPixels) return a.batch;
  const int lanes = a.element == Element::kDouble ? kLanes<double> : kLanes<float>;
  return (a.batch + lanes - 1) / lanes;
}

int64_t lay_out(BlockArgs& a) {
  return with_types(a.element, [&](auto, auto t) {
    using T = decltype(t);
    const int64_t blocks = units(a);
    int64_t conv = 0;
    a.kept_x_elements = a.kept_grad_elements = a.channel_sum_elements = 0;
    for (int i = 0; i < a.branch_count; ++i) {
      Branch& b = a.branches[i];
      const auto map = gradient_map<T>(a, b);
      b.by_channels = !b.spectral_weights && weight_grad_by_channels(map);
      int64_t& sums = b.by_channels ? a.channel_sum_elements : conv;
      b.grad_first = sums;
      sums += round_up(b.spectral_weights ? spectra_grad_elements(map) : weight_grad_elements(map), 16);
      if (!b.by_channels) continue;
      b.kept_x_first = a.kept_x_elements;
      b.kept_grad_first = a.kept_grad_elements;
      a.kept_x_elements += blocks * b.in * map.channel;
      a.kept_grad_elements += blocks * kLanes<T> * a.height * a.width * channel_row<T>(b.out);
    }
    return conv;
  });
}

// f(branch, task within the branch) for a task counted over all branches.
template <class F>
MFEF_INLINE int64_t for_channel_task(const BlockArgs& a, int64_t task, const F& f) {
  return with_types(a.element, [&](auto, auto t) {
    using T = decltype(t);
    int64_t first = 0;
    for (int i = 0; i < a.branch_count; ++i) {
      if (!a.branches[i].by_channels) continue;
      const auto map = gradient_map<T>(a, a.branches[i]);
      const int64_t tasks = map.groups * channel_blocks_out(map) * channel_blocks_in(map);
      if (task >= first && task < first + tasks) f(a.branches[i], map, task - first, t);
      first += tasks;
    }
    return first;
  });
}

int64_t channel_tasks(const BlockArgs& a) {
  return for_channel_task(a, -1, [](auto&, auto&, int64_t, auto) {});
}

void channel_task(const BlockArgs& a, int64_t task) {
  for_channel_task(a, task, [&](const Branch& b, const auto& map, int64_t at, auto t) {
    using T = decltype(t);
    weight_grad_channels<T>(map, at, a.batch, static_cast<const T*>(a.kept_x) + b.kept_x_first,
                            static_cast<const T*>(a.kept_grad) + b.kept_grad_first,
                            static_cast<T*>(a.channel_sums) + b.grad_first);
  });
}

void read_branch_grad(const BlockArgs& a, int branch, int64_t group, void* to, const int64_t stride[4]) {
  with_types(a.element, [&](auto e, auto t) {
    using T = decltype(t);
    using E = decltype(e);
    const Branch& b = a.branches[branch];
    const T* sums =
        b.by_channels ? static_cast<const T*>(a.channel_sums) : static_cast<const T*>(a.partials) + a.partial.conv;
    auto read = b.spectral_weights ? read_spectra_grad<T, E> : read_weight_grad<T, E>;
    read(gradient_map<T>(a, b), sums + b.grad_first, group, b.full_k, static_cast<E*>(to), stride);
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
    // in the order of block.h
    MFEF_STRING(MFEF_ISA), kVectorBytes, choose,       packed_tiles,   prepare, lay_out,  channel_tasks, channel_task,
    read_branch_grad,      units,        unit_scratch, branch_scratch, forward, backward, fma_chain,
};

}  // namespace mfef::cpu::MFEF_ISA
