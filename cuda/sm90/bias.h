// Biases of logits, planned on the host: a shape, and where a head's table lies in shared memory.
//
// The entry of a key for a query is linear in the positions of both: it is that of the block's
// first key for its first query, as much on as the key lies, as much back as the query. Pairs that
// do not see each other are masked later and may have any entry, so there is room for theirs before
// the table and after it.
#pragma once

#include <cstdint>

#include "cuda/sm90/shape.h"

namespace jax_natten::sm90 {

inline constexpr int kMostRuns = 16;  // of a tile

struct BiasedShape : Shape {
  Tensor<const float> table;  // of a head
  float factor;               // of its entries: 1 over the scale, since logits are scaled later
  int bias[kAxes];            // entries between neighbors along an axis
  int before;                 // room before the table
  int entries;                // of the table
  int64_t room;               // that is needed
  // From the entry of a tile's first key to those of each run's first, for a lane's two queries, in
  // bytes.
  int run[kMostRuns][2];
};

inline BiasedShape with_biases(const Shape& shape, const Problem<kAxes>& problem,
                               const Tensor<const float>& table) {
  BiasedShape result{shape, table, static_cast<float>(1 / problem.scale), {}, 0, 0, 0, {}};
  int64_t stride = 1, before = 0, after = 0;
  int first_bit = 0;  // of an axis in the number of a row
  int next_row = 0;   // entries from a lane's first query to its second, 8 rows later
  for (int a = kAxes - 1; a >= 0; --a) {
    constexpr int kBit = 3;
    const int bits = shape.log_rows[a];
    result.bias[a] = static_cast<int>(stride);
    if (first_bit <= kBit && kBit < first_bit + bits)
      next_row = result.bias[a] << (kBit - first_bit);
    first_bit += bits;
    before += (shape.queries[a] - 1) * stride;
    after += (shape.queries[a] + shape.keys[a] - 2) * stride;
    stride *= 2 * problem.window[a].kernel_size - 1;
  }
  result.before = static_cast<int>(before);
  result.entries = static_cast<int>(stride);
  result.room = before + stride + after;
  const int columns = shape.keys[2] / kRun;
  for (int i = 0; i < columns * shape.keys[1] * shape.keys[0]; ++i) {
    const int x = i % columns * kRun, y = i / columns % shape.keys[1];
    const int z = i / columns / shape.keys[1];
    const int entry = z * result.bias[0] + y * result.bias[1] + x;
    for (int r = 0; r < 2; ++r) result.run[i][r] = (entry - r * next_row) * 4;
  }
  return result;
}

}  // namespace jax_natten::sm90
