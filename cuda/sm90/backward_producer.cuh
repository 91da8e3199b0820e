// The warps that bring what the consumers of a backward kernel work on: one plans tiles of rows
// ahead, one thread has the copy engine load rows and tiles of columns, and two warps add to these
// what the copy engine cannot: lse and delta of queries, zeros for what does not exist; masks.
#pragma once

#include "cpu/operands.h"
#include "cuda/sm90/backward_config.cuh"
#include "cuda/sm90/mask_writer.cuh"
#include "cuda/sm90/producer.cuh"

namespace jax_natten::sm90 {

struct BackwardMaps {
  CUtensorMap row[2], column[2], sum[2];
  Channels channels[2];  // of the first arrays and of the second
};

// The tiles of columns that every row of a plan sees whole, and come after the others: they need no
// mask. But where most need one all have one, and come in their order in memory: neighboring blocks
// then want the same columns at about the same time.
struct InnerTiles {
  Span span[kAxes];
  int count;

  template <typename Plan>
  __device__ __forceinline__ explicit InnerTiles(const Plan& plan) : count(1) {
#pragma unroll
    for (int a = 0; a < kAxes; ++a) {
      span[a] = plan.inner[a];
      count *= span[a].end - span[a].begin;
    }
    if (2 * count >= plan.tile_count()) return;
    for (Span& none : span) none = {0, 0};
    count = 0;
  }

  __device__ __forceinline__ bool has_row(int z, int y) const {
    return span[0].begin <= z && z < span[0].end && span[1].begin <= y && y < span[1].end;
  }
};

// Tiles of columns that follow each other along the last axis.
struct TileRun {
  int head;
  int tile[kAxes];  // the first
  int count;
  bool masked;
};

// Visits the tiles of columns of a plan, of `heads` heads, in runs that need a mask or not.
template <typename Plan, typename Visit>
__device__ __forceinline__ void for_each_run(const Plan& plan, int heads, Visit&& visit) {
  const InnerTiles inner(plan);
#pragma unroll 1
  for (int pass = 0; pass < 2; ++pass) {
    const bool masked = pass == 0;
    const auto span = [&](int a) { return masked ? Span{0, plan.tiles[a]} : inner.span[a]; };
#pragma unroll 1
    for (int head = 0; head < heads; ++head) {
#pragma unroll 1
      for (int z = span(0).begin; z < span(0).end; ++z) {
#pragma unroll 1
        for (int y = span(1).begin; y < span(1).end; ++y) {
          // Of a row of tiles that has inner ones, the first pass leaves these out.
          const bool has_inner = masked && inner.has_row(z, y);
          int begin = span(2).begin, end = has_inner ? inner.span[2].begin : span(2).end;
#pragma unroll 1
          for (int part = 0; part <= static_cast<int>(has_inner); ++part) {
            if (begin < end) visit(TileRun{head, {z, y, begin}, end - begin, masked});
            begin = inner.span[2].end;
            end = plan.tiles[2];
          }
        }
      }
    }
  }
}

template <typename Config>
struct BackwardHelpers {
  using Element = typename Config::Element;
  using Row = typename Config::Row;
  static constexpr bool kRowsAreKeys = Config::kRowsAreKeys;

  BackwardShared<Config>& shared;
  const BackwardMaps& maps;
  const BackwardArrays<Element>& arrays;
  const Problem<kAxes>& problem;
  const BackwardShape& shape;

  // How many heads of columns a head of rows has, and the first.
  __device__ __forceinline__ int heads() const {
    return kRowsAreKeys ? static_cast<int>(problem.group()) : 1;
  }
  template <typename Plan>
  __device__ __forceinline__ int first_head(const Plan& plan) const {
    return kRowsAreKeys ? plan.head * heads() : plan.kv_head;
  }

  // ---- plans

  __device__ void plan_all(const QueryTiles& tiles) {
    Cursor<2> cursor;
    tiles.for_each([&](unsigned number) {
      Handover& handover = shared.plans[cursor.place];
      handover.free.wait(cursor.parity ^ 1);
      auto& plan = shared.plan[cursor.place];
      plan_tiles<Config::kSide>(plan, problem, shape, number);
      handover.full.arrive();
      plan_windows<Config::kSide>(plan, problem, shape);
      shared.windows[cursor.place].arrive();
      cursor.advance();
    });
  }

