// Biases of logits: (q k^T + bias / scale) * scale. The product adds to what the accumulators hold,
// so they begin with the biases, and adding them takes no instruction.
#pragma once

#include "cuda/sm90/bias.h"
#include "cuda/sm90/mask.cuh"

namespace jax_natten::sm90 {

// Brings the table of a plan's head, and finds the entries of its queries. All lanes of a warp.
template <typename Plan>
__device__ void plan_biases(Plan& plan, const Problem<kAxes>& problem, const BiasedShape& shape) {
  const int lane = lane_id();
  const float* table = shape.table.head(plan.sample, plan.head).data;
#pragma unroll 4
  for (int i = lane; i < shape.entries; i += kWarp) {
    plan.bias[shape.before + i] = __ldg(table + i) * shape.factor;
  }
  int first = 0;  // of the first key for the first query
  if (lane < kAxes) {
    const AxisQueries queries(problem, shape, plan.sample, lane, plan.query[lane]);
    const int64_t offset = plan.begin[lane] - queries.first.position;
    first = static_cast<int>(offset + problem.window[lane].kernel_size - 1) * shape.bias[lane];
  }
  first = shape.before + __reduce_add_sync(kAllLanes, first);
  for (int i = lane; i < Plan::kQueries; i += kWarp) {
    int entry = first;
    for (int a = 0; a < kAxes; ++a) {
      entry -= step_of_row(shape, i / kRows, i % kRows, a) * shape.bias[a];
    }
    plan.entry[i] = entry;
  }
}

// The biases of a lane's logits of a tile.
template <typename Plan, int kCount>
__device__ __forceinline__ void load_biases(float (&s)[kCount], const Plan& plan, const KeyBox& box,
                                            const BiasedShape& shape, int consumer) {
  const int entry = plan.entry[consumer * kRows + lane_row(0)] + 2 * (lane_id() % 4);
  const uint32_t tile = shared_address(plan.bias + entry + box.entry);
#pragma unroll
  for (int i = 0; i < kCount / 2; ++i) {
    const uint32_t pair = tile + shape.run[i / 2][i % 2];
    s[2 * i] = load_shared<0>(pair);
    s[2 * i + 1] = load_shared<1>(pair);
  }
}

}  // namespace jax_natten::sm90
