// The queries' part of the gradients: a tile of queries makes delta and
//   dq = scale sum ds k.
#pragma once

#include "cuda/sm80/kernel.cuh"

namespace jax_natten::sm80 {

template <typename Element, int kDim, int kRowCount>
struct BackwardQueriesShared {
  static constexpr int kRows = kRowCount;
  static constexpr int kColumns = columns_for<Element, kDim>(2, 64 * 64 / kRows);
  Rows<Element, kDim, kRows> q, ct;
  Rows<Element, kDim, kColumns> k[2], v[2];
  Plan<kRows, kColumns> plan;
  float delta[kRows];
};

// The lane's share of a product of two rows, which kLanes lanes have together.
template <int kUnits, int kLanes, typename Element>
__device__ float product_share(const Element* a, const Element* b, int length) {
  const int own = lane() % kLanes;
  float product = 0;
  if (has_whole_units<Element>(length)) {
#pragma unroll
    for (int u = own; u < kUnits; u += kLanes) {
      if (u * kUnit<Element> >= length) continue;
      uint4 x[2] = {__ldg(reinterpret_cast<const uint4*>(a) + u),
                    __ldg(reinterpret_cast<const uint4*>(b) + u)};
      const auto* x_element = reinterpret_cast<const Element*>(&x[0]);
      const auto* y_element = reinterpret_cast<const Element*>(&x[1]);
#pragma unroll
      for (int e = 0; e < kUnit<Element>; ++e) {
        product += device::widen(x_element[e]) * device::widen(y_element[e]);
      }
    }
  } else {
#pragma unroll 1
    for (int e = own; e < length; e += kLanes) {
      product += device::widen(a[e]) * device::widen(b[e]);
    }
  }
  return product;
}

// delta of the tile's queries, into shared memory and the array.
template <int kDim, typename Element, int kRows>
__device__ void find_delta(float (&delta)[kRows], const int32_t (&rows)[kRows],
                           const BackwardArrays<Element>& arrays, int64_t sample, int length) {
  constexpr int kUnits = kDim / kUnit<Element>;
  constexpr int kLanes = kUnits < kWarp ? kUnits : kWarp;  // for a row
  const auto thread = static_cast<int>(threadIdx.x);
#pragma unroll 4
  for (int i = thread / kLanes; i < kRows; i += kThreads / kLanes) {
    const int64_t at = static_cast<int64_t>(max(rows[i], 0)) * length;
    float product = product_share<kUnits, kLanes>(rows_of(arrays.out, sample) + at,
                                                  rows_of(arrays.ct_out, sample) + at, length);
#pragma unroll
    for (int offset = kLanes / 2; offset > 0; offset /= 2) {
      product += __shfl_xor_sync(kAllLanes, product, offset);
    }
    if (thread % kLanes == 0) delta[i] = product;
  }
  __syncthreads();
  if (thread >= kRows || rows[thread] == kNoRow) return;
  const int32_t row = rows[thread];
  const bool empty = rows_of(arrays.lse, sample)[row] == -INFINITY;
  delta[thread] = empty ? 0.f : rows_of(arrays.ct_lse, sample)[row] - delta[thread];
  rows_of(arrays.delta, sample)[row] = delta[thread];
}

// ds of a tile of queries and the columns in a buffer, from the queries' lse as a shift.
template <typename Element, int kDim, int kRows, int kBlocks, int kTiles>
__device__ void find_ds(Results<kBlocks, kTiles>& ds,
                        const BackwardQueriesShared<Element, kDim, kRows>& shared,
                        const Matrix<Element>& matrix, int buffer, int begin,
                        const LogitScale& scale, const float* table,
                        const float (&shift)[kBlocks][2]) {
  const int row = first_row<kBlocks>();
  Results<kBlocks, kTiles> s;
  s.clear();
  ds.clear();
  multiply_rows<Element, kDim>(s, matrix, shared.q.left(row), shared.k[buffer].right());
  finish_logits(s, shared.plan, row, begin, scale, table);
  multiply_rows<Element, kDim>(ds, matrix, shared.ct.left(row), shared.v[buffer].right());
#pragma unroll
  for (int i = 0; i < kBlocks * 2; ++i) {
    const int m = i / 2, r = i % 2;
    const float delta = shared.delta[row_of(row, m, r)];
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int e = 2 * r; e < 2 * r + 2; ++e) {
        const float weight = exp2_of(s.x[m][n][e] * scale.factor() - shift[m][r]);
        ds.x[m][n][e] = weight * (ds.x[m][n][e] + delta);
      }
    }
  }
}

