// What a set of kernels gives, without having launched anything, where it cannot serve a call.
#pragma once

#include <cuda_runtime.h>

namespace jax_natten {

inline constexpr cudaError_t kNotServed = cudaErrorNotSupported;

}  // namespace jax_natten
