// The queries' part of the gradients where there are biases: dq and delta, and
//   dbias = the sum of ds over the pairs of each offset.
#pragma once

#include "cuda/sm80/backward_queries.cuh"

namespace jax_natten::sm80 {

// A table's gradient is summed by several blocks, each of which takes every parts-th tile of its
// queries and has a table of its own. A warp adds the ds of one query at a time: these belong to
// different entries, so that no addition meets another.
template <typename Element, int kDim>
struct BackwardTableShared : BackwardQueriesShared<Element, kDim, 64> {
  using Base = BackwardQueriesShared<Element, kDim, 64>;
  static constexpr int kDsPitch = Base::kColumns + 4;
  alignas(16) float ds[Base::kRows][kDsPitch];
  float tables[1];  // [copies, biases], as many as memory was asked for
};

template <typename Element, int kDim>
size_t bytes_of_table_sums(const Problem<kAxes>& problem, int copies) {
  return sizeof(BackwardTableShared<Element, kDim>) + copies * problem.biases() * sizeof(float);
}

inline constexpr int kWarps = kThreads / kWarp;

// Adds the ds of a warp's rows to a table, a row at a time: what it adds lies in different entries.
template <typename Element, int kDim>
__device__ void add_to_table(float* table, const BackwardTableShared<Element, kDim>& shared,
                             int begin) {
  constexpr int kColumns = BackwardTableShared<Element, kDim>::kColumns;
  constexpr int kOwn = (kColumns + kWarp - 1) / kWarp;  // columns of a lane
  const auto& plan = shared.plan;
  const uint32_t guard = plan.list.guard;
  uint32_t place[kOwn];
  int32_t entry[kOwn];
#pragma unroll
  for (int n = 0; n < kOwn; ++n) {
    const int column = begin + (lane() + n * kWarp) % kColumns;
    place[n] = plan.place[column];
    entry[n] = plan.column_entry[column];
  }
  struct Row {
    RowSpan span;
    int32_t entry;
    float ds[kOwn];
  };
  const auto row_of_ds = [&](int i) {
    const int row = first_row<1>() + i;
    Row result{plan.span[row], plan.row_entry[row], {}};
#pragma unroll
    for (int n = 0; n < kOwn; ++n) {
      result.ds[n] = shared.ds[row][(lane() + n * kWarp) % kColumns];
    }
    return result;
  };
  Row row = row_of_ds(0);
#pragma unroll 4
  for (int i = 0; i < 16; ++i) {
    // The next row is on its way while this one is added.
    const Row next = row_of_ds((i + 1) % 16);
#pragma unroll
    for (int n = 0; n < kOwn; ++n) {
      if (lane() + n * kWarp < kColumns && sees(row.span, place[n], guard)) {
        table[row.entry + entry[n]] += row.ds[n];
      }
    }
    row = next;
    __syncwarp();
  }
}

// dq, delta and the parts of dbias. With fewer copies of the table than warps, warps take turns.
template <typename Element, int kDim>
__global__ void __launch_bounds__(kThreads, 2)
    backward_table_kernel(const __grid_constant__ BackwardArrays<Element> arrays,
                          const __grid_constant__ Problem<kAxes> p,
                          const __grid_constant__ Tiling tiling, int copies) {
  using Shared = BackwardTableShared<Element, kDim>;
  constexpr int kRows = Shared::kRows, kColumns = Shared::kColumns;
  Shared& shared = shared_memory<Shared>();
  const auto parts = static_cast<unsigned>(arrays.parts);
  const unsigned part = blockIdx.x % parts, head_number = blockIdx.x / parts;
  const auto entries = static_cast<int>(p.biases());
  const int warp = static_cast<int>(threadIdx.x) / kWarp, turns = kWarps / copies;
  float* table = shared.tables + warp / turns * entries;

  for (int i = static_cast<int>(threadIdx.x); i < copies * entries; i += kThreads) {
    shared.tables[i] = 0;
  }
  const auto tiles = static_cast<unsigned>(tiles_of_head<Side::kQueries>(p, tiling));
  for (unsigned t = part; t < tiles; t += parts) {
    const TileIndex tile = tile_index<Side::kQueries>(p, tiling, head_number * tiles + t);
    find_dq<Element, kDim, kRows>(
        shared, arrays, p, tiling, tile, [&](const Results<1, kColumns / 8>& ds, int begin) {
#pragma unroll
          for (int n = 0; n < kColumns / 8; ++n) {
#pragma unroll
            for (int r = 0; r < 2; ++r) {
              *reinterpret_cast<float2*>(&shared.ds[row_of(first_row<1>(), 0, r)][column_of(n)]) = {
                  ds.x[0][n][2 * r], ds.x[0][n][2 * r + 1]};
            }
          }
          __syncwarp();
          for (int turn = 0; turn < turns; ++turn) {
            if (warp % turns == turn) add_to_table(table, shared, begin);
            if (turns > 1) __syncthreads();
          }
        });
  }
  __syncthreads();
  float* result = arrays.dbias_parts.data + static_cast<int64_t>(blockIdx.x) * entries;
  for (int i = static_cast<int>(threadIdx.x); i < entries; i += kThreads) {
    float sum = 0;
    for (int c = 0; c < copies; ++c) sum += shared.tables[c * entries + i];
    result[i] = sum;
  }
}

// dbias, the sum of the parts.
template <typename Element>
__global__ void __launch_bounds__(kThreads)
    add_tables_kernel(const __grid_constant__ BackwardArrays<Element> arrays, int64_t entries,
                      int64_t count) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= count) return;
  const float* parts = arrays.dbias_parts.data + i / entries * arrays.parts * entries + i % entries;
  float sum = 0;
  for (int64_t part = 0; part < arrays.parts; ++part) sum += parts[part * entries];
  arrays.dbias.data[i] = sum;
}

template <typename Element, int kDim>
cudaError_t launch_tables(cudaStream_t stream, const BackwardArrays<Element>& arrays,
                          const Problem<kAxes>& problem, const Tiling& tiling, int copies) {
  const int64_t tables = problem.samples * problem.heads, entries = problem.biases();
  if (tables * arrays.parts == 0) return cudaSuccess;
  const cudaError_t error =
      launch(stream, backward_table_kernel<Element, kDim>,
             dim3(static_cast<unsigned>(tables * arrays.parts)),
             bytes_of_table_sums<Element, kDim>(problem, copies), arrays, problem, tiling, copies);
  if (error != cudaSuccess) return error;
  const int64_t count = tables * entries;
  return launch(stream, add_tables_kernel<Element>,
                dim3(static_cast<unsigned>(geometry::ceil_div(count, kThreads))), 0, arrays,
                entries, count);
}

}  // namespace jax_natten::sm80
