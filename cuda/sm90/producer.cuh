// The warps that bring what the consumers work on: one plans tiles of queries ahead, and one thread
// has the copy engine load the queries and the tiles of keys and values.
#pragma once

#include "cuda/sm90/bias.cuh"
#include "cuda/sm90/config.cuh"
#include "cuda/sm90/tensor_map.h"

namespace jax_natten::sm90 {

// The schedule: the tiles of queries of a block. Blocks that run at once, `together` of them, take
// tiles in turn, `per_block` each, so that they share keys in the cache; then the next blocks do.
// One block for each processor that takes all would not be better: they would drift apart.
struct QueryTiles {
  unsigned count;      // of tiles
  unsigned per_block;  // at most
  unsigned together;   // blocks

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

template <typename Config>
struct Producer {
  using KeyRow = typename Config::KeyRow;
  using ValueRow = typename Config::ValueRow;

  Shared<Config>& shared;
  const Maps& maps;
  const Problem<kAxes>& problem;
  const typename Config::Shape& shape;
  Cursor<Config::kStages> stage;
  Cursor<Shared<Config>::kBoxes> boxes;

  // All chunks of the rows of a head.
  template <typename Row, int kRowCount>
  __device__ __forceinline__ void load(unsigned char* to, const CUtensorMap* map,
                                       const Channels& channels, Barrier& full, int head,
                                       const int (&at)[kAxes], int sample) {
    full.arrive_expecting(kRowCount * Row::kBytes);
#pragma unroll
    for (int chunk = 0; chunk < Row::kChunks; ++chunk) {
      load_box(shared_address(to) + chunk * kRowCount * Row::kChunkBytes, map, &full,
               channels.corner(sample, at, head, chunk * Row::kChannels));
    }
  }

  template <typename Plan>
  __device__ __forceinline__ void load_queries(const Plan& plan, uint32_t parity) {
#pragma unroll
    for (int consumer = 0; consumer < Config::kConsumers; ++consumer) {
      int at[kAxes];
#pragma unroll
      for (int a = 0; a < kAxes; ++a) {
        const int step = a == shape.consumers_axis ? consumer << shape.log_rows[a] : 0;
        at[a] = plan.query[a] + step * static_cast<int>(problem.window[a].dilation);
      }
      Handover& queries = shared.queries[consumer];
      queries.free.wait(parity ^ 1);
      load<KeyRow, kRows>(shared.q[consumer], &maps.q, maps.keys, queries.full, plan.head, at,
                          plan.sample);
    }
  }

  // A tile of keys and its values; what `between` loads comes between them.
  template <typename Plan, typename Between>
  __device__ __forceinline__ void load_keys(const Plan& plan, int z, int y, int x,
                                            Between&& between) {
    const int tile[kAxes] = {z, y, x};
    int at[kAxes];
    Handover& keys = shared.keys[stage.place];
    Handover& values = shared.values[stage.place];
    keys.free.wait(stage.parity ^ 1);
#pragma unroll
    for (int a = 0; a < kAxes; ++a) {
      const int begin = tile[a] * shape.keys[a];
      shared.box[boxes.place].bit[a] = bits_of(shape, a, begin);
      at[a] = plan.key[a] + begin * static_cast<int>(problem.window[a].dilation);
    }
    if constexpr (Config::kHasBias) {
      shared.box[boxes.place].bias = first_bias(plan, problem, shape, tile);
    }
    load<KeyRow, Config::kKeys>(shared.k[stage.place], &maps.k, maps.keys, keys.full, plan.kv_head,
                                at, plan.sample);
    between();
    values.free.wait(stage.parity ^ 1);
    load<ValueRow, Config::kKeys>(shared.v[stage.place], &maps.v, maps.values, values.full,
                                  plan.kv_head, at, plan.sample);
    stage.advance();
    boxes.advance();
  }

  // First the tiles that need a mask, then those that every query sees whole. The place of keys is
  // free before that of queries, so the queries come after the first keys.
  template <typename Plan>
  __device__ __forceinline__ void load_all(const Plan& plan, uint32_t parity) {
    bool has_queries = false;
    const auto bring_queries = [&] {
      if (!has_queries) load_queries(plan, parity);
      has_queries = true;
    };
    for (int z = 0; z < plan.tiles[0]; ++z) {
      for (int y = 0; y < plan.tiles[1]; ++y) {
        for (int x = 0; x < plan.tiles[2]; ++x) {
          if (!plan.is_inner(z, y, x)) load_keys(plan, z, y, x, bring_queries);
        }
      }
    }
    for (int z = plan.inner[0].begin; z < plan.inner[0].end; ++z) {
      for (int y = plan.inner[1].begin; y < plan.inner[1].end; ++y) {
        for (int x = plan.inner[2].begin; x < plan.inner[2].end; ++x) {
          load_keys(plan, z, y, x, bring_queries);
        }
      }
    }
    bring_queries();
  }

  __device__ void run(const QueryTiles& tiles) {
    prefetch(&maps.q);
    prefetch(&maps.k);
    prefetch(&maps.v);
    Cursor<2> plans;
    uint32_t parity = 0;
    tiles.for_each([&](unsigned) {
      Handover& handover = shared.plans[plans.place];
      handover.full.wait(plans.parity);
      load_all(shared.plan[plans.place], parity);
      handover.free.arrive();
      plans.advance();
      parity ^= 1;
    });
  }
};

}  // namespace jax_natten::sm90
