// Sums over queries into arrays of keys, in the accumulation type.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "cpu/kernels/rows.h"
#include "cpu/number.h"
#include "cpu/sums.h"

namespace jax_natten::JAX_NATTEN_TARGET {

// Where a result is summed: in its own place where its type allows.
template <typename Element>
Tensor<Accumulator<Element>> sums_of(const Tensor<Element>& result,
                                     const Tensor<Accumulator<Element>>& sums) {
  if constexpr (std::is_same_v<Element, Accumulator<Element>>) {
    return result;
  } else {
    return sums;
  }
}

// What precedes the sums.
template <typename T>
Phase clear_keys(const Problem<kAxes>& problem, const Tensor<T>& sums, int64_t channels) {
  return over_range(size_of_keys(problem, channels), [=](int64_t begin, int64_t end) {
    std::fill(sums.data + begin, sums.data + end, T{0});
  });
}

// What follows them.
template <typename Element>
Job narrow_keys(const Problem<kAxes>& problem, const Tensor<Element>& result,
                const Tensor<Accumulator<Element>>& sums, int64_t channels) {
  if constexpr (std::is_same_v<Element, Accumulator<Element>>) {
    return {};
  } else {
    return {over_range(size_of_keys(problem, channels), [=](int64_t begin, int64_t end) {
      const Rows<Accumulator<Element>> row{sums.data + begin, end - begin, kPanel};
      unpack_row(result.data + begin, row, 0, Accumulator<Element>{1});
    })};
  }
}

// to += scale * rows, of the keys of a block.
template <typename Sum>
void add_keys(const typename Tensor<Sum>::Head& to, const Rows<Sum>& rows, const BlockView& block,
              Sum scale) {
  constexpr int64_t kAhead = 16;
  const std::vector<int64_t>& tokens = block.key_tokens();
  for (int64_t i = 0; i < block.keys(); ++i) {
    prefetch_row<Fetch::kWrite>(to.row(tokens[std::min(i + kAhead, block.keys() - 1)]),
                                rows.channels);
    add_row(to.row(tokens[i]), rows, i, scale);
  }
}

}  // namespace jax_natten::JAX_NATTEN_TARGET
