// The bias of a tile: an entry for every key of its box and query, read from a table of offsets,
// and the sum of such entries to the gradient of the table.
//
// Tiles of equal shape have equal entries, so that few tiles need the table.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/kernels/simd.h"
#include "cpu/tile.h"

namespace jax_natten::JAX_NATTEN_TARGET {

// Calls visit(entry, index in the table) for all pairs of a tile that see each other.
template <typename Visit>
JAX_NATTEN_INLINE void for_each_bias(const Shape& shape, const Problem<kAxes>& problem,
                                     Visit&& visit) {
  int64_t stride[kAxes] = {1, 1, 1};
  for (int a = kAxes - 1; a > 0; --a) {
    stride[a - 1] = stride[a] * (2 * problem.window[a].kernel_size - 1);
  }
  const auto& [z_lanes, y_lanes, x_lanes] = shape.lanes;
  for (int l = 0; l < kTileQueries; ++l) {
    for (int z = z_lanes.begin[l]; z < z_lanes.end[l]; ++z) {
      for (int y = y_lanes.begin[l]; y < y_lanes.end[l]; ++y) {
        const int64_t row = shape.bias[l] + z * stride[0] + y * stride[1];
        for (int x = x_lanes.begin[l]; x < x_lanes.end[l]; ++x) {
          visit(shape.entry(z, y, x) * kTileQueries + l, row + x);
        }
      }
    }
  }
}

// entries = scale * table
template <typename Sum>
void read_bias(Sum* entries, const Sum* table, const Shape& shape, const Problem<kAxes>& problem,
               Sum scale) {
  std::fill_n(entries, shape.keys() * kTileQueries, Sum{0});
  for_each_bias(shape, problem,
                [&](int64_t entry, int64_t index) { entries[entry] = scale * table[index]; });
}

// table += entries
template <typename Sum>
void add_to_bias(Sum* table, const Sum* entries, const Shape& shape,
                 const Problem<kAxes>& problem) {
  for_each_bias(shape, problem,
                [&](int64_t entry, int64_t index) { table[index] += entries[entry]; });
}

}  // namespace jax_natten::JAX_NATTEN_TARGET
