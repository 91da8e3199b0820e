// Which logits a block computes. Its rows are a tile of queries and its columns the keys that they
// see, or its rows are a tile of keys and its columns the queries that see them. The columns of the
// rows together are a box, and a row's own are an interval of it per axis.
#pragma once

#include <climits>
#include <cstdint>

#include "cpu/tiling.h"
#include "cuda/sm80/columns.cuh"
#include "cuda/sm80/copy.cuh"

namespace jax_natten::sm80 {

// Positions on one axis, as small as they are used: all fit in an int32.
struct Span {
  int begin;
  int end;

  __device__ int count() const { return max(end - begin, 0); }
};

// A tile of rows.
struct TileIndex {
  int first[kAxes];  // array indices of its first token; the next are a dilation apart
  int64_t head;      // of the rows' own heads
  int64_t sample;
};

// The tiles of a head are numbered one after the other.
template <Side kRows>
__device__ TileIndex tile_index(const Problem<kAxes>& problem, const Tiling& tiling,
                                unsigned number) {
  TileIndex result;
  unsigned rest = number;
  unsigned tile[kAxes];
  for (int a = kAxes - 1; a >= 0; --a) {
    tile[a] = rest % tiling.tiles[a];
    rest /= tiling.tiles[a];
  }
  for (int a = kAxes - 1; a >= 0; --a) {
    const auto dilation = static_cast<unsigned>(problem.window[a].dilation);
    const auto groups = static_cast<unsigned>(row_groups<kRows>(problem, a));
    result.first[a] = static_cast<int>((tile[a] << tiling.log_size[a]) * dilation + rest % groups);
    rest /= groups;
  }
  const auto heads = static_cast<unsigned>(row_heads<kRows>(problem));
  result.head = rest % heads;
  result.sample = rest / heads;
  return result;
}

// Fused arrays are token-major, and the entries that pairs share are those of a table of offsets;
// unfused arrays have heads first, and every pair has an entry of its own, its slot.
//
// A pair's entry is a sum over the axes: the steps from a reference, which is kernel_size - 1 less
// than the query's position, or the begin of its window. Each side has its share of the sum,
// counted from the box's begin.
enum class Family { kFused, kUnfused };

inline constexpr int kSlots = 3;  // planned tiles of columns

// The plan, in shared memory.
template <int kRows, int kColumns>
struct Plan {
  alignas(16) int32_t row[kRows];     // number of its row in the arrays, or kNoRow
  alignas(16) int32_t source[kRows];  // the same, and kNoRow where nothing is to be read
  RowSpan span[kRows];
  int32_t row_entry[kRows];  // its share of the entry of a pair
  int seen[kRows];           // how many columns it sees
  ColumnList list;
  Cursor next[kColumns];  // of the next tile
  // Of the columns of several tiles in turn.
  alignas(16) int32_t column[kSlots][kColumns];
  alignas(16) uint32_t place[kSlots][kColumns];
  int32_t column_entry[kSlots][kColumns];
  // Over the rows, on each axis: the least begin, the largest end, and what all rows see.
  Span box[kAxes];
  Span inner[kAxes];
  // Where columns are not evenly spaced in their entries: the shares of an axis' positions.
  const int* starts;

  __device__ int tiles() const { return (list.size + kColumns - 1) / kColumns; }

