// The gradients of attention over the neighborhood, on matrix units. Of p = exp(s - lse),
// delta = ct_lse - ct_out . out and ds = p (ct_out v + delta):
//   dq = scale sum ds k,   dk = scale sum ds q,   dv = sum p ct_out,   dbias = sum ds.
// Each kernel computes s and ds anew, and nothing is summed in an order that could change.
#pragma once

#include "cuda/sm80/backward_keys.cuh"
#include "cuda/sm80/backward_pairs.cuh"
#include "cuda/sm80/backward_queries.cuh"
#include "cuda/sm80/backward_table.cuh"

namespace jax_natten::sm80 {

template <typename Element>
cudaError_t run_operation(cudaStream_t stream, const BackwardArrays<Element>& arrays,
                          const Problem<kAxes>& problem, int rank) {
  return with_dim(geometry::max(problem.dim, problem.value_dim), [&](auto dim) {
    constexpr int kDim = decltype(dim)::value;
    constexpr bool kMayBeLarge = sizeof(Element) == 2 && kDim <= 128;
    constexpr bool kKeysMayBeLarge = kMayBeLarge && kDim <= 64;
    using Queries = BackwardQueriesShared<Element, kDim, 64>;
    using LargeQueries = BackwardQueriesShared<Element, kDim, 128>;
    // Warps share keys, or each has its own.
    using Keys = std::conditional_t<kMayBeLarge, PairsShared<Element, kDim>,
                                    BackwardKeysShared<Element, kDim, 64>>;
    using LargeKeys = BackwardKeysShared<Element, kDim, 128>;
    constexpr int kOut = kDim < 128 ? kDim : 128;  // what registers hold of two gradients
    // All kernels can be launched, or none is.
    const size_t limit = shared_limit();
    int copies = kWarps;
    if (arrays.has_bias()) {
      while (copies > 0 && bytes_of_table_sums<Element, kDim>(problem, copies) > limit) copies /= 2;
    }
    if (copies == 0 || sizeof(Queries) > limit || sizeof(Keys) > limit) return kNotServed;

    cudaError_t error;
    if (arrays.has_bias()) {
      const Tiling tiling =
          choose_tiling<Side::kQueries>(problem, rank, Queries::kRows, Queries::kColumns);
      error = launch_tables<Element, kDim>(stream, arrays, problem, tiling, copies);
    } else {
      error = with_tiling<Queries, LargeQueries, Side::kQueries, kMayBeLarge>(
          problem, rank, kLargeTileGain<kDim>, [&](const Tiling& tiling, auto rows) {
            constexpr int kRows = decltype(rows)::value;
            return launch_tiles<Side::kQueries>(
                stream, backward_queries_kernel<Element, kDim, kRows>,
                sizeof(BackwardQueriesShared<Element, kDim, kRows>), arrays, problem, tiling);
          });
    }
    if (error != cudaSuccess) return error;
    return with_tiling<Keys, LargeKeys, Side::kKeys, kKeysMayBeLarge>(
        problem, rank, kLargeTileGain<kDim>, [&](const Tiling& tiling, auto rows) {
          constexpr int kRows = decltype(rows)::value;
          if constexpr (kMayBeLarge && kRows == 64) {
            return launch_tiles<Side::kKeys>(stream, backward_pairs_kernel<Element, kDim>,
                                             sizeof(Keys), arrays, problem, tiling);
          } else {
            return launch_tiles<Side::kKeys>(
                stream, backward_keys_kernel<Element, kDim, kRows, kOut>,
                sizeof(BackwardKeysShared<Element, kDim, kRows>), arrays, problem, tiling,
                geometry::ceil_div(geometry::max(problem.dim, problem.value_dim), kOut));
          }
        });
  });
}

}  // namespace jax_natten::sm80
