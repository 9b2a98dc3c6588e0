// The convolution tiles for double, compiled once per instruction set.
#include "conv.h"

namespace mfef::cpu::MFEF_ISA {

template <>
const ConvTable<double>& conv_table<double>() {
  static constexpr ConvTable<double> table = ConvTableMaker<double>::make();
  return table;
}

}  // namespace mfef::cpu::MFEF_ISA
