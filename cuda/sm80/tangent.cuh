// The tangent of attention over the neighborhood, on matrix units. Of p = exp(s - lse) and
// ds = scale (dq k + q dk) + dbias:
//   dlse = sum p ds,   dout = sum (p ds v + p dv) - dlse sum p v.
#pragma once

#include "cuda/sm80/kernel.cuh"

namespace jax_natten::sm80 {

template <typename Element, int kDim>
struct TangentShared {
  static constexpr int kRows = 64;
  static constexpr int kColumns = columns_for<Element, kDim>(4);
  Rows<Element, kDim, kRows> q, dq;
  Rows<Element, kDim, kColumns> k[2], dk[2], v[2], dv[2];
  Plan<kRows, kColumns> plan;
};

// A block has a tile of queries and kOut elements of the values.
template <typename Element, int kDim, int kOut>
__global__ void __launch_bounds__(kThreads, kDim <= 64 ? 3 : 2)
    tangent_kernel(const __grid_constant__ TangentArrays<Element> arrays,
                   const __grid_constant__ Problem<kAxes> p,
                   const __grid_constant__ Tiling tiling) {
  using Shared = TangentShared<Element, kDim>;
  constexpr int kRows = Shared::kRows, kColumns = Shared::kColumns;
  Shared& shared = shared_memory<Shared>();
  const TileIndex tile = tile_index<Side::kQueries>(p, tiling, blockIdx.x);
  const int64_t sample = tile.sample;
  make_plan<Family::kFused, Side::kQueries>(shared.plan, p, tiling, tile);
  const float* table = table_of(arrays.bias, sample, tile.head);
  const float* table_tangent = table_of(arrays.dbias, sample, tile.head);
  const LogitScale scale(tiling.scale, arrays.has_bias());
  const Matrix<Element> matrix(p.tf32);
  const int dim = static_cast<int>(p.dim), value_dim = static_cast<int>(p.value_dim);
  const int row = first_row<1>(), element = static_cast<int>(blockIdx.y) * kOut;

  load_rows<kDim, kRows>(shared.q.x, rows_of(arrays.q, sample), shared.plan.source, dim);
  load_rows<kDim, kRows>(shared.dq.x, rows_of(arrays.dq, sample), shared.plan.source, dim);
  float shift[1][2], dlse[2] = {0, 0};
  find_shifts(shift, shared.plan.row, rows_of(arrays.lse, sample));
  Results<1, kOut / 8> out, changed;
  out.clear();
  changed.clear();
  for_each_tile(
      shared.plan,
      [&](int buffer, int begin) {
        const int32_t* columns = shared.plan.column + begin;
        load_rows<kDim, kColumns>(shared.k[buffer].x, rows_of(arrays.k, sample), columns, dim);
        load_rows<kDim, kColumns>(shared.dk[buffer].x, rows_of(arrays.dk, sample), columns, dim);
        load_rows<kDim, kColumns>(shared.v[buffer].x, rows_of(arrays.v, sample), columns,
                                  value_dim);
        load_rows<kDim, kColumns>(shared.dv[buffer].x, rows_of(arrays.dv, sample), columns,
                                  value_dim);
      },
      [&](int buffer, int begin) {
        Results<1, kColumns / 8> s, ds;
        s.clear();
        ds.clear();
        const uint32_t q = shared.q.left(row), k = shared.k[buffer].right();
        multiply_rows<Element, kDim>(s, matrix, q, k);
        multiply_rows<Element, kDim>(ds, matrix, shared.dq.left(row), k);
        multiply_rows<Element, kDim>(ds, matrix, q, shared.dk[buffer].right());
        finish_logits(s, shared.plan, row, begin, scale, table);
        ds.scale(tiling.scale);
        if (table_tangent != nullptr) {
          add_bias(ds, shared.plan, row, begin, table_tangent, 1);
        }
#pragma unroll
        for (int n = 0; n < kColumns / 8; ++n) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            float& weight = s.x[0][n][i];
            weight = exp2_of(weight * scale.factor() - shift[0][i / 2]);
            // What a row does not see may be anything, a NaN too.
            float& change = ds.x[0][n][i];
            change = weight == 0 ? 0 : weight * change;
            dlse[i / 2] += change;
          }
        }
        const uint32_t v = shared.v[buffer].right_transposed(element);
        multiply_weights<Element, kDim>(changed, matrix, ds, v);
        multiply_weights<Element, kDim>(changed, matrix, s,
                                        shared.dv[buffer].right_transposed(element));
        multiply_weights<Element, kDim>(out, matrix, s, v);
      });

#pragma unroll
  for (int r = 0; r < 2; ++r) {
    dlse[r] = sum_of_row(dlse[r]);
    const int32_t number = shared.plan.row[row_of(row, 0, r)];
    if (number != kNoRow && lane() % 4 == 0 && element == 0) {
      rows_of(arrays.dlse, sample)[number] = dlse[r];
    }
#pragma unroll
    for (int n = 0; n < kOut / 8; ++n) {
      for (int e = 2 * r; e < 2 * r + 2; ++e) changed.x[0][n][e] -= dlse[r] * out.x[0][n][e];
    }
  }
  store_rows<kDim>(rows_of(arrays.dout, sample), shared.plan.row + row, element, value_dim,
                   shared.q.x + row * kDim, changed);
}

template <typename Element>
cudaError_t run_operation(cudaStream_t stream, const TangentArrays<Element>& arrays,
                          const Problem<kAxes>& problem, int rank) {
  return with_dim(geometry::max(problem.dim, problem.value_dim), [&](auto dim) {
    constexpr int kDim = decltype(dim)::value;
    constexpr int kOut = kDim < 128 ? kDim : 128;
    using Shared = TangentShared<Element, kDim>;
    const Tiling tiling =
        choose_tiling<Side::kQueries>(problem, rank, Shared::kRows, Shared::kColumns);
    return launch_tiles<Side::kQueries>(stream, tangent_kernel<Element, kDim, kOut>, sizeof(Shared),
                                        arrays, problem, tiling,
                                        geometry::ceil_div(problem.value_dim, kOut));
  });
}

}  // namespace jax_natten::sm80
