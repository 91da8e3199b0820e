// The Python module jax_natten._cuda: the FFI handlers as capsules, the FFI version that they were
// built with, and the choice of tiles for tests.
#include <nanobind/nanobind.h>
#include <nanobind/stl/vector.h>

#include <cstddef>
#include <cstdint>
#include <vector>

#include "cpu/registrations.h"
#include "cpu/tiling.h"

namespace nb = nanobind;

namespace jax_natten {
namespace {

// One entry for each axis.
using Entries = std::vector<int64_t>;

bool is_power_of_two(int value) { return value > 0 && (value & (value - 1)) == 0; }

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

Problem<kAxes> problem_from(const Entries& query_shape, const Entries& key_shape,
                            const Entries& kernel_size, const Entries& stride,
                            const Entries& dilation, const std::vector<bool>& is_causal) {
  const size_t rank = query_shape.size();
  for (const size_t size :
       {key_shape.size(), kernel_size.size(), stride.size(), dilation.size(), is_causal.size()}) {
    if (size != rank) throw nb::value_error("need an entry for each axis");
  }
  std::vector<AxisWindow> window;
  for (size_t a = 0; a < rank; ++a) {
    if (stride[a] < 1 || stride[a] > kernel_size[a] || dilation[a] < 1) {
      throw nb::value_error("need 1 <= stride <= kernel_size, dilation >= 1");
    }
    if (query_shape[a] < 0 || key_shape[a] < 0) throw nb::value_error("need sizes >= 0");
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
      throw nb::value_error("need one to three axes");
  }
}

// (log_size, tiles, pairs) of the tiles that choose_tiling takes, the first two with three axes.
nb::tuple tiling(const Entries& query_shape, const Entries& key_shape, const Entries& kernel_size,
                 const Entries& stride, const Entries& dilation, const std::vector<bool>& is_causal,
                 bool rows_are_keys, int tokens, int columns) {
  if (!is_power_of_two(tokens) || tokens > 1 << kMostLogSize || !is_power_of_two(columns)) {
    throw nb::value_error("need powers of two, and a tile of rows that is not too large");
  }
  const Problem<kAxes> problem =
      problem_from(query_shape, key_shape, kernel_size, stride, dilation, is_causal);
  const int rank = static_cast<int>(query_shape.size());
  const Tiling tiling = rows_are_keys
                            ? choose_tiling<Side::kKeys>(problem, rank, tokens, columns)
                            : choose_tiling<Side::kQueries>(problem, rank, tokens, columns);
  const auto axes = [](const int (&of)[kAxes]) { return nb::make_tuple(of[0], of[1], of[2]); };
  return nb::make_tuple(axes(tiling.log_size), axes(tiling.tiles), tiling.pairs);
}

// How many columns a tile of rows sees together along an axis.
int64_t columns_seen(int64_t query_size, int64_t key_size, int64_t kernel_size, int64_t stride,
                     int64_t dilation, bool is_causal, bool rows_are_keys, int64_t first,
                     int64_t size) {
  const Problem<kAxes> problem =
      problem_from({query_size}, {key_size}, {kernel_size}, {stride}, {dilation}, {is_causal});
  constexpr int kLast = kAxes - 1;
  return rows_are_keys ? seen_together<Side::kKeys>(problem, kLast, first, size)
                       : seen_together<Side::kQueries>(problem, kLast, first, size);
}

}  // namespace
}  // namespace jax_natten

NB_MODULE(_cuda, m) {
  using namespace nanobind::literals;
  jax_natten::define_registrations(m);
  m.def("tiling", &jax_natten::tiling, "query_shape"_a, "key_shape"_a, "kernel_size"_a, "stride"_a,
        "dilation"_a, "is_causal"_a, "rows_are_keys"_a, "tokens"_a, "columns"_a);
  m.def("seen_together", &jax_natten::columns_seen, "query_size"_a, "key_size"_a, "kernel_size"_a,
        "stride"_a, "dilation"_a, "is_causal"_a, "rows_are_keys"_a, "first"_a, "size"_a);
}
