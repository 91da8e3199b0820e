// The backward kernels that there are, and the choice of them and their shapes, on the host.
#pragma once

#include <iterator>

#include "cuda/sm90/choices.h"

namespace jax_natten::sm90 {

// What a backward kernel is compiled for (see BackwardConfig), and what it takes, as measured on an
// H100. Cycles are of 1.6 GHz: at the power limit, where rows of long windows run.
struct BackwardKernel {
  Side side;
  int dim;  // of all rows, at most
  int columns;
  int consumers;
  int stages;
  int blocks;
  bool overlaps;
  bool wants_cache;  // serves heads whose columns the cache holds; it would wait for others
  Costs costs;
};

// clang-format off
inline constexpr BackwardKernel kBackwardKernels[] = {
    {Side::kQueries,  64, 128, 2, 4, 1, true,  false, { 8500, 2480, 2200}},
    {Side::kQueries,  64,  64, 1, 4, 2, true,  false, { 4300,  720,  680}},
    {Side::kKeys,     64,  96, 2, 4, 1, true,  false, { 9000, 2500, 2100}},
    {Side::kKeys,     64,  64, 1, 4, 2, true,  false, { 3300, 1000,  900}},
    {Side::kQueries, 128, 128, 2, 2, 1, true,  false, {10000, 3950, 3900}},
    {Side::kQueries, 128,  64, 1, 2, 2, true,  false, { 5000, 1150, 1040}},
    {Side::kKeys,    128,  64, 2, 4, 1, false, false, {12000, 2900, 2900}},
    {Side::kKeys,    128,  64, 1, 2, 2, false, true,  { 5500, 1500, 1400}},
};
// clang-format on
inline constexpr int kBackwardKernelCount = static_cast<int>(std::size(kBackwardKernels));

// What the portable kernels of tensor cores take for a head, by their tiles of 64 rows.
inline double portable_backward_cost(const Problem<kAxes>& problem, int rank) {
  constexpr int kTile = 64;
  constexpr double kTileCycles = 3000;
  const double pair_cycles = geometry::max(problem.dim, problem.value_dim) > 64 ? 0.56 : 0.35;
  const auto tiles = static_cast<double>(problem.queries() + problem.keys()) / kTile;
  const double pairs = choose_tiling<Side::kQueries>(problem, rank, kTile, kTile).pairs +
                       choose_tiling<Side::kKeys>(problem, rank, kTile, kTile).pairs;
  return kTileCycles * tiles + pair_cycles * pairs;
}

// Whether the near half of a Hopper GPU's cache holds the columns of a head.
template <Side kSide>
bool fits_cache(const Problem<kAxes>& problem) {
  constexpr int64_t kCacheBytes = int64_t{25} << 20;
  return head_bytes<kSide>(problem) <= kCacheBytes;
}

// The kernel of a side for a problem that pads the least, of these the least costly, and its shape.
template <Side kSide>
Choice choose_backward_of(const Problem<kAxes>& problem, int rank) {
  Choice best{-1, {}};
  KnownBlocks<kSide> blocks(problem);
  int least = std::numeric_limits<int>::max();  // channels
  for (int i = 0; i < kBackwardKernelCount; ++i) {
    const BackwardKernel& kernel = kBackwardKernels[i];
    const bool pads = problem.dim < kernel.dim || problem.value_dim < kernel.dim;
    const int64_t dim = geometry::max(problem.dim, problem.value_dim);
    if (kernel.side != kSide || dim > kernel.dim || kernel.dim > least) continue;
    if (pads && !has_padded_maps(problem)) continue;
    if (kernel.wants_cache && !fits_cache<kSide>(problem)) continue;
    const Shape shape = choose_shape(blocks, rank, kernel.consumers, kernel.columns, kernel.costs);
    if (shape.cost < 0 || (kernel.dim == least && shape.cost >= best.shape.cost)) continue;
    best = {i, shape};
    least = kernel.dim;
  }
  return best;
}

// The kernels of both sides.
struct BackwardChoice {
  Choice queries;
  Choice keys;

  bool is_served() const { return queries.kernel >= 0 && keys.kernel >= 0; }
};

// Those for a problem, where they serve it.
inline BackwardChoice find_backward(const Problem<kAxes>& problem, int rank, bool has_bias) {
  constexpr int64_t kLeastDim = 40;  // shorter rows would be mostly zeros
  if (has_bias || geometry::max(problem.dim, problem.value_dim) < kLeastDim ||
      !can_serve(problem, rank, false)) {
    return {{-1, {}}, {-1, {}}};
  }
  return {choose_backward_of<Side::kQueries>(problem, rank),
          choose_backward_of<Side::kKeys>(problem, rank)};
}

// Those for a problem, where they are faster than the portable kernels, which visit fewer pairs in
// vain where windows are small.
inline BackwardChoice choose_backward(const Problem<kAxes>& problem, int rank, bool has_bias) {
  constexpr double kLeastGain = 1.07;
  const BackwardChoice choice = find_backward(problem, rank, has_bias);
  if (!choice.is_served()) return choice;
  const double cost = choice.queries.shape.cost + choice.keys.shape.cost;  // of a head of queries
  const bool is_faster = kLeastGain * cost <= portable_backward_cost(problem, rank);
  return is_faster ? choice : BackwardChoice{{-1, {}}, {-1, {}}};
}

}  // namespace jax_natten::sm90
