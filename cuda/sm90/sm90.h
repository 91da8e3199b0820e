// The kernels for Hopper as the dispatcher calls them: fused forward and backward of half types.
//
// This header only declares them; the .cuh files define them, and every generated source compiles
// one operation for one element type.
#pragma once

#include <cuda_runtime.h>

#include "cpu/operands.h"
#include "cuda/common/not_served.h"

namespace jax_natten::sm90 {

// Launches an operation, which its operands tell, or gives kNotServed.
template <template <typename, int> class Operands, typename Element, int Rank>
cudaError_t run(cudaStream_t stream, const Operands<Element, Rank>& operands);

}  // namespace jax_natten::sm90
