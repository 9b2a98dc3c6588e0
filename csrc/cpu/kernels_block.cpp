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
    default:
      return f(float{}, float{});
  }
}

int64_t packed_elements(const BlockArgs& a) {
  int64_t count = 0;
  for (int i = 0; i < a.branch_count; ++i) {
    const Branch& b = a.branches[i];
    count += b.out * (b.in / b.groups) * b.k * b.k;
  }
  return count;
}

int64_t packed_tiles(const BlockArgs& a, bool backward) {
  return with_types(a.element, [&](auto, auto t) {
    int64_t count = 0;
    for (int i = 0; i < a.branch_count; ++i) {
      const auto map = branch_map<decltype(t)>(a, a.branches[i], backward);
      count += map.groups * tiles_per_group(map);
    }
    return count;
  });
}

void prepare(const BlockArgs& a, bool backward, int64_t begin, int64_t end) {
  with_types(a.element, [&](auto, auto t) {
    using T = decltype(t);
    int64_t first = 0;
    for (int i = 0; i < a.branch_count && first < end; ++i) {
      const Branch& b = a.branches[i];
      const auto map = branch_map<T>(a, b, backward);
      const int64_t tiles = map.groups * tiles_per_group(map);
      if (first + tiles > begin) {
        pack_weights<T>(map, backward, static_cast<const T*>(b.weights),
                        static_cast<T*>(backward ? a.packed_backward : a.packed) + b.weight_first,
                        most<int64_t>(0, begin - first), least(tiles, end - first));
      }
      first += tiles;
    }
  });
}

int64_t branch_grad_elements(const BlockArgs& a, int branch) {
  return with_types(a.element, [&](auto, auto t) {
    return weight_grad_elements(branch_map<decltype(t)>(a, a.branches[branch], false));
  });
}

void read_branch_grad(const BlockArgs& a, int branch, int64_t group, void* to) {
  with_types(a.element, [&](auto, auto t) {
    using T = decltype(t);
    const Branch& b = a.branches[branch];
    read_weight_grad(branch_map<T>(a, b, false), static_cast<const T*>(a.partials) + a.partial.conv + b.grad_first,
                     group, static_cast<T*>(to));
  });
}

int64_t units(const BlockArgs& a) {
  if (a.plan == Plan::kPixels) return a.batch;
  const int lanes = a.element == Element::kDouble ? kLanes<double> : kLanes<float>;
  return (a.batch + lanes - 1) / lanes;
}

int64_t scratch_bytes(const BlockArgs& a, bool backward) {
  return with_types(a.element, [&](auto, auto t) {
    using T = decltype(t);
    return a.plan == Plan::kImages ? BlockImages<T>(a, nullptr, backward).carver.used
                                   : BlockPixels<T>(a, nullptr, backward).carver.used;
  });
}
int64_t forward_scratch(const BlockArgs& a) { return scratch_bytes(a, false); }
int64_t backward_scratch(const BlockArgs& a) { return scratch_bytes(a, true); }

// The block of the plan, with its element and compute types.
template <class F>
MFEF_INLINE void with_block(const BlockArgs& a, void* scratch, bool backward, const F& f) {
  with_types(a.element, [&](auto e, auto t) {
    using T = decltype(t);
    if (a.plan == Plan::kImages) {
      BlockImages<T> block(a, scratch, backward);
      f(block, e, t);
    } else {
      BlockPixels<T> block(a, scratch, backward);
      f(block, e, t);
    }
  });
}

void forward(const BlockArgs& a, int64_t begin, int64_t end, void* scratch) {
  with_block(a, scratch, false, [&](auto& block, auto e, auto) {
    for (int64_t unit = begin; unit < end; ++unit) block.template forward<decltype(e)>(unit);
  });
}

void backward(const BlockArgs& a, int64_t slot, void* scratch) {
  with_block(a, scratch, true, [&](auto& block, auto e, auto t) {
    using T = decltype(t);
    T* partials = static_cast<T*>(a.partials) + slot * a.partial.total;
    for (int64_t i = 0; i < a.partial.total && a.need_parameters; ++i) partials[i] = T(0);
    const int64_t count = units(a);
    for (int64_t unit = slot * count / a.slots; unit < (slot + 1) * count / a.slots; ++unit) {
      block.template backward<decltype(e)>(unit, partials);
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
    static_for<kChains>([&](auto j) { acc[decltype(j)::value] = acc[decltype(j)::value] * a + b; });
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
    MFEF_STRING(MFEF_ISA),
    kVectorBytes,
    packed_elements,
    packed_tiles,
    prepare,
    branch_grad_elements,
    read_branch_grad,
    units,
    forward_scratch,
    backward_scratch,
    forward,
    backward,
    fma_chain,
};

}  // namespace mfef::cpu::MFEF_ISA
