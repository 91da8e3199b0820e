// Defines run: the choice of an operation's kernel, and its launch.
#pragma once

#include <type_traits>

#include "cuda/sm80/backward.cuh"
#include "cuda/sm80/forward.cuh"
#include "cuda/sm80/tangent.cuh"
#include "cuda/sm80/unfused.cuh"

namespace jax_natten::sm80 {

// Accurate float32 products take so many instructions that the naive kernels, which visit few pairs
// in vain, win where tiles have so many times more pairs than there are.
template <template <typename, int> class Operands>
inline constexpr double kMostInVain = 1.6;
template <>
inline constexpr double kMostInVain<BackwardOperands> = 1.2;
template <>
inline constexpr double kMostInVain<QkOperands> = 1.3;
template <>
inline constexpr double kMostInVain<AvOperands> = 1;
template <>
inline constexpr double kMostInVain<InverseOperands> = 3;

inline bool is_worthwhile(const Problem<kAxes>& problem, int rank, double most_in_vain) {
  auto pairs = static_cast<double>(problem.queries());
  for (int a = 0; a < kAxes; ++a) {
    const AxisWindow& window = problem.window[a];
    const int64_t length = positions(window, problem.key_shape[a]);
    pairs *= static_cast<double>(geometry::min(window.kernel_size, length));
  }
  const auto visited = choose_tiling<Side::kQueries>(problem, rank, 64, 64).pairs;
  return static_cast<double>(visited) <= most_in_vain * pairs;
}

template <template <typename, int> class Operands, typename Element, int Rank>
cudaError_t run(cudaStream_t stream, const Operands<Element, Rank>& operands) {
  const Problem<kAxes> problem = in_three_axes(operands.problem);
  if (!can_serve(problem)) return kNotServed;
  if (std::is_same_v<Element, float> && !problem.tf32 &&
      !is_worthwhile(problem, Rank, kMostInVain<Operands>)) {
    return kNotServed;
  }
  return run_operation(stream, operands, problem, Rank);
}

}  // namespace jax_natten::sm80
