// Which logits a block computes. Its rows are a tile of queries and its columns the keys that they
// see, or its rows are a tile of keys and its columns the queries that see them.
//
// The columns of the rows together are a box of positions. It is walked as a list, last axis
// fastest, so that no place in a tile of logits is spent on what no row needs. A row's own columns
// are an interval per axis. Positions in the box are packed into one word, each with a guard bit
// above it: after (place + guard - low) the guard of every axis is still there exactly where the
// axis' position is not below low, so one word tells whether a column lies in the row's interval on
// all axes.
#pragma once

#include <climits>
#include <cstdint>

#include "cuda/sm80/copy.cuh"
#include "cuda/sm80/tiling.h"

namespace jax_natten::sm80 {

inline constexpr unsigned kAllLanes = ~0u;

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

// A row's interval of columns, packed.
struct RowSpan {
  uint32_t low;
  uint32_t high;
};

inline constexpr int kSlots = 3;  // planned tiles of columns

// The plan in shared memory.
template <int kRows, int kColumns>
struct Plan {
  int32_t row[kRows];  // number of its row in the arrays, or kNoRow
  RowSpan span[kRows];
  int32_t row_entry[kRows];  // its share of the index of a pair's entry
  int seen[kRows];           // how many columns it sees
  Span row_columns[kRows];   // from the first to the last of them in the list
  // Of the columns of several tiles in turn.
  int32_t column[kSlots][kColumns];
  uint32_t place[kSlots][kColumns];
  int32_t column_entry[kSlots][kColumns];
  // Over the rows, on each axis: the least begin, the largest end, and what all rows see.
  Span box[kAxes];
  Span inner[kAxes];
};

// Whether a column lies in a row's interval; `guard` has all guard bits.
__device__ inline bool sees(RowSpan row, uint32_t place, uint32_t guard) {
  return ((place - row.low) & (row.high - place) & guard) == guard;
}

// Fused arrays are token-major, and the entries that pairs share are those of a table of offsets;
// unfused arrays have heads first, and every pair has an entry of its own, its slot.
enum class Family { kFused, kUnfused };

// Makes the plan, and then walks the columns tile by tile.
//
// A pair's entry is the sum over the axes of steps from a reference: from the query's position
// less kernel_size - 1, or from the begin of its window. Each side has its share of it, counted
// from the box's begin.
template <Family kFamily, Side kSide, int kRows, int kColumns>
class Planner {
  static constexpr bool kIsFused = kFamily == Family::kFused;
  static constexpr bool kRowsAreKeys = kSide == Side::kKeys;

 public:
  static_assert(kRows <= kThreads && kColumns <= kThreads);

  // All threads of the block. Ends with a barrier, after which the plan of the rows is there.
  // `starts` is for the slots that a query's columns have: [kMostStarts], or null.
  __device__ Planner(Plan<kRows, kColumns>& plan, const Problem<kAxes>& problem,
                     const Tiling& tiling, const TileIndex& tile, int* starts = nullptr)
      : plan_(plan), starts_(starts) {
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
      reference[a] = static_cast<int>(reference_of(window, location[a]));
      // Of the columns: array index = position * dilation + origin.
      origin[a] = location[a].group - (kRowsAreKeys ? frame.query_origin : frame.key_origin);
    }
    int seen = exists ? 1 : 0;
    for (const Span& axis : span) seen *= axis.count();
    for (int a = 0; a < kAxes; ++a) {
      const Span least = {seen == 0 ? INT_MAX : span[a].begin, seen == 0 ? INT_MAX : span[a].end};
      const Span most = {seen == 0 ? INT_MIN : span[a].begin, seen == 0 ? INT_MIN : span[a].end};
      const int box_begin = __reduce_min_sync(kAllLanes, least.begin);
      const int box_end = __reduce_max_sync(kAllLanes, most.end);
      const int inner_begin = __reduce_max_sync(kAllLanes, most.begin);
      const int inner_end = __reduce_min_sync(kAllLanes, least.end);
      if (lane() == 0) {
        atomicMin(&plan.box[a].begin, box_begin);
        atomicMax(&plan.box[a].end, box_end);
        atomicMax(&plan.inner[a].begin, inner_begin);
        atomicMin(&plan.inner[a].end, inner_end);
      }
    }
    __syncthreads();

