// Defines Operation: the launch of an operation's kernels for every rank.
#pragma once

#include "cuda/naive/fused.cuh"
#include "cuda/naive/unfused.cuh"

namespace jax_natten::naive {

template <template <typename, int> class Operands, typename Element>
cudaError_t Operation<Operands, Element>::run(cudaStream_t stream,
                                              const Operands<Element, 1>& operands) {
  return run_operation(stream, operands);
}

template <template <typename, int> class Operands, typename Element>
cudaError_t Operation<Operands, Element>::run(cudaStream_t stream,
                                              const Operands<Element, 2>& operands) {
  return run_operation(stream, operands);
}

template <template <typename, int> class Operands, typename Element>
cudaError_t Operation<Operands, Element>::run(cudaStream_t stream,
                                              const Operands<Element, 3>& operands) {
  return run_operation(stream, operands);
}

}  // namespace jax_natten::naive