  // Plans the next tile of columns in a slot. True where the thread's column is not one that all
  // rows see.
  template <bool kHasStarts>
  __device__ bool advance(int slot) {
    const int thread = static_cast<int>(threadIdx.x);
    if (thread >= kColumns) return false;
    Cursor cursor = next[thread];
    const bool exists = cursor.number < list.size;
    const uint32_t here = exists ? cursor.column.place : list.guard;
    place[slot][thread] = here;
    column[slot][thread] = exists ? cursor.column.row : kNoRow;
    column_entry[slot][thread] = cursor.column.entry;
    if constexpr (kHasStarts) {
      if (exists) {
        int entry = 0;
        for (int a = 0, begin = 0; a < kAxes; begin += list.count[a++]) {
          entry += starts[begin + cursor.at[a]];
        }
        column_entry[slot][thread] = entry;
      }
    }
    list.advance(cursor, kColumns);
    next[thread] = cursor;
    return !sees(list.inner, here, list.guard);
  }
};

// Where a row's share of an entry is counted from.
template <Family kFamily, Side kSide>
__device__ int64_t reference_of(const AxisWindow& window, const geometry::Location& row) {
  if constexpr (kFamily == Family::kFused) {
    return kSide == Side::kKeys ? row.position + window.kernel_size - 1
                                : row.position - window.kernel_size + 1;
  } else if constexpr (kSide == Side::kKeys) {
    return row.position;
  } else {
    return geometry::window_of(window, row.length, row.position).begin;
  }
}

// Makes the plan. All threads of the block; ends with a barrier. `starts` is memory for the shares
// of columns whose slots are not evenly spaced, those of queries.
template <Family kFamily, Side kSide, int kRows, int kColumns>
__device__ void make_plan(Plan<kRows, kColumns>& plan, const Problem<kAxes>& problem,
                          const Tiling& tiling, const TileIndex& tile, int* starts = nullptr) {
  static_assert(kRows <= kThreads && kColumns <= kThreads);
  constexpr bool kIsFused = kFamily == Family::kFused, kRowsAreKeys = kSide == Side::kKeys;
  constexpr bool kHasStarts = !kIsFused && kRowsAreKeys;
  const int thread = static_cast<int>(threadIdx.x);
  if (thread < kAxes) {
    plan.box[thread] = {INT_MAX, INT_MIN};
    plan.inner[thread] = {INT_MIN, INT_MAX};
  }
  __syncthreads();

  Span span[kAxes];
  int reference[kAxes];
  geometry::Location location[kAxes];
  int64_t origin[kAxes];
  bool exists = thread < kRows;
  int64_t token = 0;
  for (int a = 0; a < kAxes; ++a) {
    const AxisWindow& window = problem.window[a];
    const AxisFrame frame = frame_of(problem, tiling.rank, tile.sample, a);
    const int64_t row_origin = kRowsAreKeys ? frame.key_origin : frame.query_origin;
    const int64_t row_count = kRowsAreKeys ? frame.key_count : frame.query_count;
    const int64_t rows = rows_along<kSide>(problem, a);
    int shift = 0;
    for (int b = a + 1; b < kAxes; ++b) shift += tiling.log_size[b];
    const int step = thread >> shift & (tiling.size(a) - 1);
    const int64_t index = tile.first[a] + step * window.dilation;
    exists = exists && index < rows;
    token = token * rows + index;
    span[a] = {0, 0};
    location[a] = geometry::locate(window, frame.extent, row_origin + index);
    if (geometry::exists(frame.extent, row_origin, row_count, index)) {
      const auto [begin, end] = kRowsAreKeys
                                    ? geometry::queries_that_see(window, frame, location[a])
                                    : geometry::keys_seen(window, frame, location[a]);
      span[a] = {static_cast<int>(begin), static_cast<int>(end)};
    }
    reference[a] = static_cast<int>(reference_of<kFamily, kSide>(window, location[a]));
    // Of the columns: array index = position * dilation + origin.
    origin[a] = location[a].group - (kRowsAreKeys ? frame.query_origin : frame.key_origin);
  }
  int seen = exists ? 1 : 0;
  for (const Span& axis : span) seen *= axis.count();
  for (int a = 0; a < kAxes; ++a) {
    const Span least = {seen == 0 ? INT_MAX : span[a].begin, seen == 0 ? INT_MAX : span[a].end};
    const Span most = {seen == 0 ? INT_MIN : span[a].begin, seen == 0 ? INT_MIN : span[a].end};
    // A row that sees nothing has nothing in common with the others.
    const int last_begin = exists && seen == 0 ? INT_MAX : most.begin;
    const int box_begin = __reduce_min_sync(kAllLanes, least.begin);
    const int box_end = __reduce_max_sync(kAllLanes, most.end);
    const int inner_begin = __reduce_max_sync(kAllLanes, last_begin);
    const int inner_end = __reduce_min_sync(kAllLanes, least.end);
    if (lane() == 0) {
      atomicMin(&plan.box[a].begin, box_begin);
      atomicMax(&plan.box[a].end, box_end);
      atomicMax(&plan.inner[a].begin, inner_begin);
      atomicMin(&plan.inner[a].end, inner_end);
    }
  }
  __syncthreads();

  ColumnList list;
  list.size = 1;
  list.guard = 0;
  list.inner = {0, 0};
  int64_t tokens = 1, entry = 1;
  int64_t first = 0, row_entry = 0;
  uint32_t fields = 0;
  RowSpan row_span = {0, 0};
  for (int a = kAxes - 1; a >= 0; --a) {
    const AxisWindow& window = problem.window[a];
    const Span box = plan.box[a], inner = plan.inner[a];
    const int count = box.begin == INT_MAX ? 0 : box.count();
    list.count[a] = count;
    list.size *= count;
    list.one[a].row = static_cast<int>(tokens * window.dilation);
    first += tokens * (box.begin * window.dilation + origin[a]);
    tokens *= columns_along<kSide>(problem, a);

    list.one[a].entry = static_cast<int>(kRowsAreKeys ? -entry : entry);
    const int64_t steps = int64_t{box.begin} - reference[a];
    row_entry += (kRowsAreKeys ? -steps : steps) * entry;
    entry *= kIsFused ? 2 * window.kernel_size - 1 : window.kernel_size;

    const auto shift = fields;
    list.one[a].place = 1u << shift;
    fields += 33 - __clz(count + 1);
    list.guard |= 1u << (fields - 1);
    // An interval that nothing is in: from count + 1 to 0.
    const auto add = [&](RowSpan& span, bool any, int begin, int end) {
      span.low |= static_cast<uint32_t>(any ? begin - box.begin + 1 : count + 1) << shift;
      span.high |= static_cast<uint32_t>(any ? end - box.begin : 0) << shift;
    };
    add(row_span, seen > 0, span[a].begin, span[a].end);
    add(list.inner, inner.begin < inner.end, inner.begin, inner.end);
  }
  row_span.high += 2 * list.guard;
  list.inner.high += 2 * list.guard;

  if (thread < kRows) {
    const int64_t row_tokens = kRowsAreKeys ? problem.keys() : problem.queries();
    const int64_t row =
        kIsFused ? token * row_heads<kSide>(problem) + tile.head : tile.head * row_tokens + token;
    plan.row[thread] = exists ? static_cast<int32_t>(row) : kNoRow;
    plan.source[thread] = seen > 0 ? static_cast<int32_t>(row) : kNoRow;
    plan.span[thread] = row_span;
    plan.row_entry[thread] = static_cast<int32_t>(row_entry);
    plan.seen[thread] = seen;
  }

  // The columns of a key's gradients go through the heads that share it.
  const int64_t group = problem.group();
  const int64_t first_head = kRowsAreKeys ? tile.head * group : tile.head / group;
  if constexpr (kRowsAreKeys) list.size *= static_cast<int>(group);
  const int64_t heads = kRowsAreKeys ? problem.heads : problem.heads_kv;
  const auto token_rows = static_cast<int>(kIsFused ? heads : 1);
  const auto head_rows = static_cast<int>(kIsFused ? 1 : tokens);
  uint32_t first_place = list.guard;
  for (Column& one : list.one) {
    one.row *= token_rows;
    first_place += one.place;
  }
  list.head = {head_rows, 0, static_cast<int>(kIsFused ? entry : 0)};
  list.first = {static_cast<int>(first) * token_rows + static_cast<int>(first_head) * head_rows,
                first_place, 0};
  list.set_step(kColumns);
  if constexpr (kHasStarts) {
    for (int a = 0, begin = 0; a < kAxes; begin += list.count[a++]) {
      for (int i = thread; i < list.count[a]; i += kThreads) {
        const int position = plan.box[a].begin;
        const int64_t start =
            geometry::window_of(problem.window[a], location[a].length, position + i).begin;
        starts[begin + i] = static_cast<int>(start - position) * list.one[a].entry;
      }
    }
  }
  if (thread < kColumns) plan.next[thread] = list.at(thread);
  if (thread == 0) {
    plan.list = list;
    plan.starts = starts;
  }
  __syncthreads();
}

}  // namespace jax_natten::sm80
