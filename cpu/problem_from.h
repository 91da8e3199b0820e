// A problem of one head as Python gives it, for tests of what the host decides. Only the Python
// modules include this.
#pragma once

#include <nanobind/nanobind.h>

#include <cstddef>
#include <cstdint>
#include <vector>

#include "cpu/problem.h"
#include "cpu/tiling.h"

namespace jax_natten {

// One entry for each axis.
using Entries = std::vector<int64_t>;

template <int Rank>
Problem<kAxes> problem_of(const std::vector<AxisWindow>& window, const Entries& query_shape,
                          const Entries& key_shape) {
  Problem<Rank> problem{};
  for (int a = 0; a < Rank; ++a) {
    problem.window[a] = window[a];
    problem.query_shape[a] = query_shape[a];
    problem.key_shape[a] = key_shape[a];
  }
  problem.samples = problem.heads = problem.heads_kv = 1;
  return in_three_axes(problem);
}

inline Problem<kAxes> problem_from(const Entries& query_shape, const Entries& key_shape,
                                   const Entries& kernel_size, const Entries& stride,
                                   const Entries& dilation, const std::vector<bool>& is_causal) {
  const size_t rank = query_shape.size();
  for (const size_t size :
       {key_shape.size(), kernel_size.size(), stride.size(), dilation.size(), is_causal.size()}) {
    if (size != rank) throw nanobind::value_error("need an entry for each axis");
  }
  std::vector<AxisWindow> window;
  for (size_t a = 0; a < rank; ++a) {
    if (stride[a] < 1 || stride[a] > kernel_size[a] || dilation[a] < 1) {
      throw nanobind::value_error("need 1 <= stride <= kernel_size, dilation >= 1");
    }
    if (query_shape[a] < 0 || key_shape[a] < 0) throw nanobind::value_error("need sizes >= 0");
    window.push_back({kernel_size[a], stride[a], dilation[a], is_causal[a]});
  }
  switch (rank) {
    case 1:
      return problem_of<1>(window, query_shape, key_shape);
    case 2:
      return problem_of<2>(window, query_shape, key_shape);
    case 3:
      return problem_of<3>(window, query_shape, key_shape);
    default:
      throw nanobind::value_error("need one to three axes");
  }
}

}  // namespace jax_natten
