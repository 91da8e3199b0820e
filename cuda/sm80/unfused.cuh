// The unfused products on matrix units: qk, av and inverse, the common transpose of both.
//   qk: attn = q k^T in the slots of the window     av: out = attn v     inverse: out = attn^T x
//
// Weights lie in memory as rows of slots, tiles of products are rows of columns. Where rows are
// queries, a tile's rows of weights are in shared memory, and go from and to device memory whole.
#pragma once

#include "cuda/sm80/kernel.cuh"

namespace jax_natten::sm80 {

inline constexpr int kUnfusedRows = 64;
inline constexpr int kMostStarts = 2048;  // positions of a box, all axes together

// ---- rows of weights

// Bytes of a tile's rows of weights, which lie behind what else is shared; more than there is where
// a row alone is too long.
template <typename Element>
size_t bytes_of_weights(const Problem<kAxes>& problem) {
  const int64_t slots = geometry::min(problem.slots(), static_cast<int64_t>(shared_limit()));
  return kUnfusedRows * slots * sizeof(Element);
}

// The weights of a warp's rows, in shared memory one row after the other; a lane has every
// kWarp-th slot of each.
template <typename Element>
class WarpWeights {
 public:
  // `shared` has the weights of all rows of the block, whose numbers are `rows`.
  __device__ WarpWeights(Element* shared, const int32_t (&rows)[kUnfusedRows], int slots)
      : shared_(shared + first_row<1>() * slots), slots_(slots) {
#pragma unroll
    for (int i = 0; i < kRows; ++i) rows_[i] = rows[first_row<1>() + i];
  }

  __device__ void clear() {
    for (int i = lane(); i < kRows * slots_; i += kWarp) shared_[i] = {};
    __syncwarp();
  }

  // From the array to shared memory; what has no row becomes 0.
  __device__ void load(const Element* array) {
    for (int slot = lane(); slot < slots_; slot += kWarp) {
      Element weights[kRows];  // all on their way at once
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        weights[i] = rows_[i] == kNoRow ? Element{} : array[in_array(i, slot)];
      }
#pragma unroll
      for (int i = 0; i < kRows; ++i) shared_[i * slots_ + slot] = weights[i];
    }
    __syncwarp();
  }

  __device__ void store(Element* array) const {
    __syncwarp();
    for (int slot = lane(); slot < slots_; slot += kWarp) {
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        if (rows_[i] != kNoRow) array[in_array(i, slot)] = shared_[i * slots_ + slot];
      }
    }
  }

 private:
  static constexpr int kRows = 16;

  __device__ int64_t in_array(int i, int slot) const { return int64_t{rows_[i]} * slots_ + slot; }

  Element* shared_;
  int slots_;
  int32_t rows_[kRows];
};

// Calls visit(result, where the pair's weight is) for the pairs of a tile that see each other.
// Queries are rows of weights: those of the tile, or the columns' in the array.
template <Side kSide, int kTiles, int kColumns, typename Visit>
__device__ void for_each_pair(Results<1, kTiles>& results, const Plan<kUnfusedRows, kColumns>& plan,
                              int begin, int slots, Visit&& visit) {
  const uint32_t guard = plan.list.guard;
  // All are read before a visit may write, which to the compiler could be to them.
  uint2 place[kTiles];
  int2 entry[kTiles];
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
    place[n] = *reinterpret_cast<const uint2*>(&plan.place[begin + column_of(n)]);
    entry[n] = *reinterpret_cast<const int2*>(&plan.column_entry[begin + column_of(n)]);
  }
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int row = row_of(first_row<1>(), 0, r);
    const RowSpan span = plan.span[row];
    const int row_entry = plan.row_entry[row] + (kSide == Side::kQueries ? row * slots : 0);
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        if (!sees(span, e == 0 ? place[n].x : place[n].y, guard)) continue;
        const int at = row_entry + (e == 0 ? entry[n].x : entry[n].y);
        if constexpr (kSide == Side::kQueries) {
          visit(results.x[0][n][2 * r + e], at);
        } else {
          const int64_t query = plan.column[begin + column_of(n) + e];
          visit(results.x[0][n][2 * r + e], query * slots + at);
        }
      }
    }
  }
}

