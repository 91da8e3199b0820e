// Defines Operation: the choice of an operation's kernel and its launch.
#pragma once

#include "cuda/sm80/backward.cuh"
#include "cuda/sm80/forward.cuh"
#include "cuda/sm80/tangent.cuh"
#include "cuda/sm80/unfused.cuh"

namespace jax_natten::sm80 {

template <typename Arrays, int Rank>
cudaError_t run_of_rank(cudaStream_t stream, const OperandsOf<Arrays, Rank>& operands) {
  const Problem<kAxes> problem = in_three_axes(operands.problem);
  if (!can_serve(problem)) return kNotServed;
  return run_operation(stream, static_cast<const Arrays&>(operands), problem, Rank);
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
