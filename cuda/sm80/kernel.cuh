// What the kernels have in common: their sizes, the table and the arrays of a head, launches, and
// the loop over tiles of columns.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/sm80/logits.cuh"
#include "cuda/sm80/sm80.h"

namespace jax_natten::sm80 {

// Columns in a tile: `most`, or so many that two copies of `arrays` arrays fit in `bytes`, and 16
// at least.
template <typename Element, int kDim>
constexpr int columns_for(int arrays, int most = 64, int bytes = 72 * 1024) {
  int columns = most;
  while (columns > 16 && 2 * arrays * columns * RowLayout<Element, kDim>::kBytes > bytes) {
    columns /= 2;
  }
  return columns;
}

template <typename Element, int kDim, int kCount>
struct Rows {
  alignas(128) Element x[kCount * kDim];

  // Addresses of the lane for products.
  __device__ uint32_t left(int row) const {
    return shared_address(x + row * kDim) + RowLayout<Element, kDim>::left();
  }
  __device__ uint32_t right() const {
    return shared_address(x) + RowLayout<Element, kDim>::right();
  }
  __device__ uint32_t right_transposed(int begin = 0) const {
    return shared_address(x + begin) + RowLayout<Element, kDim>::right_transposed();
  }
};

template <typename Shared>
__device__ Shared& shared_memory() {
  extern __shared__ __align__(128) unsigned char memory[];
  return *reinterpret_cast<Shared*>(memory);
}

// The rows of a sample; of all heads, since a row's number tells the head.
template <typename T>
__device__ T* rows_of(const Tensor<T>& tensor, int64_t sample) {
  return tensor.data + sample * tensor.layout.sample;
}

// The head's table, null where there is none.
__device__ inline const float* table_of(const Tensor<const float>& tables, int64_t sample,
                                        int64_t head) {
  return tables.data == nullptr ? nullptr : tables.head(sample, head).data;
}

// Visits all tiles of columns: load(buffer, begin) starts to copy the tile whose columns begin
// there in the plan, while compute(buffer, begin) works on the one before. Copies begun earlier are
// there at the first compute. Warps may be a tile apart: tiles are planned in the place of those
// that all have left.
template <bool kHasStarts = false, int kRows, int kColumns, typename Load, typename Compute>
__device__ void for_each_tile(Plan<kRows, kColumns>& plan, Load&& load, Compute&& compute) {
  const int tiles = plan.tiles();
  plan.template plan_tiles<kHasStarts>(0);
  __syncthreads();
  if (tiles > 0) load(0, 0);
  commit_copies();
  for (int i = 0; i < tiles; ++i) {
    const int next = i + 1;
    if (next < tiles && next % plan.kAtOnce == 0) plan.template plan_tiles<kHasStarts>(next);
    wait_for_copies();
    __syncthreads();
    if (next < tiles) load(next % 2, plan.begin_of(next));
    commit_copies();
    compute(i % 2, plan.begin_of(i));
  }
  if (tiles > 0) return;
  wait_for_copies();
  __syncthreads();
}

// ---- launches

// Whether the current device can run these kernels, and sizes are ones that they can count.
inline bool can_serve(const Problem<kAxes>& problem) {
  constexpr int64_t kEnd = int64_t{1} << 31;
  int device = 0, major = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return false;
  if (cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) != cudaSuccess) {
    return false;
  }
  int64_t box = 1;  // the longest list of columns
  int bits = kAxes;
  for (int a = 0; a < kAxes; ++a) {
    const int64_t most = geometry::max(problem.query_shape[a], problem.key_shape[a]);
    if (most >= kEnd || problem.window[a].dilation >= kEnd / 4) return false;
    const int64_t reach = geometry::min(2 * problem.window[a].kernel_size + 2 * kThreads, most);
    box *= reach + 2;
    while (bits < 32 && (int64_t{1} << (bits - kAxes)) < box) ++bits;
  }
  return major >= 8 && bits < 32 - kAxes && problem.queries() * problem.heads < kEnd &&
         problem.keys() * problem.heads_kv < kEnd && box * problem.group() < kEnd;
}

// The most shared memory that a block can have on the current device.
inline size_t shared_limit() {
  int device = 0, bytes = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return 0;
  cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  return static_cast<size_t>(bytes);
}

// Launches kernel(parameters...) on blocks of kThreads with so much dynamic shared memory.
template <typename... Parameters>
cudaError_t launch(cudaStream_t stream, void (*kernel)(Parameters...), dim3 grid, size_t bytes,
                   Parameters... parameters) {
  const auto* function = reinterpret_cast<const void*>(kernel);
  const auto error = cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                          static_cast<int>(bytes));
  if (error != cudaSuccess) return error;
  void* arguments[] = {&parameters...};
  return cudaLaunchKernel(function, grid, dim3(kThreads), arguments, bytes, stream);
}

// The same for a kernel of (arrays, problem, tiling): a block for a tile and a part of its rows.
template <Side kRows, typename Arrays>
cudaError_t launch_tiles(cudaStream_t stream, void (*kernel)(Arrays, Problem<kAxes>, Tiling),
                         size_t bytes, const Arrays& arrays, const Problem<kAxes>& problem,
                         const Tiling& tiling, int64_t parts = 1) {
  const int64_t tiles = tile_count<kRows>(problem, tiling);
  if (tiles >= int64_t{1} << 31 || bytes > shared_limit()) return kNotServed;
  if (tiles == 0) return cudaSuccess;
  const dim3 grid(static_cast<unsigned>(tiles), static_cast<unsigned>(geometry::max(parts, 1)));
  return launch(stream, kernel, grid, bytes, arrays, problem, tiling);
}

template <int kValue>
using Constant = std::integral_constant<int, kValue>;

// run(Constant) with what rows of the length are padded to.
template <typename Run>
cudaError_t with_dim(int64_t longest, Run&& run) {
  if (longest <= 32) return run(Constant<32>{});
  if (longest <= 64) return run(Constant<64>{});
  if (longest <= 128) return run(Constant<128>{});
  if (longest <= 256) return run(Constant<256>{});
  return kNotServed;
}

// By so much a tile of 128 rows is faster, for each pair that it visits, than one of 64: it reads
// each column for twice as many. Where rows are short, that is not what the time goes to.
template <int kDim>
inline constexpr double kLargeTileGain = kDim <= 64 ? 1.08 : 1.28;

// launch(tiling, Constant of its rows) with tiles of 64 rows, or of 128 where that may be and is
// faster: by the gain for each pair.
template <typename Small, typename Large, Side kRows, bool kMayBeLarge, typename Launch>
cudaError_t with_tiling(const Problem<kAxes>& problem, int rank, double gain, Launch&& launch) {
  const Tiling small = choose_tiling<kRows>(problem, rank, Small::kRows, Small::kColumns);
  if constexpr (kMayBeLarge) {
    const Tiling large = choose_tiling<kRows>(problem, rank, Large::kRows, Large::kColumns);
    if (large.pairs < gain * small.pairs && sizeof(Large) <= shared_limit()) {
      return launch(large, Constant<Large::kRows>{});
    }
  }
  return launch(small, Constant<Small::kRows>{});
}

}  // namespace jax_natten::sm80
