// The kernels that there are for each head dim, and what they take, in cycles of a multiprocessor
// as measured on an H100: for a block, and for a tile of keys with and without a mask.
//
// Large blocks for windows of many tiles: the queries of two or three consumers read each key once.
// Small ones for small windows, several on a multiprocessor, which hide each other's beginnings and
// ends and have fewer keys that only some of their queries see.
#pragma once

#include "cuda/sm90/config.cuh"

namespace jax_natten::sm90 {

template <typename Config_, int kBlock, int kRim, int kInner>
struct Choice {
  using Config = Config_;
  static constexpr Costs kCosts{kBlock, kRim, kInner};
};

template <typename...>
struct Choices {};

template <typename Element, int kDim>
struct Kernels;

template <typename Element, int kDim>
using KernelsOf = typename Kernels<Element, kDim>::Type;

template <typename Element>
struct Kernels<Element, 32> {
  using Type = Choices<Choice<Config<Element, 32, 128, 3, 4, 1, true>, 8000, 2700, 2300>,
                       Choice<Config<Element, 32, 64, 1, 4, 4, false>, 2500, 470, 420>>;
};

template <typename Element>
struct Kernels<Element, 64> {
  using Type = Choices<Choice<Config<Element, 64, 128, 3, 4, 1, true>, 8000, 3150, 2700>,
                       Choice<Config<Element, 64, 128, 1, 2, 2, false>, 2200, 1340, 1230>,
                       Choice<Config<Element, 64, 64, 1, 3, 3, false>, 2250, 700, 640>>;
};

template <typename Element>
struct Kernels<Element, 96> {
  using Type = Choices<Choice<Config<Element, 96, 128, 2, 3, 1, true>, 8000, 2300, 2100>>;
};

template <typename Element>
struct Kernels<Element, 128> {
  using Type = Choices<Choice<Config<Element, 128, 128, 2, 2, 1, true>, 5000, 2800, 2600>>;
};

template <typename Element>
struct Kernels<Element, 192> {
  using Type = Choices<Choice<Config<Element, 192, 96, 2, 2, 1, true>, 6000, 3200, 3000>>;
};

template <typename Element>
struct Kernels<Element, 256> {
  using Type = Choices<Choice<Config<Element, 256, 64, 2, 2, 1, true>, 7000, 3100, 2900>>;
};

}  // namespace jax_natten::sm90
