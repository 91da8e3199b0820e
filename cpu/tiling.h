// How the rows of a kernel (queries, or keys where it sums over queries) are cut into tiles: boxes
// of neighboring positions of one dilation group.
//
// The keys that a tile's queries see together are a box too. The more of them each query sees the
// better, so the box's shape is chosen by the pairs that all tiles visit.
#pragma once

#include <cstdint>

#include "cpu/problem.h"

namespace jax_natten {

// What the rows of a tile of logits are; the columns are the other.
enum class Side { kQueries, kKeys };

// Kernels know three axes; a window of fewer has leading axes of one token.
inline constexpr int kAxes = 3;

struct Tiling {
  int rank;             // axes that the frame has
  float scale;          // of the logits, in single precision
  int log_size[kAxes];  // of a tile, in positions
  int tiles[kAxes];     // along a dilation group
  double pairs;         // visited by all tiles of a head, about

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

// Rows of a dilation group.
template <Side kRows>
int64_t row_positions(const Problem<kAxes>& problem, int axis) {
  return positions(problem.window[axis], rows_along<kRows>(problem, axis));
}

// Dilation groups of an axis that have a row.
template <Side kRows>
constexpr JAX_NATTEN_HOST_DEVICE int64_t row_groups(const Problem<kAxes>& problem, int axis) {
  return geometry::min(problem.window[axis].dilation, rows_along<kRows>(problem, axis));
}

template <Side kRows>
JAX_NATTEN_HOST_DEVICE int64_t tiles_of_head(const Problem<kAxes>& problem, const Tiling& tiling) {
  int64_t result = 1;
  for (int a = 0; a < kAxes; ++a) result *= tiling.tiles[a] * row_groups<kRows>(problem, a);
  return result;
}

// How many columns a tile of rows sees together along an axis: `size` rows of a dilation group, the
// first at an array index. Exact where the arrays are the axis; one that is shorter than the other,
// as without its halo, is taken to lie in the middle.
template <Side kRows>
int64_t seen_together(const Problem<kAxes>& problem, int axis, int64_t first, int64_t size) {
  const AxisWindow& window = problem.window[axis];
  const int64_t queries = problem.query_shape[axis], keys = problem.key_shape[axis];
  const int64_t rows = rows_along<kRows>(problem, axis);
  if (first >= rows) return 0;
  const int64_t extent = geometry::max(queries, keys);
  const AxisFrame frame{extent, (extent - queries) / 2, queries, (extent - keys) / 2, keys};
  const auto seen = [&](int64_t index) {
    const int64_t coordinate = (extent - rows) / 2 + index;
    const geometry::Location row = geometry::locate(window, extent, coordinate);
    return kRows == Side::kKeys ? geometry::queries_that_see(window, frame, row)
                                : geometry::keys_seen(window, frame, row);
  };
  // What a row sees begins and ends no earlier than what the row before it sees.
  const int64_t steps = geometry::min(size, geometry::ceil_div(rows - first, window.dilation)) - 1;
  const int64_t last = first + steps * window.dilation;
  return geometry::max(seen(last).end - seen(first).begin, 0);
}

// The tiles along an axis, and what some of them, evenly spread, see together.
//
// The pairs that a shape visits are told from these, each counted as it is: tiles at borders see
// less, strides make them differ, and a tile of columns costs the same however few it holds, so
// that neither a typical box nor the mean is good enough to choose by.
struct AxisTiles {
  static constexpr int kSome = 32;

  int64_t count;  // along a dilation group
  int64_t seen[kSome];
};

template <Side kRows>
AxisTiles tiles_along(const Problem<kAxes>& problem, int axis, int64_t size) {
  const int64_t dilation = problem.window[axis].dilation;
  const int64_t groups = row_groups<kRows>(problem, axis);
  AxisTiles result{geometry::ceil_div(row_positions<kRows>(problem, axis), size), {}};
  for (int i = 0; i < AxisTiles::kSome && result.count > 0; ++i) {
    const int64_t tile = (2 * i + 1) * result.count / (2 * AxisTiles::kSome);
    const int64_t first = tile * size * dilation + i % groups;
    result.seen[i] = seen_together<kRows>(problem, axis, first, size);
  }
  return result;
}

inline constexpr int kMostLogSize = 7;  // tiles have up to 128 tokens

// Tiles of so many tokens that visit the fewest pairs, columns taken `unit` at a time. Both are
// powers of two.
template <Side kRows>
Tiling choose_tiling(const Problem<kAxes>& problem, int rank, int tokens, int unit) {
  int log_rows = 0;
  while (1 << log_rows < tokens) ++log_rows;
  AxisTiles known[kAxes][kMostLogSize + 1] = {};
  const auto along = [&](int axis, int log_size) -> const AxisTiles& {
    AxisTiles& tiles = known[axis][log_size];
    if (tiles.count == 0) tiles = tiles_along<kRows>(problem, axis, 1 << log_size);
    return tiles;
  };
  // Not half of whose rows are missing; the last axis takes what is left.
  const auto is_useful = [&](int axis, int log_size) {
    return log_size == 0 || 1 << log_size < 2 * row_positions<kRows>(problem, axis);
  };
  const auto scale = static_cast<float>(problem.scale);
  Tiling best{rank, scale, {}, {}, -1};
  for (int z = 0; z <= log_rows && is_useful(0, z); ++z) {
    for (int y = 0; y + z <= log_rows && is_useful(1, y); ++y) {
      const int x = log_rows - y - z;
      const AxisTiles* const axes[] = {&along(0, z), &along(1, y), &along(2, x)};
      Tiling tiling{rank, scale, {z, y, x}, {}, 0};
      for (int a = 0; a < kAxes; ++a) tiling.tiles[a] = static_cast<int>(axes[a]->count);
      // The tiles of a lattice: those along an axis in turn, on each axis in an order of its own.
      for (int i = 0; i < AxisTiles::kSome; ++i) {
        constexpr int kNext = 27;
        int64_t columns = 1;
        for (int a = 0, at = i; a < kAxes; ++a, at = at * kNext % AxisTiles::kSome) {
          columns *= axes[a]->seen[at];
        }
        tiling.pairs += static_cast<double>((columns + unit - 1) & -int64_t{unit});
      }
      tiling.pairs *=
          static_cast<double>(tiles_of_head<kRows>(problem, tiling) * tokens) / AxisTiles::kSome;
      // Of nearly equals the first, which has the longest rows.
      if (best.pairs < 0 || tiling.pairs < 0.99 * best.pairs) best = tiling;
    }
  }
  return best;
}

// Tiles of all samples and heads.
template <Side kRows>
int64_t tile_count(const Problem<kAxes>& problem, const Tiling& tiling) {
  return problem.samples * row_heads<kRows>(problem) * tiles_of_head<kRows>(problem, tiling);
}

}  // namespace jax_natten
