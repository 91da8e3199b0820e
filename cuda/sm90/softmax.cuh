// The softmax of a lane's queries, whose keys come tile by tile:
//   weight = 2^(factor * logit - shift), total = sum of weights, lse = ln 2 (shift + log2(total)),
// by a shift near the largest factor * logit so far. Where it moves, what was summed before
// shrinks. It stays where it is as long as weights are 2^14 at most, which every type holds as
// exactly as 1.
//
// In sums over many tiles the sums of weights tell whether they are, so that exponentials need not
// wait for the largest logit; where they are not, weights are taken anew. Over few tiles, of which
// many are the first that some query sees, or where registers do not hold the logits for that, the
// largest logits of the lanes tell.
#pragma once

#include "cuda/sm90/mask.cuh"

namespace jax_natten::sm90 {

inline constexpr float kLn2 = 0.6931471805599453f;
inline constexpr float kLog2E = 1.4426950408889634f;
inline constexpr int kMostLogWeight = 14;
inline constexpr float kMostWeight = 1 << kMostLogWeight;

struct Softmax {
  float factor;            // of logits; positive
  float shift[kLaneRows];  // -inf, which counts as 0, before the query's first key
  float total[kLaneRows];  // of the lane's weights

  __device__ __forceinline__ explicit Softmax(float scale)
      : factor(scale * kLog2E), shift{-INFINITY, -INFINITY}, total{0, 0} {}

  // The weights of a tile's logits, as operands of a product. `sees`: whether the lane's queries
  // see any of the lane's keys; is_first: whether nothing was added before. Shifts move at a
  // query's first key and where they have to. If so, for all lanes of a warp, the result is true
  // and what was summed before is to be multiplied by `shrink`, which is not set else.
  template <typename Element, bool kKeepsLogits, int kCount>
  __device__ __forceinline__ bool add(float (&s)[kCount], const bool (&sees)[kLaneRows],
                                      bool is_first, uint32_t (&weights)[kCount / 2],
                                      float (&shrink)[kLaneRows]) {
    float sum[kLaneRows], top[kLaneRows];
    bool moves = is_first;
    if constexpr (kKeepsLogits) {
      if (!is_first) {
        weigh<Element>(s, weights, sum);
        moves = any_row([&](int r) { return sees_first(r, sees) || !(sum[r] <= kMostWeight); });
      }
      if (moves) {
        pin(s);  // else products with the factor would be kept for this
        find_largest(s, top);
        move(top, shrink);
        weigh<Element>(s, weights, sum);
      }
    } else {
      find_largest(s, top);
      moves = any_row([&](int r) {
        return sees_first(r, sees) || !(top[r] * factor <= shift[r] + kMostLogWeight);
      });
      if (moves) move(top, shrink);
      weigh<Element>(s, weights, sum);
    }
#pragma unroll
    for (int r = 0; r < kLaneRows; ++r) total[r] += sum[r];
    return moves;
  }

  // After the last tile: a lane's totals become those of the lanes that share its queries.
  __device__ __forceinline__ void finish() {
#pragma unroll
    for (float& sum : total) {
      sum += __shfl_xor_sync(kAllLanes, sum, 1);
      sum += __shfl_xor_sync(kAllLanes, sum, 2);
    }
  }

  __device__ __forceinline__ float lse(int r) const {
    return kLn2 * (shift[r] + log2_of(total[r]));
  }

 private:
  // Whether something holds for any query of any lane of the warp.
  template <typename Predicate>
  __device__ __forceinline__ static bool any_row(Predicate&& predicate) {
    bool any = false;
#pragma unroll
    for (int r = 0; r < kLaneRows; ++r) any = any || predicate(r);
    return __any_sync(kAllLanes, any);
  }

  __device__ __forceinline__ bool sees_first(int r, const bool (&sees)[kLaneRows]) const {
    return shift[r] == -INFINITY && sees[r];
  }

  __device__ __forceinline__ float finite_shift(int r) const {
    return shift[r] == -INFINITY ? 0.f : shift[r];
  }

  // The largest of the lane's logits.
  template <int kCount>
  __device__ __forceinline__ static void find_largest(const float (&s)[kCount],
                                                      float (&top)[kLaneRows]) {
#pragma unroll
    for (int r = 0; r < kLaneRows; ++r) {
      top[r] = -INFINITY;
#pragma unroll
      for (int run = 0; run < kCount / 4; ++run) {
        top[r] = fmaxf(top[r], fmaxf(s[4 * run + 2 * r], s[4 * run + 2 * r + 1]));
      }
    }
  }

  // Moves shifts up to the largest logits, or to the first.
  __device__ __forceinline__ void move(float (&top)[kLaneRows], float (&shrink)[kLaneRows]) {
#pragma unroll
    for (int r = 0; r < kLaneRows; ++r) {
      top[r] = fmaxf(top[r], __shfl_xor_sync(kAllLanes, top[r], 1));
      top[r] = fmaxf(top[r], __shfl_xor_sync(kAllLanes, top[r], 2));
      const float before = shift[r];
      shift[r] = fmaxf(before, top[r] * factor);
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
