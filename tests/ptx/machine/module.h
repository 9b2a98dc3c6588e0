// PTX as text and as what a warp executes: operands are register slots, branch targets indices.
#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

namespace ptx {

constexpr int kLanes = 32;

enum class Op {
  add,
  sub,
  mul,
  mad,
  fma,
  div,
  rem,
  min,
  max,
  neg,
  abs,
  and_,
  or_,
  xor_,
  not_,
  shl,
  shr,
  bfe,
  lop3,
  prmt,
  popc,
  clz,
  mov,
  selp,
  setp,
  cvt,
  cvta,
  ex2,
  rcp,
  sqrt,
  rsqrt,
  ld,
  st,
  atom,
  red,
  bra,
  ret,
  bar,
  bar_warp,
  shfl,
  vote,
  activemask,
  cp_async,
  cp_commit,
  cp_wait,
  ldmatrix,
  mma,
  fence
};

enum class Space { generic, global, shared, param };
enum class Compare { eq, ne, lt, le, gt, ge, equ, neu, ltu, leu, gtu, geu, num, nan };

// The kind is one of u, s, b, f (float), h (bfloat16 or float16), t (TF32), p (predicate).
struct Type {
  char kind = 'b';
  int bits = 32;
  bool bfloat = false;
  int count = 1;  // 2 for bf16x2 and f16x2
};

// A register of a warp. Values of less than 64 bits lie in the low half, without bits above them.
struct Register {
  alignas(32) uint32_t low[kLanes];
  alignas(32) uint32_t high[kLanes];

  uint64_t get(int lane) const { return low[lane] | uint64_t(high[lane]) << 32; }
  void set(int lane, uint64_t value) {
    low[lane] = uint32_t(value);
    high[lane] = uint32_t(value >> 32);
  }
};

template <class T, int kSize>
class Few {
 public:
  void push_back(const T& value) {
    if (size_ == kSize) throw std::runtime_error("too many operands");
    values_[size_++] = value;
  }
  int size() const { return size_; }
  T& operator[](int n) { return values_[n]; }
  const T& operator[](int n) const { return values_[n]; }
  T* begin() { return values_; }
  T* end() { return values_ + size_; }
  const T* begin() const { return values_; }
  const T* end() const { return values_ + size_; }

 private:
  T values_[kSize] = {};
  int size_ = 0;
};

struct Instruction {
  // What the lanes of a mask compute from registers alone; null where memory or other lanes take part.
  using Handler = void (*)(Register* registers, const Instruction&, uint32_t mask);
  struct Operand {
    int first, count;  // of in: a vector has several
  };

  Handler handler = nullptr;
  Op op{};
  int guard = -1;
  bool guard_not = false;
  int target = -1;
  Few<int, 4> out;  // slots; -1: none (the sink _)
  Few<int, 10> in;
  Type type, from;  // from: of the source, where it differs (cvt, mma)
  Space space = Space::generic;
  Compare compare{};
  // l, h, w: lo, hi, wide; of shfl b, i, u, d; of vote a, y (any), b; of cvt and fma the rounding n, z, m, p, a, to an
  // integer N, Z, M, P; of cp.async.wait_group g, of wait_all a; what atom and red do is in `atomic`
  char mode = ' ';
  char combine = ' ';  // a, o, x: setp.and, .or, .xor
  bool saturate = false, ftz = false, trans = false, to = false, acquire = false, release = false;
  bool uniform = false;  // of ld.param: one address for all lanes
  int vector = 1, k = 0;
  int64_t offset = 0, from_offset = 0;  // of the address; of the source of cp.async
  uint32_t in_not = 0;                  // bits: !%p
  Few<Operand, 5> operands;
  std::string atomic;
  uint8_t kind = 0;          // a Class of count.h
  int line = 0, place = -1;  // of the text; of the source in Module::places
};

// Slots 0..constants.size()-1 hold constants and special registers, the others registers.
struct Constant {
  enum class Kind { value, tid, ntid, ctaid, nctaid, laneid, warpid } kind;
  uint64_t value;
};

struct Kernel {
  std::string name;
  std::vector<Instruction> code;
  std::vector<Constant> constants;
  int slots = 0;
  int64_t param_bytes = 0, shared_bytes = 0;
  std::vector<std::array<int64_t, 2>> params;  // offset and bytes of each
  bool narrow_shared = false;                  // whether elements of less than 4 bytes are accessed in shared memory
};

// Where in the sources (-lineinfo) something is, and the call that it was inlined for, or -1.
struct Place {
  int file, line, caller;
};

struct Module {
  std::map<std::string, Kernel> kernels;
  std::vector<std::string> lines;
  std::vector<Place> places;
  std::map<int, std::string> files;
};

constexpr uint64_t kSharedWindow = uint64_t(1) << 60, kParamWindow = uint64_t(2) << 60;

// Throws std::runtime_error with the line of what it does not know.
Module parse(std::string_view text);

// Gives registers whose values are not needed at the same time one slot, and instructions their handlers.
void decode(Kernel& kernel, const std::vector<std::string>& lines);

}  // namespace ptx
