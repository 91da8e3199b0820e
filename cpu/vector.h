// Loops over rows, the arithmetic that everything else spends its time in.
//
// One operand of every product is in the accumulation type, the other as it lies in memory. A sum
// is kept in a fixed number of independent lanes: compilers may vectorise it without reordering
// any addition, so results don't depend on the vector width.
#pragma once

#include <cstdint>

#include "cpu/number.h"

namespace jax_natten {

template <typename Element>
Accumulator<Element> dot(const Accumulator<Element>* __restrict__ a, const Element* __restrict__ b,
                         int64_t n) {
  using Sum = Accumulator<Element>;
  constexpr int kLanes = 8;
  Sum lane[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int l = 0; l < kLanes; ++l) lane[l] += a[i + l] * widen(b[i + l]);
  }
  Sum rest = 0;
  for (; i < n; ++i) rest += a[i] * widen(b[i]);
  return ((lane[0] + lane[4]) + (lane[2] + lane[6])) + ((lane[1] + lane[5]) + (lane[3] + lane[7])) +
         rest;
}

// y += a * x
template <typename Element>
void add_scaled(Accumulator<Element>* __restrict__ y, Accumulator<Element> a,
                const Element* __restrict__ x, int64_t n) {
  for (int64_t i = 0; i < n; ++i) y[i] += a * widen(x[i]);
}

template <typename Element>
void load_row(Accumulator<Element>* __restrict__ y, const Element* __restrict__ x, int64_t n) {
  for (int64_t i = 0; i < n; ++i) y[i] = widen(x[i]);
}

// y = a * x
template <typename Element>
void store_scaled(Element* __restrict__ y, Accumulator<Element> a,
                  const Accumulator<Element>* __restrict__ x, int64_t n) {
  for (int64_t i = 0; i < n; ++i) y[i] = narrow(a * x[i], Element{});
}

template <typename T>
void fill_row(T* y, T value, int64_t n) {
  for (int64_t i = 0; i < n; ++i) y[i] = value;
}

}  // namespace jax_natten
