// What every native backend knows of a call, as plain data: element types, maps, the shape of a branch. No tensors and
// no standard library: the kernels of every instruction set and of every GPU read it.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define MFEF_HD __host__ __device__ __forceinline__
#else
#define MFEF_HD inline
#endif

namespace mfef {

// The types that a map or a parameter is stored in. Switches over it have no default, so that the compiler names every
// place that a new one needs (-Werror=switch).
enum class Element : int { kFloat, kBFloat16, kHalf, kDouble };

MFEF_HD constexpr int64_t element_bytes(Element e) {
  switch (e) {
    case Element::kBFloat16:
    case Element::kHalf:
      return 2;
    case Element::kFloat:
      return 4;
    case Element::kDouble:
      return 8;
  }
  return 0;
}

// Sums and everything between two maps are in float, and in double for double.
MFEF_HD constexpr Element compute_element(Element e) {
  switch (e) {
    case Element::kFloat:
    case Element::kBFloat16:
    case Element::kHalf:
      return Element::kFloat;
    case Element::kDouble:
      return Element::kDouble;
  }
  return e;
}
MFEF_HD constexpr int64_t compute_bytes(Element e) { return element_bytes(compute_element(e)); }

// No count of elements that the kernels multiply on (by lanes, bytes, taps) may come near the limits of 64 bits: of no
// tensor, the batch included, nor of an image where the batch is empty. A tensor can claim any size without having the
// memory: expanded tensors repeat one element.
constexpr int64_t kMaxElements = int64_t(1) << 40;

// A 4-D map in memory; strides in elements, in the order n, c, h, w. Null data: absent.
struct Map {
  void* data;
  int64_t stride[4];
};

// Taps per side of a k x k kernel that can meet a map: farther out there is no pixel, wherever the kernel stands. A
// 9 x 9 kernel has 3 x 3 of them on 2 x 2 pixels.
MFEF_HD constexpr int64_t live_taps(int64_t k, int64_t height, int64_t width) {
  const int64_t side = height > width ? height : width;
  return side > 0 && k > 2 * side - 1 ? 2 * side - 1 : k;
}

// A branch of the convolution. Int is int where its products are known to be small, as in kernel parameters.
template <class Int>
struct BranchShape {
  Int in_first, in;    // channel range of x
  Int out_first, out;  // channel range of y
  Int groups;
  Int full_k;  // taps per side in memory
  Int k;       // live ones; those around them meet no pixel

  MFEF_HD Int in_per_group() const { return in / groups; }
  MFEF_HD Int out_per_group() const { return out / groups; }
  bool operator==(const BranchShape&) const = default;

  // The branch behind `before` (null: the first): of divided channels it reads the next ones, else all of them.
  static BranchShape after(const BranchShape* before, bool split, int64_t in, int64_t out, int64_t groups, int64_t k,
                           int64_t height, int64_t width) {
    return {before && split ? before->in_first + before->in : 0,
            Int(in),
            before ? before->out_first + before->out : 0,
            Int(out),
            Int(groups),
            Int(k),
            Int(live_taps(k, height, width))};
  }
};

}  // namespace mfef
