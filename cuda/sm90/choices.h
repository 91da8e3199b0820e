// The kernels that there are, and the choice of one and its shape, on the host.

// Large blocks for windows of many tiles: the queries of two or three consumers read each key once.
// Small ones for small windows, several on a multiprocessor, which hide each other's beginnings and
// ends and have fewer keys that only some of their queries see.
#pragma once

#include <cstddef>
#include <iterator>

#include "cuda/sm90/serve.h"

namespace jax_natten::sm90 {

// What a kernel is compiled for (see Config), and what it takes, as measured on an H100.
struct Kernel {
  int dim;
  int keys;
  int consumers;
  int stages;
  int blocks;
  bool overlaps;
  Costs costs;
};

// clang-format off
inline constexpr Kernel kKernels[] = {
    { 32, 128, 3, 4, 1, true,  {8000, 2700, 2300}},
    { 32,  64, 1, 4, 4, false, {2500,  470,  420}},
    { 64, 128, 3, 4, 1, true,  {8000, 3150, 2700}},
    { 64, 128, 1, 2, 2, false, {2200, 1340, 1230}},
    { 64,  64, 1, 3, 3, false, {2250,  700,  640}},
    { 96, 128, 2, 3, 1, true,  {8000, 2300, 2100}},
    {128, 128, 2, 2, 1, true,  {5000, 2800, 2600}},
    {192,  96, 2, 2, 1, true,  {6000, 3200, 3000}},
    {256,  64, 2, 2, 1, true,  {7000, 3100, 2900}},
};
// clang-format on
inline constexpr int kKernelCount = static_cast<int>(std::size(kKernels));

// A kernel, and its best shape for a problem.
struct Choice {
  int kernel;  // negative where none serves the problem
  Shape shape;
};

// The least costly of the kernels that serve a problem.
inline Choice choose(const Problem<kAxes>& problem, int rank, bool has_bias) {
  Choice best{-1, {}};
  if (!can_serve(problem, rank, has_bias)) return best;
  for (int i = 0; i < kKernelCount; ++i) {
    const Kernel& kernel = kKernels[i];
    if (kernel.dim != problem.dim) continue;
    const Shape shape = choose_shape(problem, rank, kernel.consumers, kernel.keys, kernel.costs);
    if (shape.cost < 0 || (best.kernel >= 0 && shape.cost >= best.shape.cost)) continue;
    best = {i, shape};
  }
  return best;
}

}  // namespace jax_natten::sm90
