// A block's work on one tile of queries: which keys its queries see, and which tiles of keys are
// visited. The only place where these kernels meet the geometry.
//
// Windows of an axis begin and end no earlier than those of the query before, so the keys that a
// box of queries sees together are a box, and what each sees an interval of it per axis.
#pragma once

#include <climits>
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
  int key[kAxes];         // array index of the first key
  int existing[kAxes];    // keys from there that exist; what the array has beyond does not
  bool has_missing_keys;  // whether tiles reach into those
  int tiles[kAxes];       // of keys, along each axis: these are visited
  Span inner[kAxes];      // the tiles that every query sees whole
  // What the queries of each step see along each axis, one axis after the other.
  Span seen[kQueries + kAxes];

  __device__ __forceinline__ int tile_count() const { return tiles[0] * tiles[1] * tiles[2]; }
  __device__ __forceinline__ int inner_count() const {
    int count = 1;
    for (const Span& span : inner) count *= span.end - span.begin;
    return count;
  }
  __device__ __forceinline__ bool is_inner(int z, int y, int x) const {
    return inner[0].begin <= z && z < inner[0].end && inner[1].begin <= y && y < inner[1].end &&
           inner[2].begin <= x && x < inner[2].end;
  }
};

// Tiles of queries of all samples and heads.
inline int64_t count_query_tiles(const Problem<kAxes>& problem, const Shape& shape) {
  int64_t result = problem.samples * problem.heads;
  for (int a = 0; a < kAxes; ++a) {
    result *= shape.query_tiles[a] * sm80::row_groups<Side::kQueries>(problem, a);
  }
  return result;
}

// Makes the plan of the tile of queries of a number: neighbors of one head follow each other, so
// that blocks that run together share keys. All lanes of a warp.
template <int kQueries>
__device__ void make_plan(Plan<kQueries>& plan, const Problem<kAxes>& problem, const Shape& shape,
                          unsigned number) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  unsigned rest = number;
  int first[kAxes];
  for (int a = kAxes - 1; a >= 0; --a) {
    first[a] = static_cast<int>(rest % shape.query_tiles[a]) * shape.queries[a];
    rest /= shape.query_tiles[a];
  }
  for (int a = kAxes - 1; a >= 0; --a) {
    const auto groups = static_cast<unsigned>(sm80::row_groups<Side::kQueries>(problem, a));
    first[a] = first[a] * static_cast<int>(problem.window[a].dilation) +
               static_cast<int>(rest % groups);
    rest /= groups;
  }
  const int head = static_cast<int>(rest % static_cast<unsigned>(problem.heads));
  const int sample = static_cast<int>(rest / static_cast<unsigned>(problem.heads));

  bool has_missing_keys = false;
  Span* seen = plan.seen;
  for (int a = 0; a < kAxes; seen += shape.queries[a++]) {
    const AxisWindow& window = problem.window[a];
    const AxisFrame frame = frame_of(problem, shape.rank, sample, a);
    // Over the steps that see a key: the least begin and the largest end, and what all see.
    Span box = {INT_MAX, INT_MIN}, inner = {INT_MIN, INT_MAX};
    for (int step = lane; step < shape.queries[a]; step += kWarp) {
      const int64_t index = first[a] + step * window.dilation;
      geometry::Interval keys = {0, 0};
      if (geometry::exists(frame.extent, frame.query_origin, frame.query_count, index)) {
        keys = geometry::keys_seen(
            window, frame, geometry::locate(window, frame.extent, frame.query_origin + index));
      }
      const Span span = {static_cast<int>(keys.begin), static_cast<int>(keys.end)};
      seen[step] = span;
      if (span.begin >= span.end) continue;
      box = {min(box.begin, span.begin), max(box.end, span.end)};
      inner = {max(inner.begin, span.begin), min(inner.end, span.end)};
    }
    box = {__reduce_min_sync(kAllLanes, box.begin), __reduce_max_sync(kAllLanes, box.end)};
    inner = {__reduce_max_sync(kAllLanes, inner.begin), __reduce_min_sync(kAllLanes, inner.end)};
    const bool any = box.begin < box.end;
    const int begin = any ? box.begin : 0;
    for (int step = lane; step < shape.queries[a]; step += kWarp) {
      const bool sees = seen[step].begin < seen[step].end;
      seen[step] = {sees ? seen[step].begin - begin : 0, sees ? seen[step].end - begin : 0};
    }
    const int size = shape.keys[a];
    const int tiles = any ? (box.end - begin + size - 1) / size : 0;
    const int inner_begin = any ? min((inner.begin - begin + size - 1) / size, tiles) : 0;
    const int inner_end = any ? max((inner.end - begin) / size, inner_begin) : 0;

    const geometry::Location query =
        geometry::locate(window, frame.extent, frame.query_origin + first[a]);
    const geometry::Interval exist =
        geometry::existing(window, query.group, frame.key_origin, frame.key_count);
    const geometry::Interval in_array =
        geometry::existing(window, query.group, frame.key_origin, problem.key_shape[a]);
    has_missing_keys =
        has_missing_keys || geometry::min(begin + tiles * size, in_array.end) > exist.end;
    if (lane == 0) {
      plan.query[a] = first[a];
      plan.key[a] = static_cast<int>(begin * window.dilation + query.group - frame.key_origin);
      plan.existing[a] = static_cast<int>(exist.end - begin);
      plan.tiles[a] = tiles;
      plan.inner[a] = {inner_begin, inner_end};
    }
  }
  if (lane == 0) {
    plan.sample = sample;
    plan.head = head;
    plan.kv_head = head / static_cast<int>(problem.group());
    plan.has_missing_keys = has_missing_keys;
  }
}

}  // namespace jax_natten::sm90
