// Softmax over batches of logits as they come.
#pragma once

#include <cmath>

#include "cuda/naive/lanes.cuh"

namespace jax_natten::naive {

template <typename T>
__device__ T nothing() {
  return static_cast<T>(-INFINITY);
}

// Of the lane's first row, and with it of every row. Sums are of exp(s - shift()). A NaN is never
// the largest logit, but enters the sums.
template <typename Group>
class Softmax {
 public:
  using Sum = typename Group::Sum;

  __device__ Sum shift() const { return largest_ == nothing<Sum>() ? Sum{0} : largest_; }

  // The total of all weights.
  __device__ Sum sum() const {
    return Group::over_row(total_, [](Sum a, Sum b) { return a + b; });
  }

  // Weights of the lane's own pairs, whose logits are given; rescales the rows' sums if it must.
  __device__ typename Group::Own weights(const typename Group::Own& s,
                                         Piece<Sum> (&sums)[Group::kRows]) {
    Sum next = s.value[0];
    for (int o = 1; o < Group::kOwn; ++o) next = max(next, s.value[o]);
    if (__any_sync(kAllLanes, next > largest_ + kSlack)) {
      next = Group::over_row(next, [](Sum a, Sum b) { return max(a, b); });
      const Sum before = largest_;
      if (next > largest_ + kSlack) largest_ = next;
      const Sum shrink = exp(before - shift());
      total_ *= shrink;
      for (int i = 0; i < Group::kRows; ++i) sums[i].scale(Group::of_row(shrink, i));
    }
    typename Group::Own weights;
    for (int o = 0; o < Group::kOwn; ++o) {
      weights.value[o] = exp(s.value[o] - shift());
      total_ += weights.value[o];
    }
    return weights;
  }

 private:
  // Logits may pass the one that shifts them by so much: sums are seldom rescaled.
  static constexpr Sum kSlack = 8;

  Sum largest_ = nothing<Sum>();
  Sum total_ = 0;  // of the lane's own weights
};

}  // namespace jax_natten::naive