    // A field holds positions from 1 on, so that place 0 is in no interval.
    int64_t stride = 1, entry = 1;
    int64_t row_entry = 0;
    Span columns = {0, 1};
    uint32_t fields = 0;
    uint32_t low = 0, high = 0, inner_low = 0, inner_high = 0;
    list_ = 1;
    for (int a = kAxes - 1; a >= 0; --a) {
      const AxisWindow& window = problem.window[a];
      const Span box = plan.box[a], inner = plan.inner[a];
      count_[a] = box.begin == INT_MAX ? 0 : box.count();
      columns.begin += (span[a].begin - box.begin) * list_;
      columns.end += (span[a].end - 1 - box.begin) * list_;
      list_ *= count_[a];
      step_[a] = static_cast<int>(stride * window.dilation);
      first_ += static_cast<int>(stride * (box.begin * window.dilation + origin[a]));
      stride *= columns_along<kSide>(problem, a);

      entry_[a] = static_cast<int>(kRowsAreKeys ? -entry : entry);
      const int64_t steps = int64_t{box.begin} - reference[a];
      row_entry += (kRowsAreKeys ? -steps : steps) * entry;
      entry *= kIsFused ? 2 * window.kernel_size - 1 : window.kernel_size;

      shift_[a] = static_cast<int>(fields);
      fields += 33 - __clz(count_[a] + 1);
      guard_ |= 1u << (fields - 1);
      low |= static_cast<uint32_t>(seen == 0 ? count_[a] + 1 : span[a].begin - box.begin + 1)
             << shift_[a];
      high |= static_cast<uint32_t>(seen == 0 ? 0 : span[a].end - box.begin) << shift_[a];
      // Where the rows have nothing in common, no column is in all of them.
      const bool common = inner.begin < inner.end;
      inner_low |= static_cast<uint32_t>(common ? inner.begin - box.begin + 1 : count_[a] + 1)
                   << shift_[a];
      inner_high |= static_cast<uint32_t>(common ? inner.end - box.begin : 0) << shift_[a];
    }
    inner_ = {inner_low, inner_high + 2 * guard_};

    if (thread < kRows) {
      const int64_t tokens = kRowsAreKeys ? problem.keys() : problem.queries();
      const int64_t row =
          kIsFused ? token * row_heads<kSide>(problem) + tile.head : tile.head * tokens + token;
      plan.row[thread] = exists ? static_cast<int32_t>(row) : kNoRow;
      plan.span[thread] = {low, high + 2 * guard_};
      plan.row_entry[thread] = static_cast<int32_t>(row_entry);
      plan.seen[thread] = seen;
      plan.row_columns[thread] = seen == 0 ? Span{INT_MAX, 0} : columns;
    }
    if constexpr (kHasStarts) {
      for (int a = 0, begin = 0; a < kAxes; begin += count_[a++]) {
        for (int i = thread; i < count_[a]; i += kThreads) {
          const int position = plan.box[a].begin;
          const int64_t start =
              geometry::window_of(problem.window[a], location[a].length, position + i).begin;
          starts[begin + i] = static_cast<int>(start - position) * entry_[a];
        }
      }
    }

    // Columns of a key's gradients go through the heads that share it.
    const int64_t group = problem.group();
    column_head_ = static_cast<int>(kRowsAreKeys ? tile.head * group : tile.head / group);
    token_rows_ = kIsFused ? static_cast<int>(kRowsAreKeys ? problem.heads : problem.heads_kv) : 1;
    head_rows_ = kIsFused ? 1 : static_cast<int>(stride);
    head_entries_ = kIsFused ? static_cast<int>(entry) : 0;
    if constexpr (kRowsAreKeys) list_ *= static_cast<int>(group);
    seek(thread);
    __syncthreads();
    find_warp_columns(kRowsAreKeys && group > 1);
  }

  __device__ uint32_t guard() const { return guard_; }

