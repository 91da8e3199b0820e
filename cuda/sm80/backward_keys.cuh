// The keys' part of the gradients: a tile of keys reads delta and makes
//   dk = scale sum ds q,   dv = sum p ct_out.
#pragma once

#include "cuda/sm80/kernel.cuh"

namespace jax_natten::sm80 {

template <typename Element, int kDim, int kRowCount>
struct BackwardKeysShared {
  static constexpr int kRows = kRowCount;
  static constexpr int kColumns = columns_for<Element, kDim>(2, 64 * 64 / kRows);
  Rows<Element, kDim, kRows> k, v;
  Rows<Element, kDim, kColumns> q[2], ct[2];
  alignas(16) float lse[2][kColumns];
  alignas(16) float delta[2][kColumns];
  Plan<kRows, kColumns> plan;
};

// Starts copying a number of each column.
template <int kCount>
__device__ void load_numbers(float* to, const float* from, const int32_t* columns) {
  const int i = static_cast<int>(threadIdx.x);
  if (i >= kCount) return;
  copy_async<sizeof(float)>(shared_address(to + i), from + columns[i], columns[i] != kNoRow);
}

// Starts copying what the queries that begin there in the plan have.
template <typename Element, int kDim, int kRows>
__device__ void load_queries(BackwardKeysShared<Element, kDim, kRows>& shared,
                             const BackwardArrays<Element>& arrays, int64_t sample, int dim,
                             int value_dim, int buffer, int begin) {
  constexpr int kColumns = BackwardKeysShared<Element, kDim, kRows>::kColumns;
  const int32_t* columns = shared.plan.column + begin;
  load_rows<kDim, kColumns>(shared.q[buffer].x, rows_of(arrays.q, sample), columns, dim);
  load_rows<kDim, kColumns>(shared.ct[buffer].x, rows_of(arrays.ct_out, sample), columns,
                            value_dim);
  load_numbers<kColumns>(shared.lse[buffer], rows_of(arrays.lse, sample), columns);
  load_numbers<kColumns>(shared.delta[buffer], rows_of(arrays.delta, sample), columns);
}

// Logits become weights; `lse` is that of the columns.
template <int kBlocks, int kTiles>
__device__ void find_weights(Results<kBlocks, kTiles>& s, const float* lse, float factor) {
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const float shift = weight_shift(lse[column_of(n) + e]);
#pragma unroll
      for (int i = 0; i < kBlocks * 2; ++i) {
        float& weight = s.x[i / 2][n][i % 2 * 2 + e];
        weight = exp2_of(weight * factor - shift);
      }
    }
  }
}

// Gradients of weights become those of logits; `delta` is that of the columns.
template <int kBlocks, int kTiles>
__device__ void find_ds(Results<kBlocks, kTiles>& ds, const Results<kBlocks, kTiles>& weights,
                        const float* delta) {
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const float own = delta[column_of(n) + e];
#pragma unroll
      for (int i = 0; i < kBlocks * 2; ++i) {
        float& gradient = ds.x[i / 2][n][i % 2 * 2 + e];
        gradient = weights.x[i / 2][n][i % 2 * 2 + e] * (gradient + own);
      }
    }
  }
}

// A block has a tile of keys and kOut elements of both gradients. Reads delta.
template <typename Element, int kDim, int kRows, int kOut>
__global__ void __launch_bounds__(kThreads, (kDim * kRows <= 64 * 64) ? 3 : 2)
    backward_keys_kernel(const __grid_constant__ BackwardArrays<Element> arrays,
                         const __grid_constant__ Problem<kAxes> p,
                         const __grid_constant__ Tiling tiling) {
  using Shared = BackwardKeysShared<Element, kDim, kRows>;
  constexpr int kColumns = Shared::kColumns, kBlocks = kRows / 64;
  Shared& shared = shared_memory<Shared>();
  const TileIndex tile = tile_index<Side::kKeys>(p, tiling, blockIdx.x);
  const int64_t sample = tile.sample;
  make_plan<Family::kFused, Side::kKeys>(shared.plan, p, tiling, tile);
  const float* table = table_of(arrays.bias, sample, tile.head * p.group());
  const LogitScale scale(tiling.scale, arrays.has_bias());
  const Matrix<Element> matrix(p.tf32);
  const int dim = static_cast<int>(p.dim), value_dim = static_cast<int>(p.value_dim);
  const int row = first_row<kBlocks>(), element = static_cast<int>(blockIdx.y) * kOut;

  load_rows<kDim, kRows>(shared.k.x, rows_of(arrays.k, sample), shared.plan.source, dim);
  load_rows<kDim, kRows>(shared.v.x, rows_of(arrays.v, sample), shared.plan.source, value_dim);
  Results<kBlocks, kOut / 8> dk, dv;
  dk.clear();
  dv.clear();
  for_each_tile(
      shared.plan,
      [&](int buffer, int begin) {
        load_queries<Element, kDim, kRows>(shared, arrays, sample, dim, value_dim, buffer, begin);
      },
      [&](int buffer, int begin) {
        Results<kBlocks, kColumns / 8> s, ds;
        s.clear();
        ds.clear();
        multiply_rows<Element, kDim>(s, matrix, shared.k.left(row), shared.q[buffer].right());
        finish_logits(s, shared.plan, row, begin, scale, table);
        multiply_rows<Element, kDim>(ds, matrix, shared.v.left(row), shared.ct[buffer].right());
        find_weights(s, shared.lse[buffer], scale.factor());
        find_ds(ds, s, shared.delta[buffer]);
        multiply_weights<Element, kDim>(dv, matrix, s, shared.ct[buffer].right_transposed(element));
        multiply_weights<Element, kDim>(dk, matrix, ds, shared.q[buffer].right_transposed(element));
      });

  dk.scale(tiling.scale);
  store_rows<kDim>(rows_of(arrays.dk, sample), shared.plan.row + row, element, dim,
                   shared.k.x + row * kDim, dk);
  store_rows<kDim>(rows_of(arrays.dv, sample), shared.plan.row + row, element, value_dim,
                   shared.v.x + row * kDim, dv);
}

}  // namespace jax_natten::sm80
