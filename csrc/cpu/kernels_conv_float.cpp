// The convolution tiles for float, compiled once per instruction set.
#include "conv.h"

namespace mfef::cpu::MFEF_ISA {

template <>
const ConvTable<float>& conv_table<float>() {
  static constexpr ConvTable<float> table = ConvTableMaker<float>::make();
  return table;
}

}  // namespace mfef::cpu::MFEF_ISA
