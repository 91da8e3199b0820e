// The gradients of attention over the neighborhood, on matrix units. Of p = exp(s - lse),
// delta = ct_lse - ct_out . out and ds = p (ct_out v + delta):
//   dq = scale sum ds k,   dk = scale sum ds q,   dv = sum p ct_out,   dbias = sum ds.
// One kernel has tiles of queries and makes delta and dq, a second one has tiles of keys and makes
// dk and dv. Both compute s and ds anew, and nothing is summed in an order that could change.
#pragma once

#include "cuda/sm80/kernel.cuh"

namespace jax_natten::sm80 {

// ---- queries

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
                        const Matrix<Element>& matrix, int buffer, int slot, bool is_rim,
                        const LogitScale& scale, const float* table,
                        const float (&shift)[kBlocks][2]) {
  const int row = first_row<kBlocks>();
  Results<kBlocks, kTiles> s;
  s.clear();
  ds.clear();
  multiply_rows<Element, kDim>(s, matrix, shared.q.left(row), shared.k[buffer].right());
  multiply_rows<Element, kDim>(ds, matrix, shared.ct.left(row), shared.v[buffer].right());
  finish_logits(s, shared.plan, slot, is_rim, scale, table);
#pragma unroll
  for (int i = 0; i < kBlocks * 2; ++i) {
    const int m = i / 2, r = i % 2;
    const float delta = shared.delta[row_of<kBlocks>(m, r)];
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

// The lane's shifts of its rows.
template <int kBlocks, int kRows>
__device__ void find_shifts(float (&shift)[kBlocks][2], const int32_t (&rows)[kRows],
                            const float* lse) {
#pragma unroll
  for (int i = 0; i < kBlocks * 2; ++i) {
    const int32_t row = rows[row_of<kBlocks>(i / 2, i % 2)];
    shift[i / 2][i % 2] = weight_shift(row == kNoRow ? -INFINITY : lse[row]);
  }
}

template <typename Element, int kDim, int kRows>
__global__ void __launch_bounds__(kThreads, kDim* kRows <= 64 * 64 ? 3 : 2)
    backward_queries_kernel(const __grid_constant__ BackwardArrays<Element> arrays,
                            const __grid_constant__ Problem<kAxes> p,
                            const __grid_constant__ Tiling tiling) {
  using Shared = BackwardQueriesShared<Element, kDim, kRows>;
  constexpr int kColumns = Shared::kColumns, kBlocks = kRows / 64;
  Shared& shared = shared_memory<Shared>();
  const TileIndex tile = tile_index<Side::kQueries>(p, tiling, blockIdx.x);
  const int64_t sample = tile.sample;
  make_plan<Family::kFused, Side::kQueries>(shared.plan, p, tiling, tile);
  const float* table = table_of(arrays.bias, sample, tile.head);
  const LogitScale scale(tiling.scale, arrays.has_bias());
  const Matrix<Element> matrix(p.tf32);
  const int dim = static_cast<int>(p.dim), value_dim = static_cast<int>(p.value_dim);
  const int row = first_row<kBlocks>();

  load_rows<kDim, kRows>(shared.q.x, rows_of(arrays.q, sample), shared.plan.row, dim);
  load_rows<kDim, kRows>(shared.ct.x, rows_of(arrays.ct_out, sample), shared.plan.row, value_dim);
  find_delta<kDim>(shared.delta, shared.plan.row, arrays, sample, value_dim);
  float shift[kBlocks][2];
  find_shifts(shift, shared.plan.row, rows_of(arrays.lse, sample));
  Results<kBlocks, kDim / 8> dq;
  dq.clear();
  for_each_tile(
      shared.plan,
      [&](int buffer, int slot) {
        const int32_t* columns = shared.plan.column[slot];
        load_rows<kDim, kColumns>(shared.k[buffer].x, rows_of(arrays.k, sample), columns, dim);
        load_rows<kDim, kColumns>(shared.v[buffer].x, rows_of(arrays.v, sample), columns,
                                  value_dim);
      },
      [&](int buffer, int slot, bool is_rim) {
        Results<kBlocks, kColumns / 8> ds;
        find_ds(ds, shared, matrix, buffer, slot, is_rim, scale, table, shift);
        multiply_weights<Element, kDim>(dq, matrix, ds, shared.k[buffer].right_transposed());
      });

  dq.scale(tiling.scale);
  store_rows<kDim>(rows_of(arrays.dq, sample), shared.plan.row + row, 0, dim,
                   shared.q.x + row * kPitch<Element, kDim>, dq);
}

// ---- keys

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
  const int32_t column = columns[i];
  const bool exists = column != kNoRow;
  copy_async<sizeof(float)>(shared_address(to + i), from + (exists ? column : 0), exists);
}

// A block has a tile of keys and kOut elements of both gradients. Reads delta.
template <typename Element, int kDim, int kRows, int kOut>
__global__ void __launch_bounds__(kThreads, kDim* kRows <= 64 * 64 ? 3 : 2)
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
  const int row = first_row<kBlocks>(), begin = static_cast<int>(blockIdx.y) * kOut;

  load_rows<kDim, kRows>(shared.k.x, rows_of(arrays.k, sample), shared.plan.row, dim);
  load_rows<kDim, kRows>(shared.v.x, rows_of(arrays.v, sample), shared.plan.row, value_dim);
  Results<kBlocks, kOut / 8> dk, dv;
  dk.clear();
  dv.clear();
  for_each_tile(
      shared.plan,
      [&](int buffer, int slot) {
        const int32_t* columns = shared.plan.column[slot];
        load_rows<kDim, kColumns>(shared.q[buffer].x, rows_of(arrays.q, sample), columns, dim);
        load_rows<kDim, kColumns>(shared.ct[buffer].x, rows_of(arrays.ct_out, sample), columns,
                                  value_dim);
        load_numbers<kColumns>(shared.lse[buffer], rows_of(arrays.lse, sample), columns);
        load_numbers<kColumns>(shared.delta[buffer], rows_of(arrays.delta, sample), columns);
      },
      [&](int buffer, int slot, bool is_rim) {
        Results<kBlocks, kColumns / 8> s, ds;
        s.clear();
        ds.clear();
        multiply_rows<Element, kDim>(s, matrix, shared.k.left(row), shared.q[buffer].right());
        multiply_rows<Element, kDim>(ds, matrix, shared.v.left(row), shared.ct[buffer].right());
        finish_logits(s, shared.plan, slot, is_rim, scale, table);
#pragma unroll
        for (int n = 0; n < kColumns / 8; ++n) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const float shift = weight_shift(shared.lse[buffer][column_of(n) + e]);
            const float delta = shared.delta[buffer][column_of(n) + e];
#pragma unroll
            for (int i = 0; i < kBlocks * 2; ++i) {
              float& weight = s.x[i / 2][n][i % 2 * 2 + e];
              float& gradient = ds.x[i / 2][n][i % 2 * 2 + e];
              weight = exp2_of(weight * scale.factor() - shift);
              gradient = weight * (gradient + delta);
            }
          }
        }
        multiply_weights<Element, kDim>(dv, matrix, s, shared.ct[buffer].right_transposed(begin));
        multiply_weights<Element, kDim>(dk, matrix, ds, shared.q[buffer].right_transposed(begin));
      });

  dk.scale(tiling.scale);
  store_rows<kDim>(rows_of(arrays.dk, sample), shared.plan.row + row, begin, dim,
                   shared.k.x + row * kPitch<Element, kDim>, dk);
  store_rows<kDim>(rows_of(arrays.dv, sample), shared.plan.row + row, begin, value_dim,
                   shared.v.x + row * kPitch<Element, kDim>, dv);
}

