// The transforms, compiled once per instruction set.
#include "cpu/conv/fft_transform.h"

namespace mfef::cpu::MFEF_ISA {

namespace {

template <class T>
const FftTable<T>* find(int64_t side, int64_t k) {
  const int64_t min_length = side + k / 2;
  const FftTable<T>* best = nullptr;
  auto offer = [&](int64_t of_side, const FftTable<T>& table) {
    if (of_side == side && table.n >= min_length && (!best || table.n < best->n)) best = &table;
  };
  offer(7, kFftTable<T, 8, 7>);
  offer(7, kFftTable<T, 9, 7>);
  offer(7, kFftTable<T, 10, 7>);
  offer(7, kFftTable<T, 12, 7>);
  offer(8, kFftTable<T, 9, 8>);
  offer(8, kFftTable<T, 10, 8>);
  offer(8, kFftTable<T, 12, 8>);
  offer(14, kFftTable<T, 16, 14>);
  offer(14, kFftTable<T, 18, 14>);
  offer(16, kFftTable<T, 18, 16>);
  offer(16, kFftTable<T, 20, 16>);
  return best;
}

}  // namespace

template <>
const FftTable<float>* fft_table<float>(int64_t side, int64_t k) {
  return find<float>(side, k);
}
template <>
const FftTable<double>* fft_table<double>(int64_t side, int64_t k) {
  return find<double>(side, k);
}

}  // namespace mfef::cpu::MFEF_ISA
