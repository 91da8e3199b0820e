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

// A row's place on one axis.
struct alignas(16) Step {
  int32_t index;      // in the array, or kNoRow
  int32_t reference;  // of its share of an entry, see Family
  Span span;          // of columns that it sees
};

// What the steps of an axis have in common.
struct AxisPlan {
  Span box;        // the least begin and the largest end of what they see
  Span inner;      // what all see
  int64_t origin;  // of the columns: array index = position * dilation + origin
  int64_t length;  // of the dilation group
};

// The plan, in shared memory.
template <int kRows, int kColumns>
struct Plan {
  static constexpr int kAtOnce = kThreads / kColumns;  // tiles that are planned at once
  static_assert(kAtOnce * kColumns == kThreads && kAtOnce > 1);

  Step step[kRows + kAxes - 1];  // those of all axes in turn; a row has one of each
  AxisPlan axis[kAxes];
  alignas(16) int32_t row[kRows];     // number of its row in the arrays, or kNoRow
  alignas(16) int32_t source[kRows];  // the same, and kNoRow where nothing is to be read
  RowSpan span[kRows];
  int32_t row_entry[kRows];  // its share of the entry of a pair
  int seen[kRows];           // how many columns it sees
  ColumnList list;
  // Of the columns of some tiles, and of those planned before them; see begin_of.
  alignas(16) int32_t column[2 * kThreads];
  alignas(16) uint32_t place[2 * kThreads];
  alignas(16) int32_t column_entry[2 * kThreads];
  uint32_t unseen[2 * kThreads / kWarp];  // a bit for each: some row does not see it
  // Where columns are not evenly spaced in their entries: the shares of an axis' positions.
  const int* starts;

  __device__ int tiles() const { return (list.size + kColumns - 1) / kColumns; }

  // Where the columns of a tile are.
  static __device__ int begin_of(int tile) { return tile * kColumns % (2 * kThreads); }

  // Whether some row does not see some of the kCount columns that begin there.
  template <int kCount>
  __device__ bool is_rim(int begin) const {
    if constexpr (kCount < kWarp) {
      return (unseen[begin / kWarp] >> begin % kWarp & ((1u << kCount) - 1)) != 0;
    } else {
      uint32_t any = 0;
#pragma unroll
      for (int i = 0; i < kCount / kWarp; ++i) any |= unseen[begin / kWarp + i];
      return any != 0;
    }
  }

