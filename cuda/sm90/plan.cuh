// A block's work on one tile of queries: which keys its queries see, and which tiles of keys are
// visited. The only place where these kernels meet the geometry.
//
// What a query sees along an axis begins and ends no earlier than what the query before it sees. So
// the keys that a box of queries sees together are a box, from where that of the first query begins
// to where that of the last ends, and those that all see lie from where the last begins to where
// the first ends.
//
// All this is true of a box of keys and the queries that see them, too. Where a kernel's rows are
// keys, for their gradients, keys are called queries here, and queries keys.
#pragma once

#include <cstdint>

#include "cuda/common/warp.cuh"
#include "cuda/sm90/shape.h"

namespace jax_natten::sm90 {

// Positions on an axis, counted from the first key that the block's queries see.
struct Span {
  int begin;
  int end;
};

template <int kQueries>
struct Plan {
  int sample;
  int head;
  int kv_head;
  int query[kAxes];       // array index of the first query; the next are a dilation apart
  int position[kAxes];    // and its position
  int key[kAxes];         // array index of the first key
  int begin[kAxes];       // and its position
  int existing[kAxes];    // keys from there that exist; what the array has beyond does not
  bool has_missing_keys;  // whether tiles reach into those
  int tiles[kAxes];       // of keys, along each axis: these are visited
  Span inner[kAxes];      // the tiles that every query sees whole
  // What the queries of each step see along each axis, one axis after the other.
  Span seen[kQueries + kAxes];

  __device__ __forceinline__ int tile_count() const { return tiles[0] * tiles[1] * tiles[2]; }
  // The array index of a consumer's first query.
  __device__ __forceinline__ void first_query(const Problem<kAxes>& problem, const Shape& shape,
                                              int consumer, int (&at)[kAxes]) const {
#pragma unroll
    for (int a = 0; a < kAxes; ++a) {
      const int step = a == shape.consumers_axis ? consumer << shape.log_rows[a] : 0;
      at[a] = query[a] + step * static_cast<int>(problem.window[a].dilation);
    }
  }
  // In their order in memory: neighboring blocks then want the same keys at about the same time.
  // From the middle on, where most queries see something, and around.
  template <typename Visit>
  __device__ __forceinline__ void for_each_tile(Visit&& visit) const {
    int tile[kAxes] = {tiles[0] / 2, tiles[1] / 2, tiles[2] / 2};
    for (int left = tile_count(); left > 0; --left) {
      visit(tile);
      if (++tile[2] < tiles[2]) continue;
      tile[2] = 0;
      if (++tile[1] < tiles[1]) continue;
      tile[1] = 0;
      if (++tile[0] == tiles[0]) tile[0] = 0;
    }
  }
  __device__ __forceinline__ bool is_inner(const int (&tile)[kAxes]) const {
    bool result = true;
#pragma unroll
    for (int a = 0; a < kAxes; ++a) {
      result = result && inner[a].begin <= tile[a] && tile[a] < inner[a].end;
    }
    return result;
  }
};

// Tiles of queries of all samples and heads.
template <Side kRows = Side::kQueries>
int64_t count_query_tiles(const Problem<kAxes>& problem, const Shape& shape) {
  int64_t result = problem.samples * row_heads<kRows>(problem);
  for (int a = 0; a < kAxes; ++a) {
    result *= shape.query_tiles[a] * row_groups<kRows>(problem, a);
  }
  return result;
}

// The rows of a block along one axis, as positions of a dilation group.
template <Side kRows>
struct AxisRows {
  static constexpr bool kAreKeys = kRows == Side::kKeys;
  AxisWindow window;
  AxisFrame frame;
  int64_t origin, count;                // of the rows
  int64_t column_origin, column_count;  // and of the columns
  geometry::Location first;             // of the block's box
  geometry::Interval present;           // those of the box that exist

  __device__ AxisRows(const Problem<kAxes>& problem, const Shape& shape, int sample, int axis,
                      int index)
      : window(problem.window[axis]),
        frame(frame_of(problem, shape.rank, sample, axis)),
        origin(kAreKeys ? frame.key_origin : frame.query_origin),
        count(kAreKeys ? frame.key_count : frame.query_count),
        column_origin(kAreKeys ? frame.query_origin : frame.key_origin),
        column_count(kAreKeys ? frame.query_count : frame.key_count),
        first(geometry::locate(window, frame.extent, origin + index)) {
    present = geometry::existing(window, first.group, origin, count);
    present = geometry::intersect(present, {0, first.length});
    present = geometry::intersect(present,
                                  {first.position, first.position + int64_t{shape.queries[axis]}});
  }

