// A tile of logits between its product and its weights: scale, bias, mask, exponential.
//
// Logits are kept in powers of two: weights are exp2(factor * x - shift), one multiply-add and one
// exponential each. Where there is a bias, or a scale that is not positive, x is scaled first and
// the factor is 1.
#pragma once

#include <cmath>
#include <cstdint>

#include "cuda/sm80/matrix.cuh"
#include "cuda/sm80/plan.cuh"

namespace jax_natten::sm80 {

inline constexpr float kLog2E = 1.4426950408889634f;
inline constexpr float kLn2 = 0.6931471805599453f;

__device__ inline float exp2_of(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

// What the factor of logits is, and whether it is applied first.
struct LogitScale {
  float scale;
  bool is_applied_first;

  __device__ LogitScale(float scale, bool has_bias)
      : scale(scale * kLog2E), is_applied_first(has_bias || !(scale > 0)) {}

  __device__ float factor() const { return is_applied_first ? 1.f : scale; }
};

// The shift that makes weights of logits, from a row's lse; the weights of a row without any are 0.
__device__ inline float weight_shift(float lse) {
  return lse == -INFINITY ? INFINITY : lse * kLog2E;
}

// The row of the plan that the lane has in block m of the warp's, whose first row is given: of each
// block it has rows l/4 (r = 0) and l/4 + 8 (r = 1).
__device__ inline int row_of(int first, int m, int r) {
  return first + m * 16 + r * 8 + lane() / 4;
}

// The first row of a warp's blocks where every warp has rows of its own.
template <int kBlocks>
__device__ int first_row() {
  return static_cast<int>(threadIdx.x / kWarp) * kBlocks * 16;
}

// The shifts of the lane's rows.
template <int kBlocks, int kRows>
__device__ void find_shifts(float (&shift)[kBlocks][2], const int32_t (&rows)[kRows],
                            const float* lse) {
#pragma unroll
  for (int i = 0; i < kBlocks * 2; ++i) {
    const int32_t row = rows[row_of(first_row<kBlocks>(), i / 2, i % 2)];
    shift[i / 2][i % 2] = weight_shift(row == kNoRow ? -INFINITY : lse[row]);
  }
}

// The sum over the four lanes that share a row.
__device__ inline float sum_of_row(float x) {
  x += __shfl_xor_sync(kAllLanes, x, 1);
  return x + __shfl_xor_sync(kAllLanes, x, 2);
}

// The lane's two columns in tile n of 8.
__device__ inline int column_of(int n) { return n * 8 + lane() % 4 * 2; }

// The lane's rows of a warp's blocks, as the plan has them.
template <int kBlocks>
struct LaneRows {
  RowSpan span[kBlocks][2];
  int32_t entry[kBlocks][2];  // of the table

  template <int kRows, int kColumns>
  __device__ LaneRows(const Plan<kRows, kColumns>& plan, int first) {
#pragma unroll
    for (int i = 0; i < kBlocks * 2; ++i) {
      const int row = row_of(first, i / 2, i % 2);
      span[i / 2][i % 2] = plan.span[row];
      entry[i / 2][i % 2] = plan.row_entry[row];
    }
  }
};

// Adds table entries, `weight` times each, where the row sees the column; -inf elsewhere.
template <int kBlocks, int kTiles, int kRows, int kColumns>
__device__ void add_bias(Results<kBlocks, kTiles>& s, const Plan<kRows, kColumns>& plan, int first,
                         int begin, const float* table, float weight) {
  const uint32_t guard = plan.list.guard;
  const LaneRows<kBlocks> rows(plan, first);
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
    const int column = begin + column_of(n);
    const auto place = *reinterpret_cast<const uint2*>(&plan.place[column]);
    const auto entry = *reinterpret_cast<const int2*>(&plan.column_entry[column]);
#pragma unroll
    for (int i = 0; i < kBlocks * 2; ++i) {
      const int m = i / 2, r = i % 2;
      float (&x)[4] = s.x[m][n];
      const auto finish = [&](float& logit, uint32_t place, int32_t entry) {
        const bool seen = sees(rows.span[m][r], place, guard);
        logit = seen ? logit + weight * __ldg(table + (rows.entry[m][r] + entry)) : -INFINITY;
      };
      finish(x[2 * r], place.x, entry.x);
      finish(x[2 * r + 1], place.y, entry.y);
    }
  }
}

// Products become logits. The columns are those that begin there in the plan.
template <int kBlocks, int kTiles, int kRows, int kColumns>
__device__ void finish_logits(Results<kBlocks, kTiles>& s, const Plan<kRows, kColumns>& plan,
                              int first, int begin, const LogitScale& scale, const float* table) {
  if (scale.is_applied_first) s.scale(scale.scale);
  if (table != nullptr) return add_bias(s, plan, first, begin, table, kLog2E);
  if (!plan.template is_rim<kTiles * 8>(begin)) return;
  const uint32_t guard = plan.list.guard;
  const LaneRows<kBlocks> rows(plan, first);
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
    const auto place = *reinterpret_cast<const uint2*>(&plan.place[begin + column_of(n)]);
#pragma unroll
    for (int i = 0; i < kBlocks * 2; ++i) {
      const int m = i / 2, r = i % 2;
      float (&x)[4] = s.x[m][n];
      if (!sees(rows.span[m][r], place.x, guard)) x[2 * r] = -INFINITY;
      if (!sees(rows.span[m][r], place.y, guard)) x[2 * r + 1] = -INFINITY;
    }
  }
}

}  // namespace jax_natten::sm80