  // Plans kAtOnce tiles, a column a thread.
  template <bool kHasStarts>
  __device__ void plan_tiles(int first_tile) {
    const auto thread = static_cast<int>(threadIdx.x);
    const int number = first_tile * kColumns + thread, i = begin_of(first_tile) + thread;
    ListedColumn here{{kNoRow, list.guard, 0}, {}};
    if (number < list.size) {
      here = list.at(number);
      if constexpr (kHasStarts) {
        here.column.entry = 0;
        for (int a = 0, begin = 0; a < kAxes; begin += list.count[a++]) {
          here.column.entry += starts[begin + here.at[a]];
        }
      }
    }
    column[i] = here.column.row;
    place[i] = here.column.place;
    column_entry[i] = here.column.entry;
    const bool is_unseen = !sees(list.inner, here.column.place, list.guard);
    const uint32_t mask = __ballot_sync(kAllLanes, is_unseen);
    if (lane() == 0) unseen[i / kWarp] = mask;
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

// Plans an axis and its steps, `size` of them. All lanes of a warp.
template <Family kFamily, Side kSide>
__device__ void plan_axis(AxisPlan& plan, Step* steps, int size, const Problem<kAxes>& problem,
                          int rank, const TileIndex& tile, int axis) {
  constexpr bool kRowsAreKeys = kSide == Side::kKeys;
  const AxisWindow& window = problem.window[axis];
  const AxisFrame frame = frame_of(problem, rank, tile.sample, axis);
  const int64_t row_origin = kRowsAreKeys ? frame.key_origin : frame.query_origin;
  const int64_t row_count = kRowsAreKeys ? frame.key_count : frame.query_count;
  const int64_t rows = rows_along<kSide>(problem, axis);
  int first = tile.first[0];
#pragma unroll
  for (int a = 1; a < kAxes; ++a) first = a == axis ? tile.first[a] : first;

  Span box = {INT_MAX, INT_MIN}, inner = {INT_MIN, INT_MAX};
  geometry::Location location{};
  for (int i = lane(); i < size; i += kWarp) {
    const int64_t index = first + i * window.dilation;
    location = geometry::locate(window, frame.extent, row_origin + index);
    Span span = {0, 0};
    if (geometry::exists(frame.extent, row_origin, row_count, index)) {
      const auto [begin, end] = kRowsAreKeys ? geometry::queries_that_see(window, frame, location)
                                             : geometry::keys_seen(window, frame, location);
      span = {static_cast<int>(begin), static_cast<int>(end)};
    }
    const bool exists = index < rows, sees_any = span.begin < span.end;
    steps[i] = {exists ? static_cast<int32_t>(index) : kNoRow,
                static_cast<int32_t>(reference_of<kFamily, kSide>(window, location)), span};
    if (exists && sees_any) box = {min(box.begin, span.begin), max(box.end, span.end)};
    // A row that sees nothing has nothing in common with the others.
    if (exists)
      inner = {max(inner.begin, sees_any ? span.begin : INT_MAX), min(inner.end, span.end)};
  }
  box = {__reduce_min_sync(kAllLanes, box.begin), __reduce_max_sync(kAllLanes, box.end)};
  inner = {__reduce_max_sync(kAllLanes, inner.begin), __reduce_min_sync(kAllLanes, inner.end)};
  const int64_t column_origin = kRowsAreKeys ? frame.query_origin : frame.key_origin;
  if (lane() == 0) plan = {box, inner, location.group - column_origin, location.length};
}

// Makes the plan. All threads of the block; ends with a barrier. `starts` is memory for the shares
// of columns whose slots are not evenly spaced, those of queries.
//
// What an axis has is found once, by a warp, and the axes are put together for each row and column.
// Sums are taken modulo 2^32, in which their results fit.
template <Family kFamily, Side kSide, int kRows, int kColumns>
__device__ void make_plan(Plan<kRows, kColumns>& plan, const Problem<kAxes>& problem,
                          const Tiling& tiling, const TileIndex& tile, int* starts = nullptr) {
  static_assert(kRows <= kThreads && kAxes * kWarp <= kThreads);
  constexpr bool kIsFused = kFamily == Family::kFused, kRowsAreKeys = kSide == Side::kKeys;
  constexpr bool kHasStarts = !kIsFused && kRowsAreKeys;
  const int thread = static_cast<int>(threadIdx.x);
  int steps = 0;
  for (int a = 0; a < kAxes; ++a) {
    if (thread / kWarp == a) {
      plan_axis<kFamily, kSide>(plan.axis[a], plan.step + steps, tiling.size(a), problem,
                                tiling.rank, tile, a);
    }
    steps += tiling.size(a);
  }
  __syncthreads();

  ColumnList list;
  list.size = 1;
  list.guard = 0;
  list.inner = {0, 0};
  RowSpan row_span = {0, 0};
  bool exists = thread < kRows;
  int seen = 1, bits = 0, fields = 0;
  uint32_t token = 0, row_tokens = 1, row_entry = 0;
  uint32_t first = 0, tokens = 1, entry = 1;
#pragma unroll
  for (int a = kAxes - 1; a >= 0; --a) {
    const AxisWindow& window = problem.window[a];
    const AxisPlan& axis = plan.axis[a];
    const Span box = axis.box;
    steps -= tiling.size(a);
    const Step step = plan.step[steps + (thread >> bits & (tiling.size(a) - 1))];
    bits += tiling.log_size[a];
    exists = exists && step.index != kNoRow;
    token += row_tokens * step.index;
    row_tokens *= static_cast<uint32_t>(rows_along<kSide>(problem, a));
    seen *= step.span.count();

    const int count = box.begin == INT_MAX ? 0 : box.count();
    const auto dilation = static_cast<uint32_t>(window.dilation);
    list.count[a] = count;
    list.size *= count;
    list.one[a].row = static_cast<int>(tokens * dilation);
    first += tokens * (box.begin * dilation + static_cast<uint32_t>(axis.origin));
    tokens *= static_cast<uint32_t>(columns_along<kSide>(problem, a));

    const uint32_t column_entry = kRowsAreKeys ? -entry : entry;
    list.one[a].entry = static_cast<int>(column_entry);
    row_entry += column_entry * (box.begin - step.reference);
    entry *= static_cast<uint32_t>(kIsFused ? 2 * window.kernel_size - 1 : window.kernel_size);

    const int shift = fields;
    list.one[a].place = 1u << shift;
    fields += 33 - __clz(count + 1);
    list.guard |= 1u << (fields - 1);
    // An interval that nothing is in: from count + 1 to 0.
    const auto add = [&](RowSpan& to, const Span& span) {
      const bool any = span.begin < span.end;
      to.low |= static_cast<uint32_t>(any ? span.begin - box.begin + 1 : count + 1) << shift;
      to.high |= static_cast<uint32_t>(any ? span.end - box.begin : 0) << shift;
    };
    add(row_span, step.span);
    add(list.inner, axis.inner);
  }
  row_span.high += 2 * list.guard;
  list.inner.high += 2 * list.guard;

  if (thread < kRows) {
    const auto head = static_cast<uint32_t>(tile.head);
    const uint32_t row = kIsFused ? token * static_cast<uint32_t>(row_heads<kSide>(problem)) + head
                                  : head * row_tokens + token;
    plan.row[thread] = exists ? static_cast<int32_t>(row) : kNoRow;
    plan.source[thread] = exists && seen > 0 ? static_cast<int32_t>(row) : kNoRow;
    plan.span[thread] = row_span;
    plan.row_entry[thread] = static_cast<int32_t>(row_entry);
    plan.seen[thread] = exists ? seen : 0;
  }

  // The columns of a key's gradients go through the heads that share it.
  const auto group = static_cast<int>(problem.group());
  const int first_head =
      static_cast<int>(tile.head) * (kRowsAreKeys ? group : 1) / (kRowsAreKeys ? 1 : group);
  if constexpr (kRowsAreKeys) list.size *= group;
  const auto heads = static_cast<int>(kRowsAreKeys ? problem.heads : problem.heads_kv);
  const int token_rows = kIsFused ? heads : 1;
  const int head_rows = kIsFused ? 1 : static_cast<int>(tokens);
  uint32_t first_place = list.guard;
  for (Column& one : list.one) {
    one.row *= token_rows;
    first_place += one.place;
  }
  list.head = {head_rows, 0, kIsFused ? static_cast<int>(entry) : 0};
  list.first = {static_cast<int>(first) * token_rows + first_head * head_rows, first_place, 0};
  if constexpr (kHasStarts) {
    for (int a = 0, begin = 0; a < kAxes; begin += list.count[a++]) {
      for (int i = thread; i < list.count[a]; i += kThreads) {
        const int position = plan.axis[a].box.begin;
        const int64_t start =
            geometry::window_of(problem.window[a], plan.axis[a].length, position + i).begin;
        starts[begin + i] = static_cast<int>(start - position) * list.one[a].entry;
      }
    }
  }
  if (thread == 0) {
    plan.list = list;
    plan.starts = starts;
  }
  __syncthreads();
}

}  // namespace jax_natten::sm80
