// The choice of shapes, on the host: which box of queries a block has, and which box of keys is a
// tile.
//
// The keys that a block's queries see together are a box that begins anywhere; tiles cover it from
// its beginning. A shape costs what its blocks and tiles take, and how many there are is a product
// over the axes.
#pragma once

#include <cstdint>

#include "cpu/tiling.h"

namespace jax_natten::sm90 {

inline constexpr int kLogRows = 6;  // a consumer has 64 queries
inline constexpr int kLogRun = 3;   // keys of a tile come in runs of 8 along the last axis
inline constexpr int kRun = 1 << kLogRun;
inline constexpr int kMostConsumers = 3;

struct Shape {
  int rank;                // axes that the frame has
  int log_rows[kAxes];     // a consumer's box of queries, in positions
  int consumers_axis;      // along which the boxes of a block's consumers follow each other
  int queries[kAxes];      // a block's box of queries
  int keys[kAxes];         // a tile of keys
  int query_tiles[kAxes];  // blocks along a dilation group
  // A mask has a bit for each run of a tile, in each half of a word. Bits of neighbors on an axis
  // are `stride` apart; the pattern of an axis is that of its `period` bits, times `repeat` for all
  // of the tile; of the last axis it differs from half to half, and is of one.
  int stride[kAxes];
  uint32_t period[kAxes];
  uint32_t repeat[kAxes];
  float scale;  // of the logits
  double cost;  // of all blocks of a head
};

// What a multiprocessor takes, in cycles: for a block, for a tile of keys that some of its queries
// see in part, and for one that all of them see whole.
struct Costs {
  double block;
  double rim;
  double inner;
};

// Tiles of keys along an axis, of all blocks.
struct TileCounts {
  double all;
  double inner;  // that every query of a block sees whole
};

// The columns that a row sees along an axis: keys of a query, or the queries that see a key.
template <Side kRows>
constexpr JAX_NATTEN_HOST_DEVICE geometry::Interval columns_seen(const AxisWindow& window,
                                                                 const AxisFrame& frame,
                                                                 const geometry::Location& row) {
  return kRows == Side::kKeys ? geometry::queries_that_see(window, frame, row)
                              : geometry::keys_seen(window, frame, row);
}

// The bytes of a head's columns, of both arrays, of half types.
template <Side kRows>
int64_t head_bytes(const Problem<kAxes>& problem) {
  constexpr int64_t kElementBytes = 2;
  int64_t bytes = (problem.dim + problem.value_dim) * kElementBytes;
  for (int a = 0; a < kAxes; ++a) bytes *= columns_along<kRows>(problem, a);
  return bytes;
}

// What blocks of so many rows along an axis see: some of the blocks, evenly spread.
template <Side kRows = Side::kQueries>
class AxisBlocks {
 public:
  AxisBlocks() = default;
  AxisBlocks(const Problem<kAxes>& problem, int axis, int rows) {
    const AxisWindow& window = problem.window[axis];
    const int64_t queries = problem.query_shape[axis], keys = problem.key_shape[axis];
    const int64_t size = rows_along<kRows>(problem, axis);
    const int64_t groups = row_groups<kRows>(problem, axis);
    const int64_t blocks = geometry::ceil_div(row_positions<kRows>(problem, axis), rows);
    // Where one array is longer than the other, by its halo, the other lies in its middle.
    const int64_t extent = geometry::max(queries, keys);
    const AxisFrame frame{extent, (extent - queries) / 2, queries, (extent - keys) / 2, keys};
    const auto seen_by = [&](int64_t index) {
      return columns_seen<kRows>(window, frame,
                                 geometry::locate(window, extent, (extent - size) / 2 + index));
    };
    count_ = static_cast<int>(geometry::min(blocks, kSome));
    of_each_ = count_ == 0 ? 0 : static_cast<double>(blocks * groups) / count_;
    for (int i = 0; i < count_; ++i) {
      const int64_t number = (2 * i + 1) * blocks / (2 * count_);
      const int64_t first = number * rows * window.dilation + i % groups;
      blocks_[i] = {};
      if (first >= size) continue;
      const int64_t steps =
          geometry::min(rows, geometry::ceil_div(size - first, window.dilation)) - 1;
      const geometry::Interval of_first = seen_by(first);
      const geometry::Interval of_last = seen_by(first + steps * window.dilation);
      const auto from_first = [&](int64_t position) {
        return static_cast<int>(geometry::max(position - of_first.begin, 0));
      };
      blocks_[i] = {from_first(of_last.end), from_first(of_last.begin), from_first(of_first.end)};
    }
  }

  bool is_known() const { return count_ >= 0; }
  double blocks() const { return of_each_ * count_; }

  // Tiles of so many keys. They are asked for again and again, and counted once.
  const TileCounts& tiles(int keys) {
    int i = 0;
    while (i < counted_ && counted_keys_[i] != keys) ++i;
    if (i < counted_) return counts_[i];
    if (i == kMostCounted) i = 0;
    counted_ = i + 1;
    counted_keys_[i] = keys;
    return counts_[i] = count_tiles(keys);
  }

 private:
  static constexpr int kSome = 32, kMostCounted = 12;

  // Keys, counted from the first that some query of the block sees.
  struct Block {
    int seen;         // by some query
    int inner_begin;  // by every query
    int inner_end;
  };

  TileCounts count_tiles(int keys) const {
    int all = 0, inner = 0;
    for (int i = 0; i < count_; ++i) {
      const Block& block = blocks_[i];
      all += (block.seen + keys - 1) / keys;
      const int tiles = block.inner_end / keys - (block.inner_begin + keys - 1) / keys;
      inner += tiles > 0 ? tiles : 0;
    }
    return {all * of_each_, inner * of_each_};
  }

