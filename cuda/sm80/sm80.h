// The kernels on matrix units as the dispatcher calls them: GPUs since Ampere.
//
// This header only declares them; the .cuh files define them, and every generated source compiles
// one operation for one element type.
#pragma once

#include <cuda_runtime.h>

#include "cpu/operands.h"

namespace jax_natten::sm80 {

// What run gives, without having launched anything, where these kernels cannot serve a call.
inline constexpr cudaError_t kNotServed = cudaErrorNotSupported;

// Launches an operation, which its operands tell.
template <template <typename, int> class Operands, typename Element, int Rank>
cudaError_t run(cudaStream_t stream, const Operands<Element, Rank>& operands);

}  // namespace jax_natten::sm80
