// The warps that bring what the consumers work on: one plans tiles of queries ahead, and one has
// the copy engine load the queries and the tiles of keys and values. It writes the masks of the
// tiles too, unless a third warp is there to do so.
#pragma once

#include "cuda/sm90/mask_writer.cuh"
#include "cuda/sm90/tensor_map.h"

namespace jax_natten::sm90 {

// The schedule: the tiles of queries of a block. Blocks that run at once, `together` of them, take
// tiles in turn, `per_block` each, so that they share keys in the cache; then the next blocks do.
// One block for each processor that takes all would not be better: they would drift apart.
struct QueryTiles {
  unsigned count;      // of tiles
  unsigned per_block;  // at most
  unsigned together;   // blocks

  unsigned blocks() const {
    const unsigned of_a_turn = together * per_block;
    return (count + of_a_turn - 1) / of_a_turn * together;
  }

  template <typename Visit>
  __device__ __forceinline__ void for_each(Visit&& visit) const {
    const unsigned first = blockIdx.x / together * together * per_block + blockIdx.x % together;
    const unsigned end = min(first + per_block * together, count);
    for (unsigned number = first; number < end; number += together) visit(number);
  }
};

template <typename Config>
__device__ void run_planner(Shared<Config>& shared, const Problem<kAxes>& problem,
                            const typename Config::Shape& shape, const QueryTiles& tiles) {
  Cursor<2> cursor;
  if constexpr (Config::kHasBias) find_rows(shared.row_bias, shape);
  tiles.for_each([&](unsigned number) {
    Handover& handover = shared.plans[cursor.place];
    handover.free.wait(cursor.parity ^ 1);
    auto& plan = shared.plan[cursor.place];
    plan_tiles(plan, problem, shape, number);
    handover.full.arrive();
    plan_windows(plan, problem, shape);
    if constexpr (Config::kHasBias) bring_biases(plan, shape);
    shared.windows[cursor.place].arrive();
    cursor.advance();
  });
}

// Has all chunks of a box of rows of a head loaded, which `full` is told to expect. One thread.
template <typename Row, int kCount>
__device__ __forceinline__ void load_rows(unsigned char* to, const CUtensorMap* map,
                                          const Channels& channels, Barrier& full, int head,
                                          const int (&at)[kAxes], int sample) {
  full.expect(kCount * Row::kBytes);
#pragma unroll
  for (int chunk = 0; chunk < Row::kChunks; ++chunk) {
    load_box(shared_address(to) + chunk * kCount * Row::kChunkBytes, map, &full,
             channels.corner(sample, at, head, chunk * Row::kChannels));
  }
}

template <typename Config>
struct Producer {
  using KeyRow = typename Config::KeyRow;
  using ValueRow = typename Config::ValueRow;

  Shared<Config>& shared;
  const Maps& maps;
  const Problem<kAxes>& problem;
  const typename Config::Shape& shape;
  Cursor<Config::kStages> stage;

  template <typename Plan>
  __device__ __forceinline__ void load_queries(const Plan& plan, uint32_t parity) {
#pragma unroll
    for (int consumer = 0; consumer < Config::kConsumers; ++consumer) {
      int at[kAxes];
      plan.first_query(problem, shape, consumer, at);
      Handover& queries = shared.queries[consumer];
      queries.free.wait(parity ^ 1);
      if (lane_id() > 0) continue;
      load_rows<KeyRow, kRows>(shared.q[consumer], &maps.q, maps.keys, queries.full, plan.head, at,
                               plan.sample);
      queries.full.arrive();
    }
  }

  // A tile of keys and its values; what is `between` comes between them.
  template <typename Plan, typename Between>
  __device__ __forceinline__ void load_keys(const Plan& plan, const int (&tile)[kAxes],
                                            Between&& between) {
    const bool loads = lane_id() == 0;
    const int place = stage.place;
    int begin[kAxes], at[kAxes];
#pragma unroll
    for (int a = 0; a < kAxes; ++a) {
      begin[a] = tile[a] * shape.keys[a];
      at[a] = plan.key[a] + begin[a] * static_cast<int>(problem.window[a].dilation);
    }
    Handover& keys = shared.keys[place];
    keys.free.wait(stage.parity ^ 1);
    if (loads) {
      load_rows<KeyRow, Config::kKeys>(shared.k[place], &maps.k, maps.keys, keys.full, plan.kv_head,
                                       at, plan.sample);
    }
    between();
    keys.full.arrive();
    Handover& values = shared.values[place];
    values.free.wait(stage.parity ^ 1);
    if (loads) {
      load_rows<ValueRow, Config::kKeys>(shared.v[place], &maps.v, maps.values, values.full,
                                         plan.kv_head, at, plan.sample);
      for (int a = 0; a < kAxes; ++a) shared.first_key[place][a] = begin[a];
      values.full.arrive();
    }
    stage.advance();
  }

  // The place of keys is free before that of queries, so the queries come after the first keys.
  template <typename Plan>
  __device__ __forceinline__ void load_all(const Plan& plan, Barrier& windows, uint32_t plan_parity,
                                           uint32_t parity) {
    bool is_first = true;
    MaskWriter<Config> writer;
    const auto begin = [&] {
      if (!is_first) return;
      load_queries(plan, parity);
      if constexpr (!Config::kHasMaskWriter) {
        windows.wait(plan_parity);
        writer.begin(plan, shape);
      }
      is_first = false;
    };
    plan.for_each_tile([&](const int (&tile)[kAxes]) {
      load_keys(plan, tile, [&] {
        begin();
        if constexpr (!Config::kHasMaskWriter) {
          writer.write(shared, stage.place, plan, problem, shape, tile);
        }
      });
    });
    begin();
  }

  // All lanes of a warp.
  __device__ void run(const QueryTiles& tiles) {
    if (lane_id() == 0) {
      prefetch(&maps.q);
      prefetch(&maps.k);
      prefetch(&maps.v);
    }
    Cursor<2> plans;
    uint32_t parity = 0;
    tiles.for_each([&](unsigned) {
      Handover& handover = shared.plans[plans.place];
      handover.full.wait(plans.parity);
      load_all(shared.plan[plans.place], shared.windows[plans.place], plans.parity, parity);
      handover.free.arrive();
      plans.advance();
      parity ^= 1;
    });
  }
};

// Writes the masks of all tiles. All lanes of a warp.
template <typename Config>
__device__ void run_mask_writer(Shared<Config>& shared, const Problem<kAxes>& problem,
                                const typename Config::Shape& shape, const QueryTiles& tiles) {
  Cursor<2> plans;
  Cursor<Config::kStages> stage;
  tiles.for_each([&](unsigned) {
    shared.windows[plans.place].wait(plans.parity);
    const auto& plan = shared.plan[plans.place];
    MaskWriter<Config> writer;
    writer.begin(plan, shape);
    plan.for_each_tile([&](const int (&tile)[kAxes]) {
      Handover& keys = shared.keys[stage.place];
      keys.free.wait(stage.parity ^ 1);
      writer.write(shared, stage.place, plan, problem, shape, tile);
      keys.full.arrive();
      stage.advance();
    });
    shared.plans[plans.place].free.arrive();
    plans.advance();
  });
}

}  // namespace jax_natten::sm90
