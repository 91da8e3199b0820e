// The beginning and the end of a tile of rows in a backward kernel: what the lane's queries have,
// and sums to where they belong.
#pragma once

#include "cuda/common/number.cuh"
#include "cuda/sm90/backward_mainloop.cuh"

namespace jax_natten::sm90 {

template <typename Config>
struct BackwardRows {
  using Element = typename Config::Element;
  using Row = typename Config::Row;
  using Sum = typename BackwardConsumer<Config>::Sum;

  BackwardShared<Config>& shared;
  const BackwardMaps& maps;
  const BackwardArrays<Element>& arrays;
  const Problem<kAxes>& problem;
  const BackwardShape& shape;
  int number;  // of the consumer
  bool is_leader;

  // The lane's share of a product of two rows, of which four lanes have each other unit of 16
  // bytes.
  __device__ __forceinline__ float product_share(const Element* a, const Element* b) const {
    constexpr int kElements = 16 / sizeof(Element);
    const int units = static_cast<int>(problem.value_dim) / kElements;
    float product = 0;
#pragma unroll
    for (int i = 0; i < Row::kDim / kElements / 4; ++i) {
      const int unit = 4 * i + lane_id() % 4;
      if (unit >= units) continue;
      const uint4 x = __ldg(reinterpret_cast<const uint4*>(a) + unit);
      const uint4 y = __ldg(reinterpret_cast<const uint4*>(b) + unit);
#pragma unroll
      for (int e = 0; e < kElements; ++e) {
        product += device::widen(reinterpret_cast<const Element*>(&x)[e]) *
                   device::widen(reinterpret_cast<const Element*>(&y)[e]);
      }
    }
    return product;
  }

  // The shift and delta = ct_lse - ct . out of the lane's rows, which are queries; delta goes to
  // the array too. It is 0 of a query that sees nothing.
  template <typename Plan>
  __device__ __forceinline__ void find_numbers(const Plan& plan, float (&shift)[kLaneRows],
                                               float (&delta)[kLaneRows]) const {
    const auto head = [&](const auto& tensor) { return tensor.head(plan.sample, plan.head); };
#pragma unroll
    for (int r = 0; r < kLaneRows; ++r) {
      int64_t token = 0;
      bool exists = true;
      for (int a = 0; a < kAxes; ++a) {
        const int step = step_of_row(shape, number, lane_row(r), a);
        const int64_t index = plan.query[a] + step * problem.window[a].dilation;
        exists = exists && index < problem.query_shape[a];
        token = token * problem.query_shape[a] + index;
      }
      float lse = -INFINITY, product = 0;
      if (exists) {
        lse = head(arrays.lse).row(token)[0];
        product = product_share(head(arrays.out).row(token), head(arrays.ct_out).row(token));
      }
      product += __shfl_xor_sync(kAllLanes, product, 1);
      product += __shfl_xor_sync(kAllLanes, product, 2);
      shift[r] = weight_shift(lse);
      delta[r] = lse == -INFINITY ? 0.f : head(arrays.ct_lse).row(token)[0] - product;
      if (exists && lane_id() % 4 == 0) head(arrays.delta).row(token)[0] = delta[r];
    }
  }

  // Sums go to shared memory in the copy engine's order of a box, where the rows were, and it
  // stores what of the box lies in the array. Rows that see nothing, or do not exist, become 0.
  template <typename Plan>
  __device__ __forceinline__ void store(const Plan& plan, const Sum (&sums)[Config::kSums]) const {
    constexpr int kUnits = Row::kChunkBytes / 16;
    const int lane = lane_id();
    const int row = warp_of_warpgroup() * 16 + lane % 16;
    const int swizzle = kUnits == 8 ? row % 8 : row / 2 % 4;
    bool any[kLaneRows];
#pragma unroll
    for (int r = 0; r < kLaneRows; ++r) {
      int step[kAxes];
#pragma unroll
      for (int a = 0; a < kAxes; ++a) step[a] = step_of_row(shape, number, lane_row(r), a);
      any[r] = sees_any(plan, shape, step);
    }
#pragma unroll
    for (int s = 0; s < Config::kSums; ++s) {
      const float factor = s == 0 ? shape.scale : 1.f;
      const auto finished = [&](int r, float x, float y) {
        return pair<Element>(any[r] ? x * factor : 0.f, any[r] ? y * factor : 0.f);
      };
#pragma unroll
      for (int i = 0; i < Row::kDim / 16; ++i) {
        const int chunk = 2 * i / kUnits, unit = (2 * i % kUnits + lane / 16) ^ swizzle;
        const uint32_t address = shared_address(shared.row[s][number]) +
                                 chunk * kRows * Row::kChunkBytes + row * Row::kChunkBytes +
                                 unit * 16;
        const float* x = sums[s] + 8 * i;
        store_blocks(address, finished(0, x[0], x[1]), finished(1, x[2], x[3]),
                     finished(0, x[4], x[5]), finished(1, x[6], x[7]));
      }
    }
    publish_writes();
    synchronize_warpgroup(1 + number);
    if (!is_leader) return;
    int at[kAxes];
    plan.first_query(problem, shape, number, at);
#pragma unroll
    for (int s = 0; s < Config::kSums; ++s) {
#pragma unroll
      for (int chunk = 0; chunk < Row::kChunks; ++chunk) {
        store_box(&maps.sum[s],
                  shared_address(shared.row[s][number]) + chunk * kRows * Row::kChunkBytes,
                  maps.channels[s].corner(plan.sample, at, plan.head, chunk * Row::kChannels));
      }
    }
    commit_stores();
    wait_for_store_reads();
  }
};

}  // namespace jax_natten::sm90
