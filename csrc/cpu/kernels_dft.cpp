// The Fourier transforms, compiled once per instruction set.
#include "dft.h"

namespace mfef::cpu::MFEF_ISA {

namespace {

template <class T>
const DftTable<T>* find(int64_t side, int64_t k) {
  const int64_t least_length = side + k / 2;
  const DftTable<T>* best = nullptr;
  auto offer = [&](int64_t of_side, const DftTable<T>& table) {
    if (of_side == side && table.n >= least_length && (!best || table.n < best->n)) best = &table;
  };
  offer(7, kDft<T, 8, 7>);
  offer(7, kDft<T, 9, 7>);
  offer(7, kDft<T, 10, 7>);
  offer(7, kDft<T, 12, 7>);
  offer(8, kDft<T, 9, 8>);
  offer(8, kDft<T, 10, 8>);
  offer(8, kDft<T, 12, 8>);
  offer(14, kDft<T, 16, 14>);
  offer(14, kDft<T, 18, 14>);
  offer(16, kDft<T, 18, 16>);
  offer(16, kDft<T, 20, 16>);
  return best;
}

}  // namespace

template <>
const DftTable<float>* dft_table<float>(int64_t side, int64_t k) {
  return find<float>(side, k);
}
template <>
const DftTable<double>* dft_table<double>(int64_t side, int64_t k) {
  return find<double>(side, k);
}

}  // namespace mfef::cpu::MFEF_ISA
