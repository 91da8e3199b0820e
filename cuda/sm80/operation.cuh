// Defines Operation: the choice of an operation's kernel and its launch.
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

template <typename Arrays>
bool is_worthwhile(const Problem<kAxes>& problem, int rank, const Arrays&) {
  if (!std::is_base_of_v<FusedArrays<float>, Arrays> && !std::is_same_v<QkArrays<float>, Arrays> &&
      !std::is_same_v<AvArrays<float>, Arrays>) {
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

template <typename Arrays, int Rank>
cudaError_t run_of_rank(cudaStream_t stream, const OperandsOf<Arrays, Rank>& operands) {
  const Problem<kAxes> problem = in_three_axes(operands.problem);
  const Arrays& arrays = operands;
  if (!can_serve(problem) || !is_worthwhile(problem, Rank, arrays)) return kNotServed;
  return run_operation(stream, arrays, problem, Rank);
}

template <template <typename, int> class Operands, typename Element>
cudaError_t Operation<Operands, Element>::run(cudaStream_t stream,
                                              const Operands<Element, 1>& operands) {
  return run_of_rank(stream, operands);
}

template <template <typename, int> class Operands, typename Element>
cudaError_t Operation<Operands, Element>::run(cudaStream_t stream,
                                              const Operands<Element, 2>& operands) {
  return run_of_rank(stream, operands);
}

template <template <typename, int> class Operands, typename Element>
cudaError_t Operation<Operands, Element>::run(cudaStream_t stream,
                                              const Operands<Element, 3>& operands) {
  return run_of_rank(stream, operands);
}

}  // namespace jax_natten::sm80
