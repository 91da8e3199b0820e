// Biases of logits: (q k^T + bias / scale) * scale. The product adds to what the accumulators hold,
// so they begin with the biases, and adding them takes no instruction.
#pragma once

#include "cuda/sm90/bias.h"
#include "cuda/sm90/mask.cuh"

namespace jax_natten::sm90 {

// How far back rows have their entries. All lanes of a warp.
template <int kCount>
__device__ void find_rows(int (&row_bias)[kCount], const BiasedShape& shape) {
  for (int i = lane_id(); i < kCount; i += kWarp) {
    row_bias[i] = 0;
    for (int a = 0; a < kAxes; ++a) {
      row_bias[i] += step_of_row(shape, i / kRows, i % kRows, a) * shape.bias[a];
    }
  }
}

// Brings the table of a plan's head. All lanes of a warp.
template <typename Plan>
__device__ void bring_biases(Plan& plan, const BiasedShape& shape) {
  const float* table = shape.table.head(plan.sample, plan.head).data;
#pragma unroll 8
  for (int i = lane_id(); i < shape.entries; i += kWarp) {
    plan.bias[shape.before + i] = __ldg(table + i) * shape.factor;
  }
}

// The entry of the first key of a tile for the block's first query.
template <typename Plan>
__device__ __forceinline__ int first_bias(const Plan& plan, const Problem<kAxes>& problem,
                                          const BiasedShape& shape, const int (&tile)[kAxes]) {
  int entry = shape.before;
#pragma unroll
  for (int a = 0; a < kAxes; ++a) {
    const int key = plan.begin[a] + tile[a] * shape.keys[a];
    const int center = static_cast<int>(problem.window[a].kernel_size) - 1;
    entry += (key - plan.position[a] + center) * shape.bias[a];
  }
  return entry;
}

// The biases of a lane's logits of a tile, whose first one is that of the lane's first query.
template <int kCount>
__device__ __forceinline__ void load_biases(float (&s)[kCount], const float* first,
                                            const BiasedShape& shape) {
  const uint32_t tile = shared_address(first + 2 * (lane_id() % 4));
#pragma unroll
  for (int i = 0; i < kCount / 2; ++i) {
    const uint32_t pair = tile + shape.run[i / 2][i % 2];
    s[2 * i] = load_shared<0>(pair);
    s[2 * i + 1] = load_shared<1>(pair);
  }
}

}  // namespace jax_natten::sm90
