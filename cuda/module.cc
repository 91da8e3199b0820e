// The Python module jax_natten._cuda: the FFI handlers as capsules, the FFI version that they were
// built with, and for tests what the host decides: which calls the Hopper kernels serve, and in
// which shapes.
#include <nanobind/nanobind.h>
#include <nanobind/stl/vector.h>

#include <cstdint>
#include <vector>

#include "cpu/problem_from.h"
#include "cpu/registrations.h"
#include "cuda/sm90/backward_choices.h"

namespace nb = nanobind;

namespace jax_natten {
namespace {

#ifdef JAX_NATTEN_HAS_SM90
constexpr bool kHasHopper = true;
#else
constexpr bool kHasHopper = false;
#endif

// Whether the dispatcher takes the Hopper kernels for a forward or a backward call of half types
// where there is a Hopper GPU.
bool hopper_serves(const Entries& query_shape, const Entries& key_shape, const Entries& kernel_size,
                   const Entries& stride, const Entries& dilation,
                   const std::vector<bool>& is_causal, int64_t samples, int64_t dim,
                   int64_t value_dim, double scale, bool has_bias, bool is_backward) {
  Problem<kAxes> problem =
      problem_from(query_shape, key_shape, kernel_size, stride, dilation, is_causal);
  problem.samples = samples;
  problem.dim = dim;
  problem.value_dim = value_dim;
  problem.scale = scale;
  const auto rank = static_cast<int>(query_shape.size());
  if (!kHasHopper) return false;
  return is_backward ? sm90::choose_backward(problem, rank, has_bias).is_served()
                     : sm90::choose(problem, rank, has_bias).kernel >= 0;
}

// (queries, keys, cost) of the shape that the Hopper kernels choose, the first two with three axes.
nb::tuple hopper_shape(const Entries& query_shape, const Entries& key_shape,
                       const Entries& kernel_size, const Entries& stride, const Entries& dilation,
                       const std::vector<bool>& is_causal, int consumers, int keys,
                       const std::vector<double>& costs) {
  if (consumers < 1 || consumers > sm90::kMostConsumers || keys < sm90::kRun ||
      keys % sm90::kRun != 0 || costs.size() != 3) {
    throw nb::value_error("need consumers, runs of keys, and three costs");
  }
  const Problem<kAxes> problem =
      problem_from(query_shape, key_shape, kernel_size, stride, dilation, is_causal);
  sm90::KnownBlocks<> blocks(problem);
  const sm90::Shape shape = sm90::choose_shape(blocks, static_cast<int>(query_shape.size()),
                                               consumers, keys, {costs[0], costs[1], costs[2]});
  const auto axes = [](const int (&of)[kAxes]) { return nb::make_tuple(of[0], of[1], of[2]); };
  return nb::make_tuple(axes(shape.queries), axes(shape.keys), shape.cost);
}

// How many tiles of columns blocks of rows visit along an axis, and how many of them are seen
// whole: of keys by queries, or of queries by keys.
nb::tuple hopper_tiles(int64_t query_size, int64_t key_size, int64_t kernel_size, int64_t stride,
                       int64_t dilation, bool is_causal, int rows, int columns,
                       bool rows_are_keys) {
  if (rows < 1 || columns < 1) throw nb::value_error("need rows and columns");
  const Problem<kAxes> problem =
      problem_from({query_size}, {key_size}, {kernel_size}, {stride}, {dilation}, {is_causal});
  const auto count = [&](auto blocks) {
    const sm90::TileCounts tiles = blocks.tiles(columns);
    return nb::make_tuple(tiles.all, tiles.inner);
  };
  return rows_are_keys ? count(sm90::AxisBlocks<Side::kKeys>(problem, kAxes - 1, rows))
                       : count(sm90::AxisBlocks<Side::kQueries>(problem, kAxes - 1, rows));
}

}  // namespace
}  // namespace jax_natten

NB_MODULE(_cuda, m) {
  using namespace nanobind::literals;
  jax_natten::define_registrations(m);
  m.def("hopper_serves", &jax_natten::hopper_serves, "query_shape"_a, "key_shape"_a,
        "kernel_size"_a, "stride"_a, "dilation"_a, "is_causal"_a, "samples"_a, "dim"_a,
        "value_dim"_a, "scale"_a, "has_bias"_a, "is_backward"_a);
  m.def("hopper_shape", &jax_natten::hopper_shape, "query_shape"_a, "key_shape"_a, "kernel_size"_a,
        "stride"_a, "dilation"_a, "is_causal"_a, "consumers"_a, "keys"_a, "costs"_a);
  m.def("hopper_tiles", &jax_natten::hopper_tiles, "query_size"_a, "key_size"_a, "kernel_size"_a,
        "stride"_a, "dilation"_a, "is_causal"_a, "rows"_a, "columns"_a, "rows_are_keys"_a);
}