  // Visits all plans once they are there, and gives them back.
  template <typename Visit>
  __device__ __forceinline__ void for_each_plan(const QueryTiles& tiles, Visit&& visit) {
    Cursor<2> cursor;
    tiles.for_each([&](unsigned) {
      Handover& handover = shared.plans[cursor.place];
      handover.full.wait(cursor.parity);
      visit(shared.plan[cursor.place]);
      handover.free.arrive();
      cursor.advance();
    });
  }

  // ---- rows and columns, by one thread

  template <typename Plan>
  __device__ __forceinline__ void load_block(const Plan& plan, uint32_t parity) {
#pragma unroll
    for (int consumer = 0; consumer < Config::kConsumers; ++consumer) {
      int at[kAxes];
      plan.first_query(problem, shape, consumer, at);
      Handover& rows = shared.rows[consumer];
      rows.free.wait(parity ^ 1);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        load_rows<Row, kRows>(shared.row[i][consumer], &maps.row[i], maps.channels[i], rows.full,
                              plan.head, at, plan.sample);
      }
      rows.full.arrive();
    }
  }

  // The array index of a run's first column.
  template <typename Plan>
  __device__ __forceinline__ int first_column(const Plan& plan, const TileRun& run,
                                              int axis) const {
    return plan.key[axis] +
           run.tile[axis] * shape.keys[axis] * static_cast<int>(problem.window[axis].dilation);
  }

