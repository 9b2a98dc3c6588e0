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

// The kind is one of u, s, b, f (float), h (bfloat16 or float16), p (predicate).
struct Type {
  char kind = 'b';
  int bits = 32;
  bool bfloat = false;
  int count = 1;  // 2 for bf16x2 and f16x2
};

struct Instruction {
  Op op{};
  Type type, from;  // from: of the source, where it differs (cvt, mma)
  Space space = Space::generic, to_space = Space::generic;
  Compare compare{};
  char mode =
      ' ';  // l, h, w: lo, hi, wide; of shfl b, i, u, d; of vote a, y (any), b; of cvt the rounding n, z, i, m, p, a
  char combine = ' ';  // a, o, x: setp.and, .or, .xor
  bool saturate = false, ftz = false, trans = false, to = false;
  int vector = 1, k = 0;
  int guard = -1;
  bool guard_not = false;
  int target = -1;
  int64_t offset = 0;                      // of the address
  std::vector<int> out, in;                // slots; -1: none (the sink _)
  std::vector<bool> in_not;                // !%p
  std::vector<std::array<int, 2>> groups;  // of in: where each operand begins, how many slots it has
  int line = 0;
};

// Slots 0..constants.size()-1 hold constants and special registers, the others registers.
struct Constant {
  enum class Kind { value, tid, ntid, ctaid, nctaid, laneid, warpid, lanemask } kind;
  uint64_t value;
};

struct Kernel {
  std::string name;
  std::vector<Instruction> code;
  std::vector<Constant> constants;
  int slots = 0;
  int64_t param_bytes = 0, shared_bytes = 0;
};

struct Module {
  std::map<std::string, Kernel> kernels;
  std::vector<std::string> lines;
};

constexpr uint64_t kSharedWindow = uint64_t(1) << 60, kParamWindow = uint64_t(2) << 60;

// Throws std::runtime_error with the line of what it does not know.
Module parse(std::string_view text);

}  // namespace ptx