  // The columns that the row of a position sees.
  __device__ geometry::Interval seen(int64_t position) const {
    return columns_seen<kRows>(window, frame, {first.group, position, first.length});
  }
};

// Plans the tile of queries of a number: neighbors of one head follow each other, so that blocks
// that run together share keys. All lanes of a warp: two for each axis, of its first and of its
// last query.
//
// Blocks of long windows, which go through the planes of keys in their order in memory, follow each
// other along the first axis: those that begin at neighboring planes then run at once, and read
// each plane at about the same time. Small ones read little more than their queries, and follow
// each other as those lie in memory.
template <Side kRows = Side::kQueries, int kQueries>
__device__ void plan_tiles(Plan<kQueries>& plan, const Problem<kAxes>& problem, const Shape& shape,
                           unsigned number) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int axis = min(lane / 2, kAxes - 1);
  unsigned rest = number;
  int index = 0;  // of the axis' first query
  for (int i = 0; i < kAxes; ++i) {
    const int a = kQueries > 1 << kLogRows ? i : kAxes - 1 - i;
    const auto tiles = static_cast<unsigned>(shape.query_tiles[a]);
    if (a == axis) index = static_cast<int>(rest % tiles) * shape.queries[a];
    rest /= tiles;
  }
  index *= static_cast<int>(problem.window[axis].dilation);
  for (int a = kAxes - 1; a >= 0; --a) {
    const auto groups = static_cast<unsigned>(row_groups<kRows>(problem, a));
    if (a == axis) index += static_cast<int>(rest % groups);
    rest /= groups;
  }
  const auto heads = static_cast<unsigned>(row_heads<kRows>(problem));
  const int head = static_cast<int>(rest % heads);
  const int sample = static_cast<int>(rest / heads);

  const AxisRows<kRows> rows(problem, shape, sample, axis, index);
  const auto [from, to] = rows.present;
  const geometry::Interval keys = rows.seen(lane % 2 == 0 ? from : to - 1);
  const Span span = {static_cast<int>(keys.begin), static_cast<int>(keys.end)};
  const Span last = {__shfl_down_sync(kAllLanes, span.begin, 1),
                     __shfl_down_sync(kAllLanes, span.end, 1)};
  const bool any = from < to && span.begin < last.end;
  const int begin = any ? span.begin : 0, size = shape.keys[axis];
  const int tiles = any ? (last.end - begin + size - 1) / size : 0;
  const int inner_begin = min((last.begin - begin + size - 1) / size, tiles);
  const int inner_end = max((span.end - begin) / size, inner_begin);
  const geometry::Interval exist =
      geometry::existing(rows.window, rows.first.group, rows.column_origin, rows.column_count);
  const geometry::Interval in_array = geometry::existing(
      rows.window, rows.first.group, rows.column_origin, columns_along<kRows>(problem, axis));
  const bool has_missing = geometry::min(begin + tiles * size, in_array.end) > exist.end;
  const bool is_first = lane % 2 == 0 && lane < 2 * kAxes;
  const bool has_missing_keys = __any_sync(kAllLanes, is_first && has_missing);
  if (is_first) {
    plan.query[axis] = index;
    plan.position[axis] = static_cast<int>(rows.first.position);
    plan.key[axis] =
        static_cast<int>(begin * rows.window.dilation + rows.first.group - rows.column_origin);
    plan.begin[axis] = begin;
    plan.existing[axis] = static_cast<int>(exist.end - begin);
    plan.tiles[axis] = tiles;
    plan.inner[axis] = any ? Span{inner_begin, inner_end} : Span{0, 0};
  }
  __syncwarp();
  if (lane == 0) {
    plan.sample = sample;
    plan.head = head;
    plan.kv_head = kRows == Side::kKeys ? head : head / static_cast<int>(problem.group());
    plan.has_missing_keys = has_missing_keys;
  }
  __syncwarp();
}

// What each query of a plan sees. All lanes of a warp.
template <Side kRows = Side::kQueries, int kQueries>
__device__ void plan_windows(Plan<kQueries>& plan, const Problem<kAxes>& problem,
                             const Shape& shape) {
  const int steps[kAxes] = {shape.queries[0], shape.queries[1], shape.queries[2]};
  for (int i = static_cast<int>(threadIdx.x) % kWarp; i < steps[0] + steps[1] + steps[2];
       i += kWarp) {
    int axis = 0, step = i;
    for (int a = 0; a < kAxes - 1; ++a) {
      if (axis == a && step >= steps[a]) {
        step -= steps[a];
        axis = a + 1;
      }
    }
    const AxisRows<kRows> rows(problem, shape, plan.sample, axis, plan.query[axis]);
    const int64_t position = rows.first.position + step;
    geometry::Interval keys = {0, 0};
    if (rows.present.begin <= position && position < rows.present.end) {
      keys = rows.seen(position);
    }
    const bool sees = keys.begin < keys.end;
    plan.seen[i] = {sees ? static_cast<int>(keys.begin) - plan.begin[axis] : 0,
                    sees ? static_cast<int>(keys.end) - plan.begin[axis] : 0};
  }
}

}  // namespace jax_natten::sm90
