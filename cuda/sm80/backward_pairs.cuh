// The keys' part of the gradients where two warps share 32 keys: each has half of the queries'
// logits and one of the two gradients. For as many products, a warp reads two thirds of the
// operands that one with 16 keys of its own reads, and these reads are what such a warp waits for.
//
//          p and ds of          gives       sums
//   kDv    the first queries    ds          dv = sum p ct_out
//   kDk    the last queries     p           dk = scale sum ds q
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

  // Exchanges the two, or not.
  __device__ friend void swap_where(bool condition, PairWeights& a, PairWeights& b) {
#pragma unroll
    for (int i = 0; i < kCount * 4; ++i) {
      uint32_t& x = a.x[i / 4 / kBlocks][i / 4 % kBlocks].x[i % 4];
      uint32_t& y = b.x[i / 4 / kBlocks][i / 4 % kBlocks].x[i % 4];
      const uint32_t old = x;
      x = condition ? y : x;
      y = condition ? old : y;
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

// What a warp gives the other one of its pair. Barriers are those of the warp that takes.
template <typename Weights>
struct PairExchange {
  uint4 x[Weights::kCount][kWarp];

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
  PairExchange<Weights> exchange[kThreads / kWarp];  // by the warp that gives
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
  const int warp = static_cast<int>(threadIdx.x / kWarp), role = warp % 2, other = warp ^ 1;
  const int row = warp / 2 * 32, own = role * kHalf;

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
        multiply_rows<Element, kDim>(ds, matrix, shared.v.left(row),
                                     shared.ct[buffer].right() + own * kRowBytes);
        find_weights(s, shared.lse[buffer] + own, scale.factor());
        find_ds(ds, s, shared.delta[buffer] + own);
        Weights kept(s, matrix), given(ds, matrix);
        swap_where(role == kDk, kept, given);
        shared.exchange[warp].give(given, 1 + other);
        const uint32_t rows = (role == kDv ? shared.ct : shared.q)[buffer].right_transposed();
        kept.template multiply<kDim>(sum, matrix, rows + own * kRowBytes);
        shared.exchange[other].take(1 + warp).template multiply<kDim>(
            sum, matrix, rows + (kHalf - own) * kRowBytes);
      });

  // What the other warp gave last it had from the last rows that it read of k and v.
  if (role == kDv) {
    store_rows<kDim>(rows_of(arrays.dv, sample), shared.plan.row + row, 0, value_dim,
                     shared.v.x + row * kDim, sum);
  } else {
    sum.scale(tiling.scale);
    store_rows<kDim>(rows_of(arrays.dk, sample), shared.plan.row + row, 0, dim,
                     shared.k.x + row * kDim, sum);
  }
}

}  // namespace jax_natten::sm80
