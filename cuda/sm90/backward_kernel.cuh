// The backward kernel: a block has a planner, loaders and consumers, which go through its tiles of
// queries or keys.
#pragma once

#include "cuda/sm90/backward_epilogue.cuh"

namespace jax_natten::sm90 {

template <typename Config>
__device__ void consume(BackwardShared<Config>& shared, const BackwardMaps& maps,
                        const BackwardArrays<typename Config::Element>& arrays,
                        const Problem<kAxes>& problem, const BackwardShape& shape, int number,
                        const QueryTiles& tiles) {
  using Consumer = BackwardConsumer<Config>;
  const int heads = Config::kRowsAreKeys ? static_cast<int>(problem.group()) : 1;
  const bool is_leader = threadIdx.x % kWarpgroup == 0;
  Consumer consumer(shared, shape, number);
  const BackwardRows<Config> rows{shared, maps, arrays, problem, shape, number, is_leader};
  Counter<2> plans;
  tiles.for_each([&](unsigned) __attribute__((always_inline)) {
    shared.windows[plans.place()].wait(plans.parity());
    const auto& plan = shared.plan[plans.place()];
    float shift[kLaneRows] = {}, delta[kLaneRows] = {};
    if constexpr (!Config::kRowsAreKeys) rows.find_numbers(plan, shift, delta);
    typename Consumer::Sum sums[Config::kSums];
#pragma unroll
    for (auto& sum : sums) {
#pragma unroll
      for (float& x : sum) x = 0;
    }
    Handover& handover = shared.rows[number];
    handover.full.wait(plans.count % 2);
    consumer.run(plan, heads, shift, delta, sums);
    rows.store(plan, sums);
    if (is_leader) handover.free.arrive();
    shared.plans[plans.place()].free.arrive();
    ++plans.count;
  });
}

template <typename Config>
__global__ void __launch_bounds__(Config::kThreads, Config::kBlocks)
    backward_kernel(const __grid_constant__ BackwardMaps maps,
                    const __grid_constant__ BackwardArrays<typename Config::Element> arrays,
                    const __grid_constant__ Problem<kAxes> problem,
                    const __grid_constant__ BackwardShape shape,
                    const __grid_constant__ QueryTiles tiles) {
  extern __shared__ __align__(1024) unsigned char memory[];
  auto& shared = *reinterpret_cast<BackwardShared<Config>*>(memory);
  if (threadIdx.x == 0) shared.init_barriers();
  __syncthreads();
  // Uniform for the compiler too, since operands of products are.
  const int warpgroup = __shfl_sync(kAllLanes, static_cast<int>(threadIdx.x) / kWarpgroup, 0);
  if (warpgroup < Config::kConsumers) {
    take_registers<Config::kConsumerRegisters>();
    consume(shared, maps, arrays, problem, shape, warpgroup, tiles);
  } else {
    give_registers<Config::kHelperRegisters>();
    const auto helper = static_cast<int>(threadIdx.x) - Config::kConsumers * kWarpgroup;
    BackwardHelpers<Config> helpers{shared, maps, arrays, problem, shape};
    if (helper < kWarp) {
      helpers.plan_all(tiles);
    } else if (helper == kWarp) {
      helpers.load_all(tiles);
    } else if (helper / kWarp == 2) {
      helpers.finish_columns(tiles);
    } else if (helper / kWarp == 3) {
      helpers.write_masks(tiles);
    }
  }
}

}  // namespace jax_natten::sm90
