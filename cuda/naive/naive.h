// The naive kernels as the dispatcher calls them: every operation, any GPU, any element type.
//
// This header only declares them; the .cuh files define them, and every generated source compiles
// one operation for one element type.
#pragma once

#include <cuda_runtime.h>

#include "cpu/operands.h"

namespace jax_natten::naive {

// One operation, given by its operands' template, on one element type; all ranks.
template <template <typename, int> class Operands, typename Element>
struct Operation {
  static cudaError_t run(cudaStream_t, const Operands<Element, 1>&);
  static cudaError_t run(cudaStream_t, const Operands<Element, 2>&);
  static cudaError_t run(cudaStream_t, const Operands<Element, 3>&);
};

}  // namespace jax_natten::naive