// Starts copying what a tile's queries have.
template <typename Element, int kDim, int kRows>
__device__ void load_queries(BackwardQueriesShared<Element, kDim, kRows>& shared,
                             const BackwardArrays<Element>& arrays, int64_t sample, int dim,
                             int value_dim) {
  const int32_t* rows = shared.plan.source;
  load_rows<kDim, kRows>(shared.q.x, rows_of(arrays.q, sample), rows, dim);
  load_rows<kDim, kRows>(shared.ct.x, rows_of(arrays.ct_out, sample), rows, value_dim);
}

// Starts copying what the keys that begin there in the plan have.
template <typename Element, int kDim, int kRows>
__device__ void load_keys(BackwardQueriesShared<Element, kDim, kRows>& shared,
                          const BackwardArrays<Element>& arrays, int64_t sample, int dim,
                          int value_dim, int buffer, int begin) {
  constexpr int kColumns = BackwardQueriesShared<Element, kDim, kRows>::kColumns;
  const int32_t* columns = shared.plan.column + begin;
  load_rows<kDim, kColumns>(shared.k[buffer].x, rows_of(arrays.k, sample), columns, dim);
  load_rows<kDim, kColumns>(shared.v[buffer].x, rows_of(arrays.v, sample), columns, value_dim);
}

// dq and delta of a tile of queries; use(ds, begin) is called with the ds of each tile of their
// columns, which begin there in the plan.
template <typename Element, int kDim, int kRows, typename Use>
__device__ void find_dq(BackwardQueriesShared<Element, kDim, kRows>& shared,
                        const BackwardArrays<Element>& arrays, const Problem<kAxes>& p,
                        const Tiling& tiling, const TileIndex& tile, Use&& use) {
  constexpr int kColumns = BackwardQueriesShared<Element, kDim, kRows>::kColumns;
  constexpr int kBlocks = kRows / 64;
  const int64_t sample = tile.sample;
  make_plan<Family::kFused, Side::kQueries>(shared.plan, p, tiling, tile);
  const float* table = table_of(arrays.bias, sample, tile.head);
  const LogitScale scale(tiling.scale, arrays.has_bias());
  const Matrix<Element> matrix(p.tf32);
  const int dim = static_cast<int>(p.dim), value_dim = static_cast<int>(p.value_dim);
  const int row = first_row<kBlocks>();

  load_queries<Element, kDim, kRows>(shared, arrays, sample, dim, value_dim);
  find_delta<kDim>(shared.delta, shared.plan.row, arrays, sample, value_dim);
  float shift[kBlocks][2];
  find_shifts(shift, shared.plan.row, rows_of(arrays.lse, sample));
  Results<kBlocks, kDim / 8> dq;
  dq.clear();
  for_each_tile(
      shared.plan,
      [&](int buffer, int begin) {
        load_keys<Element, kDim, kRows>(shared, arrays, sample, dim, value_dim, buffer, begin);
      },
      [&](int buffer, int begin) {
        Results<kBlocks, kColumns / 8> ds;
        find_ds(ds, shared, matrix, buffer, begin, scale, table, shift);
        use(ds, begin);
        multiply_weights<Element, kDim>(dq, matrix, ds, shared.k[buffer].right_transposed());
      });

  dq.scale(tiling.scale);
  store_rows<kDim>(rows_of(arrays.dq, sample), shared.plan.row + row, 0, dim,
                   shared.q.x + row * kDim, dq);
}

template <typename Element, int kDim, int kRows>
__global__ void __launch_bounds__(kThreads, (kDim * kRows <= 64 * 64) ? 3 : 2)
    backward_queries_kernel(const __grid_constant__ BackwardArrays<Element> arrays,
                            const __grid_constant__ Problem<kAxes> p,
                            const __grid_constant__ Tiling tiling) {
  auto& shared = shared_memory<BackwardQueriesShared<Element, kDim, kRows>>();
  const TileIndex tile = tile_index<Side::kQueries>(p, tiling, blockIdx.x);
  find_dq<Element, kDim, kRows>(shared, arrays, p, tiling, tile, [](const auto&, int) {});
}

}  // namespace jax_natten::sm80