  // Tiles of columns.
  __device__ int tiles() const { return (list_ + kColumns - 1) / kColumns; }

  // Whether a row of the thread's warp sees any column of a tile; true may be wrong.
  __device__ bool warp_sees(int tile) const {
    return (tile + 1) * kColumns > warp_columns_.begin && tile * kColumns < warp_columns_.end;
  }

  // Writes the plan of the next tile of columns. True where the thread's column is not one that
  // all rows see.
  __device__ bool advance(int slot) {
    const int thread = static_cast<int>(threadIdx.x);
    if (thread >= kColumns) return false;
    uint32_t place = guard_;
    int32_t column = kNoRow;
    if (number_ < list_) {
      int token = first_, entry = of_group_ * head_entries_;
      int start = 0;
      for (int a = 0; a < kAxes; ++a) {
        place += static_cast<uint32_t>(at_[a] + 1) << shift_[a];
        token += at_[a] * step_[a];
        if constexpr (kHasStarts) {
          entry += starts_[start + at_[a]];
          start += count_[a];
        } else {
          entry += at_[a] * entry_[a];
        }
      }
      column = token * token_rows_ + (column_head_ + of_group_) * head_rows_;
      plan_.column_entry[slot][thread] = entry;
      number_ += kColumns;
      int carry = 0;
      for (int a = kAxes - 1; a >= 0; --a) {
        at_[a] += by_[a] + carry;
        carry = at_[a] >= count_[a];
        if (carry != 0) at_[a] -= count_[a];
      }
      of_group_ += by_group_ + carry;
    }
    plan_.place[slot][thread] = place;
    plan_.column[slot][thread] = column;
    return !sees(inner_, place, guard_);
  }

 private:
  // The begins of the columns' windows, where their slots are needed.
  static constexpr bool kHasStarts = !kIsFused && kRowsAreKeys;

  // Where a row's entries are counted from.
  static __device__ int64_t reference_of(const AxisWindow& window, const geometry::Location& row) {
    if constexpr (kIsFused) {
      return kRowsAreKeys ? row.position + window.kernel_size - 1
                          : row.position - window.kernel_size + 1;
    }
    return kRowsAreKeys ? row.position
                        : geometry::window_of(window, row.length, row.position).begin;
  }

  // The part of the list that the rows of the thread's warp see. Where the list goes through the
  // box for each of several heads, this is all of it.
  __device__ void find_warp_columns(bool has_several_heads) {
    constexpr int kRowsOfWarp = kRows / (kThreads / kWarp);
    const int row = static_cast<int>(threadIdx.x) / kWarp * kRowsOfWarp + lane() % kRowsOfWarp;
    const Span columns = has_several_heads ? Span{0, list_} : plan_.row_columns[row];
    warp_columns_ = {__reduce_min_sync(kAllLanes, columns.begin),
                     __reduce_max_sync(kAllLanes, columns.end)};
  }

  // Goes to a column of the list, and works out the way to the one kColumns further.
  __device__ void seek(int number) {
    number_ = number;
    int rest = number, by = kColumns;
    for (int a = kAxes - 1; a >= 0; --a) {
      const int count = max(count_[a], 1);
      at_[a] = rest % count;
      rest /= count;
      by_[a] = by % count;
      by /= count;
    }
    of_group_ = rest;
    by_group_ = by;
  }

  Plan<kRows, kColumns>& plan_;
  const int* starts_;
  uint32_t guard_ = 0;
  RowSpan inner_;
  int list_;  // columns of all heads
  Span warp_columns_;
  int count_[kAxes];  // of the box
  int shift_[kAxes];  // of the field in a place
  int step_[kAxes];   // tokens from a position to the next
  int first_ = 0;     // token of the box's first position
  int entry_[kAxes];  // from a position to the next
  int head_entries_;  // from a head to the next
  int column_head_;   // the first
  int token_rows_;    // of the columns, from a token to the next
  int head_rows_;     // and from a head to the next
  // The thread's next column, and the step to the one after it.
  int number_;
  int at_[kAxes], by_[kAxes];
  int of_group_, by_group_;
};

}  // namespace jax_natten::sm80
