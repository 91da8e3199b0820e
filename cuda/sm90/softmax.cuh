// The softmax of a lane's queries, whose keys come tile by tile:
//   weight = 2^(factor * logit - shift), total = sum of weights, lse = ln 2 (shift + log2(total)),
// by a shift near the largest factor * logit so far. Where it moves, what was summed before
// shrinks.
//
// Over few tiles it is the largest. In long sums it stays where it is as long as a tile's weights
// are 2^14 at most, which every type holds as exactly as 1. Their sums tell whether they are, so
// that exponentials need not wait for the largest logit.
#pragma once

#include "cuda/sm90/mask.cuh"

namespace jax_natten::sm90 {

inline constexpr float kLn2 = 0.6931471805599453f;
inline constexpr float kLog2E = 1.4426950408889634f;
inline constexpr float kMostWeight = 1 << 14;

// Sums of a lane become those of the lanes that share its queries.
__device__ __forceinline__ void add_up(float (&sums)[kLaneRows]) {
#pragma unroll
  for (float& sum : sums) {
    sum += __shfl_xor_sync(kAllLanes, sum, 1);
    sum += __shfl_xor_sync(kAllLanes, sum, 2);
  }
}

struct Softmax {
  float factor;            // of logits; positive
  float shift[kLaneRows];  // -inf, which counts as 0, before the query's first key
  float total[kLaneRows];  // of the lane's weights

  __device__ __forceinline__ explicit Softmax(float scale)
      : factor(scale * kLog2E), shift{-INFINITY, -INFINITY}, total{0, 0} {}

  // The weights of a tile's logits, as operands of a product, by shifts that are moved to the
  // largest. What was summed before is to be multiplied by `shrink`.
  template <typename Element, int kCount>
  __device__ __forceinline__ void add(const float (&s)[kCount], uint32_t (&weights)[kCount / 2],
                                      float (&shrink)[kLaneRows]) {
    float sum[kLaneRows];
    move(s, shrink);
    weigh<Element>(s, weights, sum);
#pragma unroll
    for (int r = 0; r < kLaneRows; ++r) total[r] += sum[r];
  }

  // The same in a long sum. `sees`: whether the lane's queries see any of the lane's keys. Shifts
  // stay, and `shrink` is not set, where the result is false, which it is for all lanes of a warp.
  template <typename Element, int kCount>
  __device__ __forceinline__ bool add_to_many(float (&s)[kCount], const bool (&sees)[kLaneRows],
                                              uint32_t (&weights)[kCount / 2],
                                              float (&shrink)[kLaneRows]) {
    float sum[kLaneRows];
    weigh<Element>(s, weights, sum);
    bool fits = true;
#pragma unroll
    for (int r = 0; r < kLaneRows; ++r) {
      const bool is_first = shift[r] == -INFINITY && sees[r];
      fits = fits && !is_first && sum[r] <= kMostWeight;
    }
    const bool moves = __any_sync(kAllLanes, !fits);
    if (moves) {
      pin(s);  // else products with the factor would be kept for this
      move(s, shrink);
      weigh<Element>(s, weights, sum);
    }
#pragma unroll
    for (int r = 0; r < kLaneRows; ++r) total[r] += sum[r];
    return moves;
  }

  // After the last tile: totals of the queries.
  __device__ __forceinline__ void finish() { add_up(total); }

  __device__ __forceinline__ float lse(int r) const { return shift[r] * kLn2 + logf(total[r]); }

 private:
  __device__ __forceinline__ float finite_shift(int r) const {
    return shift[r] == -INFINITY ? 0.f : shift[r];
  }

  // Moves shifts up to the largest logits, or to the first.
  template <int kCount>
  __device__ __forceinline__ void move(const float (&s)[kCount], float (&shrink)[kLaneRows]) {
#pragma unroll
    for (int r = 0; r < kLaneRows; ++r) {
      float top = -INFINITY;
#pragma unroll
      for (int run = 0; run < kCount / 4; ++run) {
        top = fmaxf(top, fmaxf(s[4 * run + 2 * r], s[4 * run + 2 * r + 1]));
      }
      top = fmaxf(top, __shfl_xor_sync(kAllLanes, top, 1));
      top = fmaxf(top, __shfl_xor_sync(kAllLanes, top, 2));
      const float before = shift[r];
      shift[r] = fmaxf(before, top * factor);
      shrink[r] = exp2_of(before - finite_shift(r));
      total[r] *= shrink[r];
    }
  }

  // Weights by the shifts as they are, and the sum of the lane's.
  template <typename Element, int kCount>
  __device__ __forceinline__ void weigh(const float (&s)[kCount], uint32_t (&weights)[kCount / 2],
                                        float (&sum)[kLaneRows]) const {
    const float finite[kLaneRows] = {finite_shift(0), finite_shift(1)};
    sum[0] = sum[1] = 0;
#pragma unroll
    for (int i = 0; i < kCount / 2; ++i) {
      const float low = exp2_of(s[2 * i] * factor - finite[i % 2]);
      const float high = exp2_of(s[2 * i + 1] * factor - finite[i % 2]);
      sum[i % 2] += low;
      sum[i % 2] += high;
      weights[i] = pair<Element>(low, high);
    }
  }
};

}  // namespace jax_natten::sm90
