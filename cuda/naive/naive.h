// The naive kernels as the dispatcher calls them: every operation, any GPU, any element type.
//
// This header only declares them; the .cuh files define them, and every generated source compiles
// one operation for one element type.
#pragma once

#include <cuda_runtime.h>

#include "cpu/operands.h"

namespace jax_natten::naive {

// Launches an operation, which its operands tell.
template <template <typename, int> class Operands, typename Element, int Rank>
cudaError_t run(cudaStream_t stream, const Operands<Element, Rank>& operands);

}  // namespace jax_natten::naive