// ---- qk

template <typename Element, int kDim>
struct QkShared {
  static constexpr int kColumns = columns_for<Element, kDim>(1);
  Rows<Element, kDim, kUnfusedRows> query;
  Rows<Element, kDim, kColumns> key[2];
  Plan<kUnfusedRows, kColumns> plan;
  alignas(16) Element weights[1];  // [rows, slots]
};

template <typename Element, int kDim>
__global__ void __launch_bounds__(kThreads, 4)
    qk_kernel(const __grid_constant__ QkArrays<Element> arrays,
              const __grid_constant__ Problem<kAxes> p, const __grid_constant__ Tiling tiling) {
  using Shared = QkShared<Element, kDim>;
  constexpr int kColumns = Shared::kColumns;
  Shared& shared = shared_memory<Shared>();
  const TileIndex tile = tile_index<Side::kQueries>(p, tiling, blockIdx.x);
  make_plan<Family::kUnfused, Side::kQueries>(shared.plan, p, tiling, tile);
  const Element* keys = rows_of(arrays.key, tile.sample);
  Element* attn = rows_of(arrays.attn, tile.sample);
  const Matrix<Element> matrix(p.tf32);
  const int dim = static_cast<int>(p.dim), slots = static_cast<int>(p.slots());
  const int row = first_row<1>();

  load_rows<kDim, kUnfusedRows>(shared.query.x, rows_of(arrays.query, tile.sample),
                                shared.plan.source, dim);
  // Slots that stay without a key are 0.
  WarpWeights<Element>(shared.weights, shared.plan.row, slots).clear();
  for_each_tile(
      shared.plan,
      [&](int buffer, int begin) {
        load_rows<kDim, kColumns>(shared.key[buffer].x, keys, shared.plan.column + begin, dim);
      },
      [&](int buffer, int begin) {
        Results<1, kColumns / 8> s;
        s.clear();
        multiply_rows<Element, kDim>(s, matrix, shared.query.left(row), shared.key[buffer].right());
        for_each_pair<Side::kQueries>(s, shared.plan, begin, slots, [&](float product, int at) {
          shared.weights[at] = device::narrow(product, Element{});
        });
      });
  WarpWeights<Element>(shared.weights, shared.plan.row, slots).store(attn);
}

// ---- av and inverse

template <typename Element, int kDim>
struct WeightedShared {
  static constexpr int kColumns = columns_for<Element, kDim>(1);
  Rows<Element, kDim, kColumns> x[2];
  Rows<Element, kDim, kUnfusedRows> staging;
  Plan<kUnfusedRows, kColumns> plan;
};

template <typename Element, int kDim>
struct AvShared : WeightedShared<Element, kDim> {
  alignas(16) Element weights[1];  // [rows, slots]
};

template <typename Element, int kDim>
struct InverseShared : WeightedShared<Element, kDim> {
  int starts[kMostStarts];
};

// out, the sum of the columns' rows of x by their pairs' weights, which for_each_pair finds in
// `weights`.
template <Side kSide, typename Element, int kDim>
__device__ void sum_weighted(WeightedShared<Element, kDim>& shared, const Tensor<Element>& out,
                             const Tensor<const Element>& x, const Element* weights,
                             const Problem<kAxes>& p, int64_t sample) {
  constexpr int kColumns = WeightedShared<Element, kDim>::kColumns;
  const Matrix<Element> matrix(p.tf32);
  const int length = static_cast<int>(p.value_dim), slots = static_cast<int>(p.slots());
  const int row = first_row<1>();
  Results<1, kDim / 8> sum;
  sum.clear();
  for_each_tile<kSide == Side::kKeys>(
      shared.plan,
      [&](int buffer, int begin) {
        load_rows<kDim, kColumns>(shared.x[buffer].x, rows_of(x, sample),
                                  shared.plan.column + begin, length);
      },
      [&](int buffer, int begin) {
        Results<1, kColumns / 8> w;
        w.clear();
        for_each_pair<kSide>(w, shared.plan, begin, slots,
                             [&](float& weight, auto at) { weight = device::widen(weights[at]); });
        multiply_weights<Element, kDim>(sum, matrix, w, shared.x[buffer].right_transposed());
      });
  store_rows<kDim>(rows_of(out, sample), shared.plan.row + row, 0, length,
                   shared.staging.x + row * kDim, sum);
}

