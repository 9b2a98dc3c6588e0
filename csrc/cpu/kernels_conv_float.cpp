// The convolution tiles for float, compiled once per instruction set.
#include "cpu/conv/tiles.h"

namespace mfef::cpu::MFEF_ISA {

template <>
const ConvTable<float>& conv_table<float>() {
  static constexpr ConvTable<float> table = make_conv_table<float>();
  return table;
}

}  // namespace mfef::cpu::MFEF_ISA
