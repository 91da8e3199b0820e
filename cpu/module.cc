// The Python module jax_natten._cpu: the FFI handlers as capsules, the FFI version that they were
// built with, the instruction sets that they serve, and for tests the geometry of one axis and the
// choice of tiles.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <array>
#include <cstdint>
#include <string>
#include <vector>

#include "cpu/blocks.h"
#include "cpu/geometry.h"
#include "cpu/problem_from.h"
#include "cpu/registrations.h"
#include "cpu/targets.h"

namespace nb = nanobind;

namespace jax_natten {
namespace {

// The geometry functions take (kernel_size, stride, dilation, is_causal), the frame's column
// (extent, query origin, query count, key origin, key count), and the arrays' sizes.
struct Axis {
  AxisWindow window;
  AxisFrame frame;
};

Axis axis_from(int64_t kernel_size, int64_t stride, int64_t dilation, bool is_causal,
               const nb::sequence& frame, int64_t query_size, int64_t key_size) {
  if (kernel_size < 1 || stride < 1 || stride > kernel_size || dilation < 1) {
    throw nb::value_error("need kernel_size >= 1, 1 <= stride <= kernel_size, dilation >= 1");
  }
  const auto row = [&](int index) { return nb::cast<int64_t>(frame[index]); };
  return {{kernel_size, stride, dilation, is_causal},
          make_axis_frame(row(0), row(1), row(2), row(3), row(4), query_size, key_size)};
}

// Per query (first key, count, step, slot of the first, bias index of the first).
nb::list keys_of_queries(int64_t kernel_size, int64_t stride, int64_t dilation, bool is_causal,
                         const nb::sequence& frame, int64_t query_size, int64_t key_size) {
  const Axis axis =
      axis_from(kernel_size, stride, dilation, is_causal, frame, query_size, key_size);
  nb::list result;
  for (int64_t i = 0; i < query_size; ++i) {
    const AxisNeighbors keys = keys_of_query(axis.window, axis.frame, i);
    result.append(nb::make_tuple(keys.first, keys.count, keys.step, keys.slot, keys.bias));
  }
  return result;
}

// Per key (first query, count, step, slots by query, bias index of the first); from one query to
// the next the bias index falls by one.
nb::list queries_of_keys(int64_t kernel_size, int64_t stride, int64_t dilation, bool is_causal,
                         const nb::sequence& frame, int64_t query_size, int64_t key_size) {
  const Axis axis =
      axis_from(kernel_size, stride, dilation, is_causal, frame, query_size, key_size);
  nb::list result;
  for (int64_t j = 0; j < key_size; ++j) {
    const AxisNeighbors queries = queries_of_key(axis.window, axis.frame, j);
    const geometry::Location key =
        geometry::locate(axis.window, axis.frame.extent, axis.frame.key_origin + j);
    nb::list slots;
    for (int64_t m = 0; m < queries.count; ++m) {
      slots.append(slot_of_key(axis.window, key, queries, m));
    }
    result.append(nb::make_tuple(queries.first, queries.count, queries.step, slots, queries.bias));
  }
  return result;
}

bool is_power_of_two(int value) { return value > 0 && (value & (value - 1)) == 0; }

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

// Pairs of a query and a key whose logits the CPU kernels compute for one head, those that don't
// see each other included.
double visited_pairs(const Entries& spatial, const Entries& kernel_size, int64_t dilation) {
  const size_t rank = spatial.size();
  const Problem<kAxes> problem =
      problem_from(spatial, spatial, kernel_size, Entries(rank, 1), Entries(rank, dilation),
                   std::vector<bool>(rank, false));
  return choose_blocks(problem, static_cast<int>(rank), 1).tiling.pairs;
}

}  // namespace
}  // namespace jax_natten

NB_MODULE(_cpu, m) {
  using namespace nanobind::literals;
  jax_natten::define_registrations(m);
  const std::string target = jax_natten::name_of(jax_natten::target());
  m.def("target", [target] { return target; });
  m.def("available_targets", &jax_natten::available_targets);
  m.def("visited_pairs", &jax_natten::visited_pairs, "spatial"_a, "kernel_size"_a, "dilation"_a);
  m.def("tiling", &jax_natten::tiling, "query_shape"_a, "key_shape"_a, "kernel_size"_a, "stride"_a,
        "dilation"_a, "is_causal"_a, "rows_are_keys"_a, "tokens"_a, "columns"_a);
  m.def("seen_together", &jax_natten::columns_seen, "query_size"_a, "key_size"_a, "kernel_size"_a,
        "stride"_a, "dilation"_a, "is_causal"_a, "rows_are_keys"_a, "first"_a, "size"_a);
  m.def("keys_of_queries", &jax_natten::keys_of_queries, "kernel_size"_a, "stride"_a, "dilation"_a,
        "is_causal"_a, "frame"_a, "query_size"_a, "key_size"_a);
  m.def("queries_of_keys", &jax_natten::queries_of_keys, "kernel_size"_a, "stride"_a, "dilation"_a,
        "is_causal"_a, "frame"_a, "query_size"_a, "key_size"_a);
}
