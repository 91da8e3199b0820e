// The end of a tile of queries: out / total and lse to where they belong.
#pragma once

#include "cuda/sm90/mainloop.cuh"
#include "cuda/sm90/tensor_map.h"

namespace jax_natten::sm90 {

template <typename Config>
struct Epilogue {
  using Row = typename Config::ValueRow;
  static constexpr int kOutputs = Row::kDim / 2;
  using Element = typename Config::Element;

  Shared<Config>& shared;
  const Maps& maps;
  const Tensor<float>& lse;
  const Problem<kAxes>& problem;
  const Shape& shape;
  int number;  // of the consumer
  bool is_leader;

  // Outputs go to shared memory in the copy engine's order of a box, and it stores what of the box
  // lies in the array.
  __device__ __forceinline__ void store_outputs(const float (&out)[kOutputs],
                                                const float (&factor)[kLaneRows],
                                                const int (&query)[kAxes], int head, int sample) {
    constexpr int kUnits = Row::kChunkBytes / 16;
    unsigned char* memory = shared.out(number);
    const int lane = lane_id();
    const int row = warp_of_warpgroup() * 16 + lane % 16;
    const int swizzle = kUnits == 8 ? row % 8 : row / 2 % 4;
    if constexpr (Config::kHasOut) {
      if (is_leader) wait_for_store_reads();
      synchronize_warpgroup(1 + number);
    }
#pragma unroll
    for (int i = 0; i < Row::kDim / 16; ++i) {
      const int chunk = 2 * i / kUnits, unit = (2 * i % kUnits + lane / 16) ^ swizzle;
      const uint32_t address = shared_address(memory) + chunk * kRows * Row::kChunkBytes +
                               row * Row::kChunkBytes + unit * 16;
      const float* x = out + 8 * i;
      store_blocks(address, pair<Element>(x[0] * factor[0], x[1] * factor[0]),
                   pair<Element>(x[2] * factor[1], x[3] * factor[1]),
                   pair<Element>(x[4] * factor[0], x[5] * factor[0]),
                   pair<Element>(x[6] * factor[1], x[7] * factor[1]));
    }
    publish_writes();
    synchronize_warpgroup(1 + number);
    if (is_leader) {
#pragma unroll
      for (int chunk = 0; chunk < Row::kChunks; ++chunk) {
        store_box(&maps.out, shared_address(memory) + chunk * kRows * Row::kChunkBytes,
                  maps.values.corner(sample, query, head, chunk * Row::kChannels));
      }
      commit_stores();
      if constexpr (!Config::kHasOut) wait_for_store_reads();
    }
  }

  template <typename Plan>
  __device__ __forceinline__ void run(const Plan& plan, Softmax& softmax, float (&out)[kOutputs]) {
    softmax.finish();
    float factor[kLaneRows];
#pragma unroll
    for (int r = 0; r < kLaneRows; ++r) {
      int step[kAxes];
      int64_t token = 0;
      bool exists = lane_id() % 4 == 0;
      for (int a = 0; a < kAxes; ++a) {
        const auto length = static_cast<int>(problem.query_shape[a]);
        step[a] = step_of_row(shape, number, lane_row(r), a);
        const int index = plan.query[a] + step[a] * static_cast<int>(problem.window[a].dilation);
        exists = exists && index < length;
        token = token * length + index;
      }
      // Tiles without a mask are seen whole by the queries that see any key; others stay empty.
      const bool empty = !sees_any(plan, shape, step) || softmax.total[r] == 0;
      factor[r] = empty ? 0.f : reciprocal_of(softmax.total[r]);
      if (exists) {
        lse.head(plan.sample, plan.head).row(token)[0] = empty ? -INFINITY : softmax.lse(r);
      }
      if (__any_sync(kAllLanes, empty)) {  // of few warps
        for (int i = 0; i < kOutputs; ++i) {
          if (empty && i / 2 % 2 == r) out[i] = 0;
        }
      }
    }
    int query[kAxes];
    plan.first_query(problem, shape, number, query);
    store_outputs(out, factor, query, plan.head, plan.sample);
  }
};

}  // namespace jax_natten::sm90
