// Starts a kernel of tasks: a one-dimensional grid whose blocks step through all of them.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cpu/geometry.h"

namespace jax_natten {

inline constexpr int64_t kMostBlocks = (int64_t{1} << 31) - 1;

// Launches kernel(operands) on `threads` times as many blocks as `tasks` need at `tasks_per_block`,
// or none. The error is this launch's own: cudaGetLastError() could be an earlier one's.
template <typename Operands>
cudaError_t launch(cudaStream_t stream, void (*kernel)(Operands), int64_t tasks,
                   int64_t tasks_per_block, int threads, Operands operands) {
  if (tasks == 0) return cudaSuccess;
  const int64_t blocks = geometry::min(geometry::ceil_div(tasks, tasks_per_block), kMostBlocks);
  void* arguments[] = {&operands};
  return cudaLaunchKernel(reinterpret_cast<const void*>(kernel),
                          dim3(static_cast<unsigned>(blocks)), dim3(threads), arguments, 0, stream);
}

}  // namespace jax_natten
