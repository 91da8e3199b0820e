// The unfused products on matrix units: qk, av and inverse, the common transpose of both.
//   qk: attn = q k^T in the slots of the window     av: out = attn v     inverse: out = attn^T x
//
// Weights lie in memory as rows of slots, and are put in the places of a tile one by one.
#pragma once

#include "cuda/sm80/kernel.cuh"

namespace jax_natten::sm80 {

inline constexpr int kMostStarts = 2048;  // positions of a box, all axes together

// ---- qk

template <typename Element, int kDim>
struct QkShared {
  static constexpr int kRows = 64;
  static constexpr int kColumns = columns_for<Element, kDim>(1);
  Rows<Element, kDim, kRows> query;
  Rows<Element, kDim, kColumns> key[2];
  Rows<Element, kColumns, kRows> product;
  Plan<kRows, kColumns> plan;
};

template <typename Element, int kDim>
__global__ void __launch_bounds__(kThreads, 4)
    qk_kernel(const __grid_constant__ QkArrays<Element> arrays,
              const __grid_constant__ Problem<kAxes> p, const __grid_constant__ Tiling tiling) {
  using Shared = QkShared<Element, kDim>;
  constexpr int kRows = Shared::kRows, kColumns = Shared::kColumns;
  constexpr int kPitchOfProduct = kPitch<Element, kColumns>;
  Shared& shared = shared_memory<Shared>();
  const TileIndex tile = tile_index<Side::kQueries>(p, tiling, blockIdx.x);
  make_plan<Family::kUnfused, Side::kQueries>(shared.plan, p, tiling, tile);
  const Element* keys = rows_of(arrays.key, tile.sample);
  Element* attn = rows_of(arrays.attn, tile.sample);
  const Matrix<Element> matrix(p.tf32);
  const int dim = static_cast<int>(p.dim), row = first_row<1>();
  const int64_t slots = p.slots();

  load_rows<kDim, kRows>(shared.query.x, rows_of(arrays.query, tile.sample), shared.plan.source,
                         dim);
  // Slots that stay without a key are 0.
  for (int i = row; i < row + 16; ++i) {
    const int32_t number = shared.plan.row[i];
    if (number == kNoRow || shared.plan.seen[i] == slots) continue;
    for (int64_t slot = lane(); slot < slots; slot += kWarp) attn[number * slots + slot] = {};
  }
  __syncwarp();
  for_each_tile(
      shared.plan,
      [&](int buffer, int slot) {
        load_rows<kDim, kColumns>(shared.key[buffer].x, keys, shared.plan.column[slot], dim);
      },
      [&](int buffer, int slot, bool) {
        Results<1, kColumns / 8> s;
        s.clear();
        multiply_rows<Element, kDim>(s, matrix, shared.query.left(row), shared.key[buffer].right());
        stage_rows<kColumns>(shared.product.x + row * kPitchOfProduct, s);
        // Neighboring lanes write neighboring slots.
        for (int i = row; i < row + 16; ++i) {
          const RowSpan span = shared.plan.span[i];
          Element* slots_of_row = attn + shared.plan.row[i] * slots + shared.plan.row_entry[i];
          for (int c = lane(); c < kColumns; c += kWarp) {
            if (sees(span, shared.plan.place[slot][c], shared.plan.list.guard)) {
              slots_of_row[shared.plan.column_entry[slot][c]] =
                  shared.product.x[i * kPitchOfProduct + c];
            }
          }
        }
        __syncwarp();
      });
}

// ---- av and inverse

template <typename Element, int kDim>
struct WeightedShared {
  static constexpr int kRows = 64;
  static constexpr int kColumns = columns_for<Element, kDim>(1);
  Rows<Element, kDim, kColumns> x[2];
  Rows<Element, kDim, kRows> staging;
  Plan<kRows, kColumns> plan;
  int starts[kMostStarts];
};

// The weights of a tile's pairs. Rows of attn are those of the queries.
template <Side kSide, typename Element, int kTiles, int kRows, int kColumns>
__device__ void gather_weights(Results<1, kTiles>& w, const Element* attn, int64_t slots,
                               const Plan<kRows, kColumns>& plan, int slot) {
  const uint32_t guard = plan.list.guard;
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = row_of(first_row<1>(), 0, i / 2), column = column_of(n) + i % 2;
      const int32_t query = kSide == Side::kKeys ? plan.column[slot][column] : plan.row[row];
      w.x[0][n][i] = 0;
      if (sees(plan.span[row], plan.place[slot][column], guard)) {
        w.x[0][n][i] = device::widen(
            attn[query * slots + plan.row_entry[row] + plan.column_entry[slot][column]]);
      }
    }
  }
}

