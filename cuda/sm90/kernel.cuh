// The forward kernel: a block has a planner, a producer and consumers, which go through its tiles
// of queries at their own pace.
#pragma once

#include "cpu/operands.h"
#include "cuda/sm90/epilogue.cuh"
#include "cuda/sm90/producer.cuh"

namespace jax_natten::sm90 {

template <typename Config>
__device__ void consume(Shared<Config>& shared, const Maps& maps, const Tensor<float>& lse,
                        const Problem<kAxes>& problem, const typename Config::Shape& shape,
                        int number, const QueryTiles& tiles) {
  Consumer<Config> consumer(shared, shape, number);
  Epilogue<Config> epilogue{shared, maps, lse, problem, shape, number, consumer.is_leader};
  Cursor<2> plans;
  uint32_t parity = 0;
  tiles.for_each([&](unsigned) __attribute__((always_inline)) {
    Handover& handover = shared.plans[plans.place];
    shared.windows[plans.place].wait(plans.parity);
    const auto& plan = shared.plan[plans.place];
    Softmax softmax(shape.scale);
    float out[Consumer<Config>::kOutputs];
#pragma unroll
    for (float& x : out) x = 0;
    Handover& queries = shared.queries[number];
    queries.full.wait(parity);
    const auto give_queries_back = [&] {
      if (Config::kHasOut && consumer.is_leader) queries.free.arrive();
    };
    if (plan.tile_count() > 0) {
      consumer.run(plan, softmax, out, give_queries_back);
    } else {
      give_queries_back();
    }
    epilogue.run(plan, softmax, out);
    if (!Config::kHasOut && consumer.is_leader) queries.free.arrive();
    handover.free.arrive();
    plans.advance();
    parity ^= 1;
  });
  if (consumer.is_leader) wait_for_store_reads();
}

template <typename Config>
__global__ void __launch_bounds__(Config::kThreads, Config::kBlocks)
    forward_kernel(const __grid_constant__ Maps maps, const __grid_constant__ Tensor<float> lse,
                   const __grid_constant__ Problem<kAxes> problem,
                   const __grid_constant__ typename Config::Shape shape,
                   const __grid_constant__ QueryTiles tiles) {
  extern __shared__ __align__(1024) unsigned char memory[];
  auto& shared = *reinterpret_cast<Shared<Config>*>(memory);
  if (threadIdx.x == 0) shared.init_barriers();
  __syncthreads();
  // Uniform for the compiler too, since operands of products are.
  const int warpgroup = __shfl_sync(kAllLanes, static_cast<int>(threadIdx.x) / kWarpgroup, 0);
  if (warpgroup < Config::kConsumers) {
    if constexpr (Config::kMovesRegisters) take_registers<Config::kConsumerRegisters>();
    consume(shared, maps, lse, problem, shape, warpgroup, tiles);
  } else {
    if constexpr (Config::kMovesRegisters) give_registers<Config::kHelperRegisters>();
    const auto helper = static_cast<int>(threadIdx.x) - Config::kConsumers * kWarpgroup;
    if (helper < kWarp) {
      run_planner(shared, problem, shape, tiles);
    } else if (helper < 2 * kWarp) {
      Producer<Config>{shared, maps, problem, shape, {}}.run(tiles);
    } else if (Config::kHasMaskWriter && helper < 3 * kWarp) {
      run_mask_writer(shared, problem, shape, tiles);
    }
  }
}

}  // namespace jax_natten::sm90
