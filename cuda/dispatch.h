// Which kernel serves a call. The only place that decides: a kernel that cannot serve it falls to
// the next one down, and the last serves everything.
#pragma once

#include <cuda_runtime.h>

#include <type_traits>

#include "cpu/operands.h"
#include "cuda/naive/naive.h"
#include "cuda/sm80/sm80.h"
#include "cuda/sm90/sm90.h"

namespace jax_natten {

// Whether there are kernels on matrix units for an operation; a build for GPUs without them has
// none.
#ifdef JAX_NATTEN_HAS_SM80
template <template <typename, int> class Operands>
inline constexpr bool kHasSm80 = true;
template <>
inline constexpr bool kHasSm80<SpreadOperands> = false;
template <>
inline constexpr bool kHasSm80<CollectOperands> = false;
#else
template <template <typename, int> class Operands>
inline constexpr bool kHasSm80 = false;
#endif

// Whether there are kernels for Hopper for an operation.
template <template <typename, int> class Operands>
inline constexpr bool kHasSm90 = false;
#ifdef JAX_NATTEN_HAS_SM90
template <>
inline constexpr bool kHasSm90<ForwardOperands> = true;
template <>
inline constexpr bool kHasSm90<BackwardOperands> = true;
#endif

template <template <typename, int> class Operands, typename Element, int Rank>
cudaError_t dispatch(cudaStream_t stream, const Operands<Element, Rank>& operands) {
  if constexpr (kHasSm90<Operands> && sizeof(Element) == 2) {
    const cudaError_t error = sm90::run(stream, operands);
    if (error != kNotServed) return error;
  }
  if constexpr (kHasSm80<Operands> && !std::is_same_v<Element, double>) {
    const cudaError_t error = sm80::run(stream, operands);
    if (error != kNotServed) return error;
  }
  return naive::run(stream, operands);
}

}  // namespace jax_natten