// Rows are those of the result: queries (av) or keys (inverse).
template <Side kSide, typename Element, int kDim>
__device__ void sum_weighted(const Tensor<Element>& out, const Tensor<const Element>& attn,
                             const Tensor<const Element>& x, const Problem<kAxes>& p,
                             const Tiling& tiling) {
  using Shared = WeightedShared<Element, kDim>;
  constexpr int kColumns = Shared::kColumns;
  Shared& shared = shared_memory<Shared>();
  const TileIndex tile = tile_index<kSide>(p, tiling, blockIdx.x);
  make_plan<Family::kUnfused, kSide>(shared.plan, p, tiling, tile, shared.starts);
  const Matrix<Element> matrix(p.tf32);
  const int length = static_cast<int>(p.value_dim), row = first_row<1>();
  const int64_t slots = p.slots();
  Results<1, kDim / 8> sum;
  sum.clear();
  for_each_tile<kSide == Side::kKeys>(
      shared.plan,
      [&](int buffer, int slot) {
        load_rows<kDim, kColumns>(shared.x[buffer].x, rows_of(x, tile.sample),
                                  shared.plan.column[slot], length);
      },
      [&](int buffer, int slot, bool) {
        Results<1, kColumns / 8> w;
        gather_weights<kSide>(w, rows_of(attn, tile.sample), slots, shared.plan, slot);
        multiply_weights<Element, kDim>(sum, matrix, w, shared.x[buffer].right_transposed());
      });
  store_rows<kDim>(rows_of(out, tile.sample), shared.plan.row + row, 0, length,
                   shared.staging.x + row * kPitch<Element, kDim>, sum);
}

template <typename Element, int kDim>
__global__ void __launch_bounds__(kThreads, kDim <= 64 ? 3 : 2)
    av_kernel(const __grid_constant__ AvArrays<Element> arrays,
              const __grid_constant__ Problem<kAxes> p, const __grid_constant__ Tiling tiling) {
  sum_weighted<Side::kQueries, Element, kDim>(arrays.out, arrays.attn, arrays.value, p, tiling);
}

template <typename Element, int kDim>
__global__ void __launch_bounds__(kThreads, kDim <= 64 ? 3 : 2)
    inverse_kernel(const __grid_constant__ InverseArrays<Element> arrays,
                   const __grid_constant__ Problem<kAxes> p,
                   const __grid_constant__ Tiling tiling) {
  sum_weighted<Side::kKeys, Element, kDim>(arrays.out, arrays.attn, arrays.x, p, tiling);
}

// ---- launches

template <typename Element>
cudaError_t run_operation(cudaStream_t stream, const QkArrays<Element>& arrays,
                          const Problem<kAxes>& problem, int rank) {
  return with_dim(problem.dim, [&](auto dim) {
    constexpr int kDim = decltype(dim)::value;
    using Shared = QkShared<Element, kDim>;
    return launch_tiles<Shared, Side::kQueries>(
        stream, qk_kernel<Element, kDim>, arrays, problem,
        choose_tiling<Side::kQueries>(problem, rank, Shared::kRows, Shared::kColumns));
  });
}

template <typename Element>
cudaError_t run_operation(cudaStream_t stream, const AvArrays<Element>& arrays,
                          const Problem<kAxes>& problem, int rank) {
  return with_dim(problem.value_dim, [&](auto dim) {
    constexpr int kDim = decltype(dim)::value;
    using Shared = WeightedShared<Element, kDim>;
    return launch_tiles<Shared, Side::kQueries>(
        stream, av_kernel<Element, kDim>, arrays, problem,
        choose_tiling<Side::kQueries>(problem, rank, Shared::kRows, Shared::kColumns));
  });
}

template <typename Element>
cudaError_t run_operation(cudaStream_t stream, const InverseArrays<Element>& arrays,
                          const Problem<kAxes>& problem, int rank) {
  int64_t starts = 0;
  for (int a = 0; a < kAxes; ++a) {
    starts += geometry::min(2 * problem.window[a].kernel_size + kThreads,
                            positions(problem.window[a], problem.query_shape[a]));
  }
  if (starts > kMostStarts) return kNotServed;
  return with_dim(problem.value_dim, [&](auto dim) {
    constexpr int kDim = decltype(dim)::value;
    using Shared = WeightedShared<Element, kDim>;
    return launch_tiles<Shared, Side::kKeys>(
        stream, inverse_kernel<Element, kDim>, arrays, problem,
        choose_tiling<Side::kKeys>(problem, rank, Shared::kRows, Shared::kColumns));
  });
}

}  // namespace jax_natten::sm80
