// Which kernel serves a call. The only place that decides: a kernel that cannot serve it falls to
// the next one down, and the last serves everything.
#pragma once

#include <cuda_runtime.h>

#include "cpu/operands.h"
#include "cuda/naive/naive.h"

namespace jax_natten {

template <template <typename, int> class Operands, typename Element, int Rank>
cudaError_t dispatch(cudaStream_t stream, const Operands<Element, Rank>& operands) {
  return naive::Operation<Operands, Element>::run(stream, operands);
}

}  // namespace jax_natten
