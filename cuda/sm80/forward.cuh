// Attention over the neighborhood on matrix units:
//   out = sum p v / total, p = exp(s - largest), total = sum p, lse = largest + log(total),
// with the largest logit so far as the shift (online softmax).
#pragma once

#include "cuda/sm80/kernel.cuh"

namespace jax_natten::sm80 {

// The softmax of rows of which the columns come tile by tile.
template <int kBlocks>
struct Softmax {
  float largest[kBlocks][2];  // of the logits, before their factor
  float total[kBlocks][2];    // of the lane's weights

  __device__ Softmax() {
    for (int i = 0; i < kBlocks * 2; ++i) {
      largest[i / 2][i % 2] = -INFINITY;
      total[i / 2][i % 2] = 0;
    }
  }

  // Logits become weights; `out` is rescaled to the new shift.
  template <int kTiles, int kOutTiles>
  __device__ void add(Results<kBlocks, kTiles>& s, Results<kBlocks, kOutTiles>& out, float factor) {
    float shrink[kBlocks][2];
    bool moved = false;
#pragma unroll
    for (int i = 0; i < kBlocks * 2; ++i) {
      const int m = i / 2, r = i % 2;
      float next = largest[m][r];
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
        next = fmaxf(next, fmaxf(s.x[m][n][2 * r], s.x[m][n][2 * r + 1]));
      }
      next = fmaxf(next, __shfl_xor_sync(kAllLanes, next, 1));
      next = fmaxf(next, __shfl_xor_sync(kAllLanes, next, 2));
      const float shift = next == -INFINITY ? 0.f : next * factor;
      shrink[m][r] = exp2_of(largest[m][r] * factor - shift);
      moved = moved || next != largest[m][r];
      largest[m][r] = next;
      float sum = 0;
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float& x = s.x[m][n][2 * r + e];
          x = exp2_of(x * factor - shift);
          sum += x;
        }
      }
      total[m][r] = total[m][r] * shrink[m][r] + sum;
    }
    if (__any_sync(kAllLanes, moved)) out.scale_rows(shrink);
  }
};

template <typename Element, int kDim, int kRowCount>
struct ForwardShared {
  static constexpr int kRows = kRowCount;
  static constexpr int kColumns = columns_for<Element, kDim>(2);
  Rows<Element, kDim, kRows> q;
  Rows<Element, kDim, kColumns> k[2], v[2];
  Plan<kRows, kColumns> plan;
};

template <typename Element, int kDim, int kRows>
__global__ void __launch_bounds__(kThreads, kDim <= 64 && kRows == 64 ? 4 : 2)
    forward_kernel(const __grid_constant__ ForwardArrays<Element> arrays,
                   const __grid_constant__ Problem<kAxes> p,
                   const __grid_constant__ Tiling tiling) {
  using Shared = ForwardShared<Element, kDim, kRows>;
  constexpr int kColumns = Shared::kColumns, kBlocks = kRows / 64;
  Shared& shared = shared_memory<Shared>();
  const TileIndex tile = tile_index<Side::kQueries>(p, tiling, blockIdx.x);
  const int64_t sample = tile.sample;
  make_plan<Family::kFused, Side::kQueries>(shared.plan, p, tiling, tile);
  const Element* k_rows = rows_of(arrays.k, sample);
  const Element* v_rows = rows_of(arrays.v, sample);
  const float* table = table_of(arrays.bias, sample, tile.head);
  const LogitScale scale(tiling.scale, arrays.has_bias());
  const Matrix<Element> matrix(p.tf32);
  const int dim = static_cast<int>(p.dim), value_dim = static_cast<int>(p.value_dim);
  const int row = first_row<kBlocks>();

  load_rows<kDim, kRows>(shared.q.x, rows_of(arrays.q, sample), shared.plan.source, dim);
  Softmax<kBlocks> softmax;
  Results<kBlocks, kDim / 8> out;
  out.clear();
  for_each_tile(
      shared.plan,
      [&](int buffer, int begin) {
        load_rows<kDim, kColumns>(shared.k[buffer].x, k_rows, shared.plan.column + begin, dim);
        load_rows<kDim, kColumns>(shared.v[buffer].x, v_rows, shared.plan.column + begin,
                                  value_dim);
      },
      [&](int buffer, int begin) {
        Results<kBlocks, kColumns / 8> s;
        s.clear();
        multiply_rows<Element, kDim>(s, matrix, shared.q.left(row), shared.k[buffer].right());
        finish_logits(s, shared.plan, row, begin, scale, table);
        softmax.add(s, out, scale.factor());
        multiply_weights<Element, kDim>(out, matrix, s, shared.v[buffer].right_transposed());
      });

  float factor[kBlocks][2];
  float* lse = rows_of(arrays.lse, sample);
#pragma unroll
  for (int i = 0; i < kBlocks * 2; ++i) {
    const int m = i / 2, r = i % 2;
    const float total = sum_of_row(softmax.total[m][r]);
    const bool empty = total == 0;
    factor[m][r] = empty ? 0.f : 1 / total;
    const int32_t number = shared.plan.row[row_of(row, m, r)];
    if (number != kNoRow && lane() % 4 == 0) {
      lse[number] = empty ? -INFINITY : softmax.largest[m][r] * scale.factor() * kLn2 + logf(total);
    }
  }
  out.scale_rows(factor);
  store_rows<kDim>(rows_of(arrays.out, sample), shared.plan.row + row, 0, value_dim,
                   shared.q.x + row * kDim, out);
}

template <typename Element>
cudaError_t run_operation(cudaStream_t stream, const ForwardArrays<Element>& arrays,
                          const Problem<kAxes>& problem, int rank) {
  return with_dim(geometry::max(problem.dim, problem.value_dim), [&](auto dim) {
    constexpr int kDim = decltype(dim)::value;
    constexpr bool kMayBeLarge = sizeof(Element) == 2 && kDim <= 128;
    using Small = ForwardShared<Element, kDim, 64>;
    using Large = ForwardShared<Element, kDim, 128>;
    return with_tiling<Small, Large, Side::kQueries, kMayBeLarge>(
        problem, rank, kLargeTileGain<kDim>, [&](const Tiling& tiling, auto rows) {
          constexpr int kRows = decltype(rows)::value;
          return launch_tiles<Side::kQueries>(stream, forward_kernel<Element, kDim, kRows>,
                                              sizeof(ForwardShared<Element, kDim, kRows>), arrays,
                                              problem, tiling);
        });
  });
}

}  // namespace jax_natten::sm80
