// The Python module jax_natten._cpu: the FFI handlers as capsules, the FFI version that they were
// built with, the instruction sets that they serve, and the geometry of one axis for tests.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <array>
#include <cstdint>
#include <string>
#include <vector>

#include "cpu/blocks.h"
#include "cpu/geometry.h"
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
    nb::list slots;
    for (int64_t m = 0; m < queries.count; ++m) {
      slots.append(slot_of_key(axis.window, axis.frame, queries.first + m * queries.step, j));
    }
    result.append(nb::make_tuple(queries.first, queries.count, queries.step, slots, queries.bias));
  }
  return result;
}

template <int Rank>
double visited_pairs_of(const std::vector<int64_t>& spatial,
                        const std::vector<int64_t>& kernel_size, int64_t dilation) {
  Problem<Rank> problem{};
  for (int a = 0; a < Rank; ++a) {
    problem.window[a] = {kernel_size[a], 1, dilation, false};
    problem.query_shape[a] = problem.key_shape[a] = spatial[a];
  }
  problem.samples = problem.heads = problem.heads_kv = 1;
  return choose_blocks(in_three_axes(problem), Rank, 1).tiling.pairs;
}

// Pairs of a query and a key whose logits the kernels compute for one head, those that don't see
// each other included.
double visited_pairs(const std::vector<int64_t>& spatial, const std::vector<int64_t>& kernel_size,
                     int64_t dilation) {
  if (kernel_size.size() != spatial.size()) throw nb::value_error("need an entry for each axis");
  switch (spatial.size()) {
    case 1:
      return visited_pairs_of<1>(spatial, kernel_size, dilation);
    case 2:
      return visited_pairs_of<2>(spatial, kernel_size, dilation);
    case 3:
      return visited_pairs_of<3>(spatial, kernel_size, dilation);
    default:
      throw nb::value_error("need one to three axes");
  }
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
  m.def("keys_of_queries", &jax_natten::keys_of_queries, "kernel_size"_a, "stride"_a, "dilation"_a,
        "is_causal"_a, "frame"_a, "query_size"_a, "key_size"_a);
  m.def("queries_of_keys", &jax_natten::queries_of_keys, "kernel_size"_a, "stride"_a, "dilation"_a,
        "is_causal"_a, "frame"_a, "query_size"_a, "key_size"_a);
}
