// Defines run: the choice of an operation's kernel, and its launch.
#pragma once

#include <type_traits>

#include "cuda/sm80/backward.cuh"
#include "cuda/sm80/forward.cuh"
#include "cuda/sm80/tangent.cuh"
#include "cuda/sm80/unfused.cuh"

namespace jax_natten::sm80 {

// Accurate float32 products take so many instructions that the naive kernels, which visit no pair
// in vain, win where tiles have so many times more pairs than there are.
inline constexpr int64_t kMostInVain = 4;

template <typename Operands>
bool is_worthwhile(const Problem<kAxes>& problem, int rank, const Operands&) {
  if (!std::is_base_of_v<FusedArrays<float>, Operands> &&
      !std::is_base_of_v<QkArrays<float>, Operands> &&
      !std::is_base_of_v<AvArrays<float>, Operands>) {
    return true;
  }
  int64_t pairs = problem.queries();
  for (int a = 0; a < kAxes; ++a) {
    const AxisWindow& window = problem.window[a];
    pairs *= geometry::min(window.kernel_size, positions(window, problem.key_shape[a]));
  }
  return problem.tf32 ||
         choose_tiling<Side::kQueries>(problem, rank, 64, 64).pairs <= kMostInVain * pairs;
}

template <template <typename, int> class Operands, typename Element, int Rank>
cudaError_t run(cudaStream_t stream, const Operands<Element, Rank>& operands) {
  const Problem<kAxes> problem = in_three_axes(operands.problem);
  if (!can_serve(problem) || !is_worthwhile(problem, Rank, operands)) return kNotServed;
  return run_operation(stream, operands, problem, Rank);
}

}  // namespace jax_natten::sm80
