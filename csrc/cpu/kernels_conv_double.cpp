// The convolution tiles for double, compiled once per instruction set.
#include "cpu/conv/tiles.h"

namespace mfef::cpu::MFEF_ISA {

template <>
const ConvTable<double>& conv_table<double>() {
  static constexpr ConvTable<double> table = make_conv_table<double>();
  return table;
}

}  // namespace mfef::cpu::MFEF_ISA
