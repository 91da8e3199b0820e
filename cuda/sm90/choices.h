// The kernels that there are, and the choice of one and its shape, on the host.

// Large blocks for windows of many tiles: the queries of two or three consumers read each key once.
// Small ones for small windows, several on a multiprocessor, which hide each other's beginnings and
// ends and have fewer keys that only some of their queries see. Of large blocks, three consumers
// with smaller tiles are faster where most tiles need a mask, as in 3-D.
#pragma once

#include <iterator>
#include <limits>

#include "cuda/sm90/bias.h"
#include "cuda/sm90/serve.h"

namespace jax_natten::sm90 {

// What a kernel is compiled for (see Config), and what it takes, as measured on an H100.
struct Kernel {
  int dim;        // of queries and keys, at most
  int value_dim;  // of values, at most
  int keys;
  int consumers;
  int stages;
  int blocks;
  bool overlaps;
  int biases;  // room for entries of a head's table; none without
  Costs costs;
};

// clang-format off
inline constexpr Kernel kKernels[] = {
    { 32,  32, 128, 3, 4, 1, true,     0, {8000, 2550, 2300}},
    { 32,  32,  64, 1, 4, 4, false,    0, {2500,  450,  420}},
    { 32,  32, 128, 3, 4, 1, true,  8000, {8000, 2850, 2600}},
    { 32,  32,  64, 1, 4, 4, false, 1660, {2600,  520,  490}},
    { 64,  64, 128, 3, 4, 1, true,     0, {11000, 2530, 2300}},
    { 64,  64, 128, 1, 2, 2, false,    0, {2200, 1300, 1230}},
    { 64,  64,  64, 1, 3, 3, false,    0, {2250,  672,  640}},
    { 64,  64, 128, 3, 4, 1, true,  7400, {8000, 3330, 3050}},
    { 64,  64,  64, 1, 3, 3, false, 1670, {2350,  747,  715}},
    { 64, 128, 128, 2, 3, 1, true,     0, {6000, 2225, 2100}},
    { 96,  96, 128, 2, 3, 1, true,     0, {8000, 2500, 1950}},
    { 96,  96,  96, 3, 4, 1, true,     0, {10000, 2460, 2320}},
    { 96,  96,  64, 1, 3, 2, false,    0, {2600,  925,  880}},
    { 96,  96, 128, 2, 3, 1, true,  6300, {8000, 2525, 2400}},
    { 96,  96,  64, 1, 3, 2, false, 1500, {2800, 1000,  955}},
    {128, 128, 128, 2, 2, 1, true,     0, {7500, 2725, 2600}},
    {128, 128,  80, 3, 3, 1, true,     0, {11000, 2420, 2400}},
    {128, 128,  64, 1, 2, 2, false,    0, {2700, 1040, 1000}},
    {128, 128, 128, 2, 2, 1, true,  7600, {7500, 3025, 2900}},
    {128, 128,  64, 1, 2, 2, false, 1500, {2900, 1115, 1075}},
    {192, 128, 128, 2, 2, 1, true,     0, {6000, 3525, 3400}},
    {192, 192,  96, 2, 2, 1, true,     0, {6000, 3130, 3000}},
    {256, 256,  64, 2, 2, 1, true,     0, {7000, 3040, 2900}},
};
// clang-format on
inline constexpr int kKernelCount = static_cast<int>(std::size(kKernels));

// A kernel, and its best shape for a problem.
struct Choice {
  int kernel;  // negative where none serves the problem
  Shape shape;
};

// Whether a kernel serves a problem, whose rows it pads with zeros.
inline bool serves(const Kernel& kernel, const Problem<kAxes>& problem, bool has_bias) {
  const bool pads = problem.dim < kernel.dim || problem.value_dim < kernel.value_dim;
  return (kernel.biases > 0) == has_bias && problem.dim <= kernel.dim &&
         problem.value_dim <= kernel.value_dim && (!pads || has_padded_maps(problem));
}

// Of the kernels that serve a problem those that pad the least, of these the least costly.
inline Choice choose(const Problem<kAxes>& problem, int rank, bool has_bias) {
  Choice best{-1, {}};
  if (!can_serve(problem, rank, has_bias)) return best;
  KnownBlocks<> blocks(problem);
  int least = std::numeric_limits<int>::max();  // channels of keys and values
  for (int i = 0; i < kKernelCount; ++i) {
    const Kernel& kernel = kKernels[i];
    const int channels = kernel.dim + kernel.value_dim;
    if (!serves(kernel, problem, has_bias) || channels > least) continue;
    const Shape shape = choose_shape(blocks, rank, kernel.consumers, kernel.keys, kernel.costs);
    if (shape.cost < 0 || (channels == least && shape.cost >= best.shape.cost)) continue;
    if (has_bias && with_biases(shape, problem, {}).room > kernel.biases) continue;
    best = {i, shape};
    least = channels;
  }
  return best;
}

}  // namespace jax_natten::sm90
