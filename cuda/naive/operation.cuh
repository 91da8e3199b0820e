// Defines run: the launch of an operation's kernels.
#pragma once

#include "cuda/naive/fused.cuh"
#include "cuda/naive/unfused.cuh"

namespace jax_natten::naive {

template <template <typename, int> class Operands, typename Element, int Rank>
cudaError_t run(cudaStream_t stream, const Operands<Element, Rank>& operands) {
  return run_operation(stream, operands);
}

}  // namespace jax_natten::naive
