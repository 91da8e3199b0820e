// Which kernel serves a call. The only place that decides: a kernel that cannot serve it falls to
// the next one down, and the last serves everything.
#pragma once

#include <cuda_runtime.h>

#include <type_traits>

#include "cpu/operands.h"
#include "cuda/naive/naive.h"
#include "cuda/sm80/sm80.h"

namespace jax_natten {

// Whether an operation has kernels on matrix units.
template <template <typename, int> class Operands>
inline constexpr bool kIsOnMatrixUnits = false;
template <>
inline constexpr bool kIsOnMatrixUnits<ForwardOperands> = true;
template <>
inline constexpr bool kIsOnMatrixUnits<TangentOperands> = true;
template <>
inline constexpr bool kIsOnMatrixUnits<BackwardOperands> = true;
template <>
inline constexpr bool kIsOnMatrixUnits<QkOperands> = true;
template <>
inline constexpr bool kIsOnMatrixUnits<AvOperands> = true;
template <>
inline constexpr bool kIsOnMatrixUnits<InverseOperands> = true;

template <template <typename, int> class Operands, typename Element, int Rank>
cudaError_t dispatch(cudaStream_t stream, const Operands<Element, Rank>& operands) {
  if constexpr (kIsOnMatrixUnits<Operands> && !std::is_same_v<Element, double>) {
    const cudaError_t error = sm80::Operation<Operands, Element>::run(stream, operands);
    if (error != sm80::kNotServed) return error;
  }
  return naive::Operation<Operands, Element>::run(stream, operands);
}

}  // namespace jax_natten