  int count_ = -1;  // of the blocks here
  double of_each_;  // how many blocks there are for one here
  Block blocks_[kSome];
  int counted_ = 0;
  int counted_keys_[kMostCounted];
  TileCounts counts_[kMostCounted];
};

// The blocks of a problem that shapes are chosen by, looked at once for all kernels.
template <Side kRows = Side::kQueries>
class KnownBlocks {
 public:
  explicit KnownBlocks(const Problem<kAxes>& problem) : problem(problem) {}

  // Of consumers in a row along an axis, each of 2^log_rows positions.
  AxisBlocks<kRows>& along(int axis, int consumers, int log_rows) {
    AxisBlocks<kRows>& blocks = known_[axis][consumers - 1][log_rows];
    if (!blocks.is_known()) blocks = AxisBlocks<kRows>(problem, axis, consumers << log_rows);
    return blocks;
  }

  const Problem<kAxes>& problem;

 private:
  AxisBlocks<kRows> known_[kAxes][kMostConsumers][kLogRows + 1];
};

// Bits of masks: see Shape.
inline void finish_masks(Shape& shape) {
  const int runs = shape.keys[2] / kRun, rows = shape.keys[1], planes = shape.keys[0];
  const auto ones = [](int count) { return (1u << count) - 1; };
  const auto every = [](int stride, int count) {
    uint32_t bits = 0;
    for (int i = 0; i < count; ++i) bits |= 1u << (i * stride);
    return bits;
  };
  const int stride[kAxes] = {runs * rows, runs, 1};
  const uint32_t period[kAxes] = {ones(runs * rows * planes), ones(runs * rows), ones(runs)};
  constexpr uint32_t kBothHalves = 0x10001;
  const uint32_t repeat[kAxes] = {kBothHalves, every(runs * rows, planes) * kBothHalves,
                                  every(runs, rows * planes)};
  for (int a = 0; a < kAxes; ++a) {
    shape.stride[a] = stride[a];
    shape.period[a] = period[a];
    shape.repeat[a] = repeat[a];
  }
}

// The copy engine's limits on a box.
inline constexpr int64_t kMostStep = 8;      // between its elements along an axis
inline constexpr int64_t kMostExtent = 256;  // steps included

constexpr bool fits_box(int64_t count, int64_t step) {
  return step <= kMostStep && (count - 1) * step + 1 <= kMostExtent;
}

// The shape of least cost for blocks of so many consumers and tiles of so many keys; its cost is
// negative where the copy engine can load none.
template <Side kRows>
Shape choose_shape(KnownBlocks<kRows>& blocks, int rank, int consumers, int keys,
                   const Costs& costs) {
  const Problem<kAxes>& problem = blocks.problem;
  const auto fits = [&](int axis, int count) {
    return fits_box(count, problem.window[axis].dilation);
  };
  // Not half of whose rows are missing; the last axis takes what is left.
  const auto is_useful = [&](int axis, int log_rows) {
    return fits(axis, 1 << log_rows) &&
           (log_rows == 0 || 1 << log_rows < 2 * row_positions<kRows>(problem, axis));
  };
  Shape best{};
  best.cost = -1;
  const auto try_queries = [&](const int (&log_rows)[kAxes], int side) {
    Shape shape{};
    shape.rank = rank;
    shape.scale = static_cast<float>(problem.scale);
    shape.consumers_axis = side;
    AxisBlocks<kRows>* axes[kAxes];
    double count = 1;
    for (int a = 0; a < kAxes; ++a) {
      const int in_a_row = a == side ? consumers : 1;
      axes[a] = &blocks.along(a, in_a_row, log_rows[a]);
      shape.log_rows[a] = log_rows[a];
      shape.queries[a] = in_a_row << log_rows[a];
      shape.query_tiles[a] =
          static_cast<int>(geometry::ceil_div(row_positions<kRows>(problem, a), shape.queries[a]));
      count *= axes[a]->blocks();
    }
    const int runs = keys / kRun;
    for (int x = runs; x >= 1; --x) {
      if (runs % x != 0 || !fits(2, x * kRun)) continue;
      const int row_runs = x * kRun;
      const TileCounts of_x = axes[2]->tiles(row_runs);
      for (int y = runs / x; y >= 1; --y) {
        const int z = runs / x / y;
        if (x * y * z != runs || !fits(1, y) || !fits(0, z)) continue;
        const TileCounts of_y = axes[1]->tiles(y), of_z = axes[0]->tiles(z);
        const double tiles = of_x.all * of_y.all * of_z.all;
        const double inner = of_x.inner * of_y.inner * of_z.inner;
        const double cost = count * costs.block + (tiles - inner) * costs.rim + inner * costs.inner;
        // Of nearly equals the first, which has the longest rows.
        if (best.cost >= 0 && cost >= 0.995 * best.cost) continue;
        best = shape;
        best.keys[0] = z, best.keys[1] = y, best.keys[2] = row_runs;
        best.cost = cost;
      }
    }
  };
  for (int z = 0; z <= kLogRows && is_useful(0, z); ++z) {
    for (int y = 0; y + z <= kLogRows && is_useful(1, y); ++y) {
      const int log_rows[kAxes] = {z, y, kLogRows - y - z};
      if (!fits(kAxes - 1, 1 << log_rows[kAxes - 1])) continue;
      for (int side = kAxes - 1; side >= kAxes - rank; --side) try_queries(log_rows, side);
    }
  }
  finish_masks(best);
  return best;
}

}  // namespace jax_natten::sm90