template <typename Element, int kDim>
__global__ void __launch_bounds__(kThreads, kDim <= 64 ? 4 : 2)
    av_kernel(const __grid_constant__ AvArrays<Element> arrays,
              const __grid_constant__ Problem<kAxes> p, const __grid_constant__ Tiling tiling) {
  auto& shared = shared_memory<AvShared<Element, kDim>>();
  const TileIndex tile = tile_index<Side::kQueries>(p, tiling, blockIdx.x);
  make_plan<Family::kUnfused, Side::kQueries>(shared.plan, p, tiling, tile);
  WarpWeights<Element>(shared.weights, shared.plan.row, static_cast<int>(p.slots()))
      .load(rows_of(arrays.attn, tile.sample));
  sum_weighted<Side::kQueries, Element, kDim>(shared, arrays.out, arrays.value, shared.weights, p,
                                              tile.sample);
}

template <typename Element, int kDim>
__global__ void __launch_bounds__(kThreads, kDim <= 64 ? 4 : 2)
    inverse_kernel(const __grid_constant__ InverseArrays<Element> arrays,
                   const __grid_constant__ Problem<kAxes> p,
                   const __grid_constant__ Tiling tiling) {
  auto& shared = shared_memory<InverseShared<Element, kDim>>();
  const TileIndex tile = tile_index<Side::kKeys>(p, tiling, blockIdx.x);
  make_plan<Family::kUnfused, Side::kKeys>(shared.plan, p, tiling, tile, shared.starts);
  sum_weighted<Side::kKeys, Element, kDim>(shared, arrays.out, arrays.x,
                                           rows_of(arrays.attn, tile.sample), p, tile.sample);
}

// ---- launches

template <typename Element>
cudaError_t run_operation(cudaStream_t stream, const QkArrays<Element>& arrays,
                          const Problem<kAxes>& problem, int rank) {
  return with_dim(problem.dim, [&](auto dim) {
    constexpr int kDim = decltype(dim)::value;
    using Shared = QkShared<Element, kDim>;
    return launch_tiles<Side::kQueries>(
        stream, qk_kernel<Element, kDim>, sizeof(Shared) + bytes_of_weights<Element>(problem),
        arrays, problem,
        choose_tiling<Side::kQueries>(problem, rank, kUnfusedRows, Shared::kColumns));
  });
}

template <typename Element>
cudaError_t run_operation(cudaStream_t stream, const AvArrays<Element>& arrays,
                          const Problem<kAxes>& problem, int rank) {
  return with_dim(problem.value_dim, [&](auto dim) {
    constexpr int kDim = decltype(dim)::value;
    using Shared = AvShared<Element, kDim>;
    return launch_tiles<Side::kQueries>(
        stream, av_kernel<Element, kDim>, sizeof(Shared) + bytes_of_weights<Element>(problem),
        arrays, problem,
        choose_tiling<Side::kQueries>(problem, rank, kUnfusedRows, Shared::kColumns));
  });
}

template <typename Element>
cudaError_t run_operation(cudaStream_t stream, const InverseArrays<Element>& arrays,
                          const Problem<kAxes>& problem, int rank) {
  if (problem.slots() >= int64_t{1} << 31) return kNotServed;
  int64_t starts = 0;
  for (int a = 0; a < kAxes; ++a) {
    starts += geometry::min(2 * problem.window[a].kernel_size + kThreads,
                            positions(problem.window[a], problem.query_shape[a]));
  }
  if (starts > kMostStarts) return kNotServed;
  return with_dim(problem.value_dim, [&](auto dim) {
    constexpr int kDim = decltype(dim)::value;
    using Shared = InverseShared<Element, kDim>;
    return launch_tiles<Side::kKeys>(
        stream, inverse_kernel<Element, kDim>, sizeof(Shared), arrays, problem,
        choose_tiling<Side::kKeys>(problem, rank, kUnfusedRows, Shared::kColumns));
  });
}

}  // namespace jax_natten::sm80