// ---- biases

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

// Reads delta. With fewer copies of the table than warps, warps take turns.
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
  float* copy = shared.tables + warp / turns * entries;
  const LogitScale scale(tiling.scale, true);
  const Matrix<Element> matrix(p.tf32);
  const int dim = static_cast<int>(p.dim), value_dim = static_cast<int>(p.value_dim);

  for (int i = static_cast<int>(threadIdx.x); i < copies * entries; i += kThreads) {
    shared.tables[i] = 0;
  }
  const auto tiles = static_cast<unsigned>(tiles_of_head<Side::kQueries>(p, tiling));
  for (unsigned t = part; t < tiles; t += parts) {
    const TileIndex tile = tile_index<Side::kQueries>(p, tiling, head_number * tiles + t);
    const int64_t sample = tile.sample;
    make_plan<Family::kFused, Side::kQueries>(shared.plan, p, tiling, tile);
    const float* table = table_of(arrays.bias, sample, tile.head);
    load_rows<kDim, kRows>(shared.q.x, rows_of(arrays.q, sample), shared.plan.row, dim);
    load_rows<kDim, kRows>(shared.ct.x, rows_of(arrays.ct_out, sample), shared.plan.row, value_dim);
    if (threadIdx.x < kRows) {
      const int32_t row = shared.plan.row[threadIdx.x];
      shared.delta[threadIdx.x] = row == kNoRow ? 0 : rows_of(arrays.delta, sample)[row];
    }
    float shift[1][2];
    find_shifts(shift, shared.plan.row, rows_of(arrays.lse, sample));
    for_each_tile(
        shared.plan,
        [&](int buffer, int slot) {
          const int32_t* columns = shared.plan.column[slot];
          load_rows<kDim, kColumns>(shared.k[buffer].x, rows_of(arrays.k, sample), columns, dim);
          load_rows<kDim, kColumns>(shared.v[buffer].x, rows_of(arrays.v, sample), columns,
                                    value_dim);
        },
        [&](int buffer, int slot, bool is_rim) {
          Results<1, kColumns / 8> ds;
          find_ds<Element, kDim, kRows>(ds, shared, matrix, buffer, slot, is_rim, scale, table,
                                        shift);
#pragma unroll
          for (int n = 0; n < kColumns / 8; ++n) {
#pragma unroll
            for (int r = 0; r < 2; ++r) {
              *reinterpret_cast<float2*>(&shared.ds[row_of<1>(0, r)][column_of(n)]) = {
                  ds.x[0][n][2 * r], ds.x[0][n][2 * r + 1]};
            }
          }
          __syncwarp();
          for (int turn = 0; turn < turns; ++turn) {
            if (warp % turns == turn) {
              for (int i = 0; i < 16; ++i) {
                const int row = first_row<1>() + i;
                const RowSpan span = shared.plan.span[row];
                float* entry = copy + shared.plan.row_entry[row];
                for (int c = lane(); c < kColumns; c += kWarp) {
                  if (sees(span, shared.plan.place[slot][c], shared.plan.list.guard)) {
                    entry[shared.plan.column_entry[slot][c]] += shared.ds[row][c];
                  }
                }
                __syncwarp();
              }
            }
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

// ---- launches

template <typename Element, int kDim, int kRows>
cudaError_t launch_backward_queries(cudaStream_t stream, const BackwardArrays<Element>& arrays,
                                    const Problem<kAxes>& problem, const Tiling& tiling) {
  return launch_tiles<BackwardQueriesShared<Element, kDim, kRows>, Side::kQueries>(
      stream, backward_queries_kernel<Element, kDim, kRows>, arrays, problem, tiling);
}

template <typename Element, int kDim, int kRows>
cudaError_t launch_backward_keys(cudaStream_t stream, const BackwardArrays<Element>& arrays,
                                 const Problem<kAxes>& problem, const Tiling& tiling) {
  constexpr int kOut = kDim < 128 ? kDim : 128;
  return launch_tiles<BackwardKeysShared<Element, kDim, kRows>, Side::kKeys>(
      stream, backward_keys_kernel<Element, kDim, kRows, kOut>, arrays, problem, tiling,
      geometry::ceil_div(geometry::max(problem.dim, problem.value_dim), kOut));
}

template <typename Element>
cudaError_t run_operation(cudaStream_t stream, const BackwardArrays<Element>& arrays,
                          const Problem<kAxes>& problem, int rank) {
  return with_dim(geometry::max(problem.dim, problem.value_dim), [&](auto dim) {
    constexpr int kDim = decltype(dim)::value;
    constexpr bool kIsHalf = sizeof(Element) == 2;
    using Queries = BackwardQueriesShared<Element, kDim, 64>;
    using Keys = BackwardKeysShared<Element, kDim, 64>;
    // All kernels can be launched, or none is.
    const size_t limit = shared_limit();
    int copies = kWarps;
    if (arrays.has_bias()) {
      while (copies > 0 && bytes_of_table_sums<Element, kDim>(problem, copies) > limit) copies /= 2;
    }
    if (copies == 0 || sizeof(Queries) > limit || sizeof(Keys) > limit) return kNotServed;

    cudaError_t error = with_tiling < Queries, BackwardQueriesShared<Element, kDim, 128>,
                Side::kQueries,
                kIsHalf && kDim <= 128 > (problem, rank, [&](const Tiling& tiling, auto rows) {
                             return launch_backward_queries<Element, kDim, decltype(rows)::value>(
                                 stream, arrays, problem, tiling);
                           });
    if (error != cudaSuccess) return error;
    error = with_tiling < Keys, BackwardKeysShared<Element, kDim, 128>, Side::kKeys,
    kIsHalf && kDim <= 64 > (problem, rank, [&](const Tiling& tiling, auto rows) {
                 return launch_backward_keys<Element, kDim, decltype(rows)::value>(stream, arrays,
                                                                                   problem, tiling);
               });
    if (error != cudaSuccess || !arrays.has_bias()) return error;
    const Tiling tiling =
        choose_tiling<Side::kQueries>(problem, rank, Queries::kRows, Queries::kColumns);
    return launch_tables<Element, kDim>(stream, arrays, problem, tiling, copies);
  });
}

}  // namespace jax_natten::sm80
