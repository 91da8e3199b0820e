// How the rows of a kernel (queries, or keys where it sums over queries) are cut into tiles: boxes
// of neighboring positions of one dilation group.
//
// The keys that a tile's queries see together are a box too. The more of them each query sees the
// better, so the box's shape is chosen by the pairs that all tiles visit.
#pragma once

#include <cstdint>

#include "cpu/problem.h"

namespace jax_natten::sm80 {

// What the rows of a tile of logits are; the columns are the other.
enum class Side { kQueries, kKeys };

// Kernels know three axes; a window of fewer has leading axes of one token.
inline constexpr int kAxes = 3;

struct Tiling {
  int rank;             // axes that the frame has
  float scale;          // of the logits, in single precision
  int log_size[kAxes];  // of a tile, in positions
  int tiles[kAxes];     // along a dilation group
  int64_t pairs;        // visited by all tiles of a head, about

  JAX_NATTEN_HOST_DEVICE int size(int axis) const { return 1 << log_size[axis]; }
};

template <int Rank>
Problem<kAxes> in_three_axes(const Problem<Rank>& problem) {
  constexpr int kAdded = kAxes - Rank;
  Problem<kAxes> result{};
  for (int a = 0; a < kAxes; ++a) {
    const bool added = a < kAdded;
    result.window[a] = added ? AxisWindow{1, 1, 1, false} : problem.window[a - kAdded];
    result.query_shape[a] = added ? 1 : problem.query_shape[a - kAdded];
    result.key_shape[a] = added ? 1 : problem.key_shape[a - kAdded];
  }
  result.samples = problem.samples;
  result.heads = problem.heads;
  result.heads_kv = problem.heads_kv;
  result.dim = problem.dim;
  result.value_dim = problem.value_dim;
  result.scale = problem.scale;
  result.tf32 = problem.tf32;
  result.frame = problem.frame;
  return result;
}

// The frame of an axis of one sample.
JAX_NATTEN_HOST_DEVICE inline AxisFrame frame_of(const Problem<kAxes>& problem, int rank,
                                                 int64_t sample, int axis) {
  const int a = axis - (kAxes - rank);
  if (a < 0) return {1, 0, 1, 0, 1};
  const int32_t* row = problem.frame + sample * kFrameRows * rank + a;
  return make_axis_frame(row[0], row[rank], row[2 * rank], row[3 * rank], row[4 * rank],
                         problem.query_shape[axis], problem.key_shape[axis]);
}

// Positions of an axis' dilation groups; a few are one shorter.
inline int64_t positions(const AxisWindow& window, int64_t tokens) {
  return geometry::ceil_div(tokens, window.dilation);
}

// About how many tokens the members of a tile of `size` neighboring positions see together.
inline int64_t seen_together(const AxisWindow& window, int64_t columns, int64_t size) {
  // Tiles start at multiples of their size: the leaders of a tile differ by multiples of the
  // stride, and by less than `size` rounded up to one.
  const int64_t leaders = geometry::ceil_div(size, window.stride);
  return geometry::min(window.kernel_size + (leaders - 1) * window.stride,
                       positions(window, columns));
}

template <Side kRows>
constexpr JAX_NATTEN_HOST_DEVICE int64_t rows_along(const Problem<kAxes>& problem, int axis) {
  return kRows == Side::kKeys ? problem.key_shape[axis] : problem.query_shape[axis];
}

template <Side kRows>
constexpr JAX_NATTEN_HOST_DEVICE int64_t columns_along(const Problem<kAxes>& problem, int axis) {
  return kRows == Side::kKeys ? problem.query_shape[axis] : problem.key_shape[axis];
}

template <Side kRows>
constexpr JAX_NATTEN_HOST_DEVICE int64_t row_heads(const Problem<kAxes>& problem) {
  return kRows == Side::kKeys ? problem.heads_kv : problem.heads;
}

// Dilation groups of an axis that have a row.
template <Side kRows>
constexpr JAX_NATTEN_HOST_DEVICE int64_t row_groups(const Problem<kAxes>& problem, int axis) {
  return geometry::min(problem.window[axis].dilation, rows_along<kRows>(problem, axis));
}

// Tiles of so many tokens, a power of two, that visit the fewest pairs, columns taken `unit` at a
// time.
template <Side kRows>
Tiling choose_tiling(const Problem<kAxes>& problem, int rank, int tokens, int unit) {
  int log_rows = 0;
  while (1 << log_rows < tokens) ++log_rows;
  const auto scale = static_cast<float>(problem.scale);
  Tiling best{rank, scale, {}, {}, -1};
  for (int z = 0; z <= log_rows; ++z) {
    for (int y = 0; y + z <= log_rows; ++y) {
      Tiling tiling{rank, scale, {z, y, log_rows - y - z}, {}, 0};
      int64_t visited = 1, tiles = 1;
      for (int a = 0; a < kAxes; ++a) {
        const AxisWindow& window = problem.window[a];
        const int64_t along =
            geometry::ceil_div(positions(window, rows_along<kRows>(problem, a)), tiling.size(a));
        tiling.tiles[a] = static_cast<int>(along);
        tiles *= along * row_groups<kRows>(problem, a);
        visited *= seen_together(window, columns_along<kRows>(problem, a), tiling.size(a));
      }
      tiling.pairs = tiles * geometry::ceil_div(visited, unit) * unit << log_rows;
      // Of equals the last has the longest rows.
      if (best.pairs < 0 || tiling.pairs < best.pairs) best = tiling;
    }
  }
  return best;
}

template <Side kRows>
JAX_NATTEN_HOST_DEVICE int64_t tiles_of_head(const Problem<kAxes>& problem, const Tiling& tiling) {
  int64_t result = 1;
  for (int a = 0; a < kAxes; ++a) result *= tiling.tiles[a] * row_groups<kRows>(problem, a);
  return result;
}

// Tiles of all samples and heads.
template <Side kRows>
int64_t tile_count(const Problem<kAxes>& problem, const Tiling& tiling) {
  return problem.samples * row_heads<kRows>(problem) * tiles_of_head<kRows>(problem, tiling);
}

}  // namespace jax_natten::sm80
