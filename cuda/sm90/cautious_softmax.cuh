// The softmax where biases may put logits far apart. Powers beside the shift of earlier logits
// would be coarse then: the largest logit is found before weights are.
//   weight = exp2(factor * (logit - largest)), total = sum of weights, lse = log(total) + largest,
// with the largest logit so far. What was summed before is rescaled when it moves. In long sums it
// stays where it is as long as no weight passes 2^8: most tiles then need no rescaling.
#pragma once

#include "cuda/sm90/softmax.cuh"

namespace jax_natten::sm90 {

inline constexpr float kLogMostWeight = 8;

struct CautiousSoftmax {
  float factor;              // of logits, to powers of two; positive
  float largest[kLaneRows];  // logit, or a little less, before the factor
  float total[kLaneRows];    // of the lane's weights

  __device__ __forceinline__ explicit CautiousSoftmax(float scale)
      : factor(scale * kLog2E), largest{-INFINITY, -INFINITY}, total{0, 0} {}

  // Logits become weights; `shrink` is what earlier weights are to be multiplied by, 1 where the
  // result is false.
  template <bool kIsLong, int kCount>
  __device__ __forceinline__ bool add(float (&s)[kCount], float (&shrink)[kLaneRows]) {
    bool moves = !kIsLong;
#pragma unroll
    for (int r = 0; r < kLaneRows; ++r) {
      float top = largest[r];
#pragma unroll
      for (int run = 0; run < kCount / 4; ++run) {
        top = fmaxf(top, fmaxf(s[4 * run + 2 * r], s[4 * run + 2 * r + 1]));
      }
      top = fmaxf(top, __shfl_xor_sync(kAllLanes, top, 1));
      top = fmaxf(top, __shfl_xor_sync(kAllLanes, top, 2));
      if constexpr (kIsLong) {
        const bool grows = top * factor > largest[r] * factor + kLogMostWeight;
        if (!grows) top = largest[r];
        moves = moves || grows;
      }
      const float shift = top == -INFINITY ? 0.f : top * factor;
      shrink[r] = exp2_of(largest[r] * factor - shift);
      largest[r] = top;
      float sum = 0;
#pragma unroll
      for (int run = 0; run < kCount / 4; ++run) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float& x = s[4 * run + 2 * r + e];
          x = exp2_of(x * factor - shift);
          sum += x;
        }
      }
      total[r] = total[r] * shrink[r] + sum;
    }
    return moves;
  }

  // Weights in the order in which the product wants them, which is that of logits.
  template <typename Element, int kCount>
  __device__ __forceinline__ static void round(const float (&s)[kCount],
                                               uint32_t (&weights)[kCount / 2]) {
#pragma unroll
    for (int i = 0; i < kCount / 2; ++i) weights[i] = pair<Element>(s[2 * i], s[2 * i + 1]);
  }

  // After the last tile: totals of the queries.
  __device__ __forceinline__ void finish() { add_up(total); }

  __device__ __forceinline__ float lse(int r) const {
    return largest[r] * factor * kLn2 + logf(total[r]);
  }
};

}  // namespace jax_natten::sm90
