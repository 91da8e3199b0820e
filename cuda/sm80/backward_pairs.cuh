// The keys' part of the gradients where two warps share 32 keys: each has half of the queries'
// logits and one of the two gradients. For as many products, a warp reads two thirds of the
// operands that one with 16 keys of its own reads, and these reads are what such a warp waits for.
//
//          logits and ds of     gives       takes      sums
//   kDv    the first queries    ds          p          dv = sum p ct_out
//   kDk    the last queries     p           ds         dk = scale sum ds q
#pragma once

#include "cuda/sm80/backward_keys.cuh"

namespace jax_natten::sm80 {

// Half of a tile's weights, p or ds, of 32 keys: as left operands of products, as they are
// exchanged.
template <typename Element, int kTerms>
struct PairWeights {
  static constexpr int kBlocks = 2, kCount = kTerms * kBlocks;
  typename Matrix<Element>::Left x[kTerms][kBlocks];

  PairWeights() = default;

  template <int kTiles>
  __device__ PairWeights(const Results<kBlocks, kTiles>& results, const Matrix<Element>& matrix) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      matrix.from_results(x[i / kBlocks][i % kBlocks], results.x[i % kBlocks], i / kBlocks);
    }
  }

  // sum += weights^T rows
  template <int kDim, int kTiles>
  __device__ void multiply(Results<kBlocks, kTiles>& sum, const Matrix<Element>& matrix,
                           uint32_t rows) const {
    constexpr int kBytes = Matrix<Element>::kDepth * RowLayout<Element, kDim>::kBytes;
#pragma unroll
    for (int k = 0; k < kTerms; ++k) {
      multiply_depth<Element, kDim>(sum, matrix, x[k], rows + k * kBytes);
    }
  }
};

// What the two warps of a pair give each other. What a lane writes, only the same lane of the other
// warp reads; then it may write there itself.
template <typename Weights>
struct PairExchange {
  uint4 x[sizeof(Weights) / sizeof(uint4)][kWarp];

  // Gives weights to the other warp, which takes them by the same barrier.
  __device__ void give(const Weights& weights, int barrier) {
#pragma unroll
    for (int i = 0; i < Weights::kCount; ++i) {
      const auto& left = weights.x[i / Weights::kBlocks][i % Weights::kBlocks].x;
      x[i][lane()] = {left[0], left[1], left[2], left[3]};
    }
    asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "n"(2 * kWarp) : "memory");
  }

  __device__ Weights take(int barrier) const {
    asm volatile("bar.sync %0, %1;" ::"r"(barrier), "n"(2 * kWarp) : "memory");
    Weights weights;
#pragma unroll
    for (int i = 0; i < Weights::kCount; ++i) {
      const uint4 left = x[i][lane()];
      weights.x[i / Weights::kBlocks][i % Weights::kBlocks] = {left.x, left.y, left.z, left.w};
    }
    return weights;
  }
};

template <typename Element, int kDim>
struct PairsShared : BackwardKeysShared<Element, kDim, 64> {
  static constexpr int kHalf = PairsShared::kColumns / 2;
  using Weights = PairWeights<Element, kHalf / Matrix<Element>::kDepth>;
  PairExchange<Weights> exchange[2];  // of each pair
};

// A block has a tile of 64 keys. Reads delta.
template <typename Element, int kDim>
__global__ void __launch_bounds__(kThreads, kDim <= 64 ? 3 : 2)
    backward_pairs_kernel(const __grid_constant__ BackwardArrays<Element> arrays,
                          const __grid_constant__ Problem<kAxes> p,
                          const __grid_constant__ Tiling tiling) {
  using Shared = PairsShared<Element, kDim>;
  using Weights = typename Shared::Weights;
  constexpr int kRows = Shared::kRows, kHalf = Shared::kHalf;
  constexpr int kRowBytes = RowLayout<Element, kDim>::kBytes;
  enum : int { kDv, kDk };
  Shared& shared = shared_memory<Shared>();
  const TileIndex tile = tile_index<Side::kKeys>(p, tiling, blockIdx.x);
  const int64_t sample = tile.sample;
  make_plan<Family::kFused, Side::kKeys>(shared.plan, p, tiling, tile);
  const float* table = table_of(arrays.bias, sample, tile.head * p.group());
  const LogitScale scale(tiling.scale, arrays.has_bias());
  const Matrix<Element> matrix(p.tf32);
  const int dim = static_cast<int>(p.dim), value_dim = static_cast<int>(p.value_dim);
  const int warp = static_cast<int>(threadIdx.x) / kWarp, pair = warp / 2, role = warp % 2;
  const int row = pair * 32, own = role * kHalf;
  PairExchange<Weights>& exchange = shared.exchange[pair];
  const int barriers = 1 + 2 * pair;  // of the pair, for each role that takes

  load_rows<kDim, kRows>(shared.k.x, rows_of(arrays.k, sample), shared.plan.source, dim);
  load_rows<kDim, kRows>(shared.v.x, rows_of(arrays.v, sample), shared.plan.source, value_dim);
  Results<2, kDim / 8> sum;
  sum.clear();
  for_each_tile(
      shared.plan,
      [&](int buffer, int begin) {
        load_queries<Element, kDim, kRows>(shared, arrays, sample, dim, value_dim, buffer, begin);
      },
      [&](int buffer, int begin) {
        Results<2, kHalf / 8> s, ds;
        s.clear();
        ds.clear();
        multiply_rows<Element, kDim>(s, matrix, shared.k.left(row),
                                     shared.q[buffer].right() + own * kRowBytes);
        finish_logits(s, shared.plan, row, begin + own, scale, table);
        find_weights(s, shared.lse[buffer] + own, scale.factor());
        if (role == kDk) exchange.give(Weights(s, matrix), barriers + kDv);
        multiply_rows<Element, kDim>(ds, matrix, shared.v.left(row),
                                     shared.ct[buffer].right() + own * kRowBytes);
        find_ds(ds, s, shared.delta[buffer] + own);
        Weights mine, others;
        if (role == kDv) {
          mine = Weights(s, matrix);
          others = exchange.take(barriers + kDv);
          exchange.give(Weights(ds, matrix), barriers + kDk);
        } else {
          mine = Weights(ds, matrix);
        }
        const uint32_t rows = (role == kDv ? shared.ct : shared.q)[buffer].right_transposed();
        mine.template multiply<kDim>(sum, matrix, rows + own * kRowBytes);
        if (role == kDk) others = exchange.take(barriers + kDk);
        others.template multiply<kDim>(sum, matrix, rows + (kHalf - own) * kRowBytes);
      });

  // Each warp stages its results in the rows that the other one has read when it gives its weights.
  if (role == kDv) {
    store_rows<kDim>(rows_of(arrays.dv, sample), shared.plan.row + row, 0, value_dim,
                     shared.k.x + row * kDim, sum);
  } else {
    sum.scale(tiling.scale);
    store_rows<kDim>(rows_of(arrays.dk, sample), shared.plan.row + row, 0, dim,
                     shared.v.x + row * kDim, sum);
  }
}

}  // namespace jax_natten::sm80