  __device__ void load_all(const QueryTiles& tiles) {
    for (int i = 0; i < 2; ++i) {
      prefetch(&maps.row[i]);
      prefetch(&maps.column[i]);
    }
    Counter<Config::kStages> stage;
    uint32_t parity = 0;
    for_each_plan(tiles, [&](const auto& plan) {
      bool has_rows = false;
      // What is there is full, or raw while missing columns are not cleared.
      const bool is_raw = plan.has_missing_keys;
      for_each_run(plan, heads(), [&](const TileRun& run) __attribute__((always_inline)) {
        const int head = first_head(plan) + run.head;
        int at[kAxes];
#pragma unroll
        for (int a = 0; a < kAxes; ++a) at[a] = first_column(plan, run, a);
#pragma unroll 1
        for (int left = run.count; left > 0; --left) {
          const auto place = static_cast<int>(stage.place());
          auto& barriers = shared.stages[place];
          barriers.free.wait(stage.parity() ^ 1);
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            Barrier& there = is_raw ? barriers.raw : barriers.full[i];
            load_rows<Row, Config::kColumns>(shared.column[i][place], &maps.column[i],
                                             maps.channels[i], there, head, at, plan.sample);
            if (!is_raw) there.arrive();
          }
          if (is_raw) barriers.raw.arrive();
          // The place of columns is free before that of rows.
          if (!has_rows) load_block(plan, parity);
          has_rows = true;
          at[2] += shape.keys[2] * static_cast<int>(problem.window[2].dilation);
          ++stage.count;
        }
      });
      if (!has_rows) load_block(plan, parity);
      parity ^= 1;
    });
  }

  // ---- what else columns need, by a warp

  static constexpr int kOwn = Config::kColumns / kWarp;  // columns of a lane
  static_assert(kOwn * kWarp == Config::kColumns);

  // A lane's column of a tile, in positions from its first.
  struct Column {
    int step[kAxes];
  };

  __device__ __forceinline__ Column column_of(int i) const {
    Column column;
    int rest = lane_id() + i * kWarp;
#pragma unroll
    for (int a = kAxes - 1; a >= 0; --a) {
      column.step[a] = rest % shape.keys[a];
      rest /= shape.keys[a];
    }
    return column;
  }

  // lse and delta of a lane's column, for the tiles of a run.
  struct Numbers {
    int offset;  // in the arrays
    int left;    // positions along the last axis, from there to the array's end; none where an
                 // index of another axis has passed it

    // Begins to copy them.
    __device__ __forceinline__ void begin(const BackwardHelpers& helpers, int stage, int column) {
      auto& numbers = helpers.shared.numbers[stage];
      const bool exists = left > 0;
      load_number(shared_address(numbers.lse + column), helpers.arrays.lse.data + offset, exists);
      load_number(shared_address(numbers.delta + column), helpers.arrays.delta.data + offset,
                  exists);
      offset += helpers.shape.keys[2] * static_cast<int>(helpers.problem.window[2].dilation) *
                static_cast<int>(helpers.problem.heads);
      left -= helpers.shape.keys[2];
    }
  };

  template <typename Plan>
  __device__ __forceinline__ Numbers numbers_of(const Plan& plan, const Column& column,
                                                const TileRun& run) const {
    int token = plan.sample;
    int left = 0;
    bool exists = true;
#pragma unroll
    for (int a = 0; a < kAxes; ++a) {
      const auto dilation = static_cast<int>(problem.window[a].dilation);
      const auto size = static_cast<int>(problem.query_shape[a]);
      const int index = first_column(plan, run, a) + column.step[a] * dilation;
      token = token * size + index;
      exists = exists && (a == kAxes - 1 || index < size);
      left = (size - index + dilation - 1) / dilation;
    }
    return {token * static_cast<int>(problem.heads) + first_head(plan) + run.head,
            exists ? left : 0};
  }

  // Columns that do not exist, but have a place in the array, become 0 in both arrays: they may
  // hold anything, and 0 times NaN is NaN.
  template <typename Plan>
  __device__ __noinline__ void clear_missing(const Plan& plan, const Column (&columns)[kOwn],
                                             const TileRun& run, int number, int stage) {
    for (int i = 0; i < kOwn; ++i) {
      bool exists = true;
      for (int a = 0; a < kAxes; ++a) {
        const int tile = run.tile[a] + (a == kAxes - 1 ? number : 0);
        exists = exists && tile * shape.keys[a] + columns[i].step[a] < plan.existing[a];
      }
      if (exists) continue;
      const int column = lane_id() + i * kWarp;
      for (int byte = 0; byte < Row::kBytes; byte += 16) {
        const int chunk = byte / Row::kChunkBytes;
        const int offset =
            (chunk * Config::kColumns + column) * Row::kChunkBytes + byte % Row::kChunkBytes;
        store_zeros(shared_address(shared.column[0][stage]) + offset);
        store_zeros(shared_address(shared.column[1][stage]) + offset);
      }
    }
    publish_writes();
    __syncwarp();
    if (lane_id() > 0) return;
    for (Barrier& full : shared.stages[stage].full) full.arrive();
  }

  __device__ void finish_columns(const QueryTiles& tiles) {
    Column columns[kOwn];
#pragma unroll
    for (int i = 0; i < kOwn; ++i) columns[i] = column_of(i);
    Counter<Config::kStages> stage;
    uint32_t raw_parities = 0;  // a bit for each stage
    for_each_plan(tiles, [&](const auto& plan) {
      if (!kRowsAreKeys && !plan.has_missing_keys) {
        stage.count += plan.tile_count();
        return;
      }
      for_each_run(plan, heads(), [&](const TileRun& run) __attribute__((always_inline)) {
        [[maybe_unused]] Numbers numbers[kOwn];
        if constexpr (kRowsAreKeys) {
#pragma unroll
          for (int i = 0; i < kOwn; ++i) numbers[i] = numbers_of(plan, columns[i], run);
        }
#pragma unroll 1
        for (int number = 0; number < run.count; ++number) {
          const auto place = static_cast<int>(stage.place());
          auto& barriers = shared.stages[place];
          barriers.free.wait(stage.parity() ^ 1);
          if constexpr (kRowsAreKeys) {
#pragma unroll
            for (int i = 0; i < kOwn; ++i) numbers[i].begin(*this, place, lane_id() + i * kWarp);
            arrive_with_numbers(&barriers.finished);
          }
          if (plan.has_missing_keys) {
            barriers.raw.wait(raw_parities >> place & 1);
            raw_parities ^= 1u << place;
            clear_missing(plan, columns, run, number, place);
          }
          ++stage.count;
        }
      });
    });
  }

  // ---- masks, by a warp

  __device__ void write_masks(const QueryTiles& tiles) {
    Counter<Config::kStages> stage;
    Counter<2> plans;
    for_each_plan(tiles, [&](const auto& plan) {
      shared.windows[plans.place()].wait(plans.parity());
      ++plans.count;
      MaskWriter<Config> writer;
      writer.begin(plan, shape);
      for_each_run(plan, heads(), [&](const TileRun& run) __attribute__((always_inline)) {
        int tile[kAxes] = {run.tile[0], run.tile[1], run.tile[2]};
#pragma unroll 1
        for (int left = run.count; left > 0; --left, ++tile[2]) {
          const auto place = static_cast<int>(stage.place());
          auto& barriers = shared.stages[place];
          barriers.free.wait(stage.parity() ^ 1);
          if (run.masked) writer.write_words(shared.mask[place].words, plan, shape, tile);
          barriers.finished.arrive();
          ++stage.count;
        }
      });
    });
  }
};

}  // namespace jax_natten::sm90
