// bfloat16 and float16.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

namespace ptx {

inline float widen(uint16_t bits, bool bfloat) {
  if (bfloat) return std::bit_cast<float>(uint32_t(bits) << 16);
  return float(std::bit_cast<_Float16>(bits));
}

// To the nearest, ties to even, in one step.
inline uint16_t narrow(double value, bool bfloat) {
  if (!bfloat) return std::bit_cast<uint16_t>(_Float16(value));
  if (std::isnan(value)) return 0x7fff;
  float nearest = float(value);
  uint32_t bits = std::bit_cast<uint32_t>(nearest);
  // Of what float32 cannot hold a last bit that is 1 remembers that there was something.
  if (double(nearest) != value && !std::isinf(nearest)) {
    if (std::fabs(double(nearest)) > std::fabs(value)) --bits;
    bits |= 1;
  }
  return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

}  // namespace ptx
