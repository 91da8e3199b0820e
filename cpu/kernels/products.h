// The matrix products of a tile: with its queries as the lanes of vectors where they are summed
// over channels, with channels as the lanes where they are summed over keys or queries.
//
// A table has an entry for each key of the tile's box and each of its queries, those of a key next
// to each other.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "cpu/kernels/rows.h"
#include "cpu/kernels/simd.h"
#include "cpu/tile.h"

namespace jax_natten::JAX_NATTEN_TARGET {

// Packed keys of a tile's box within those of its block.
template <typename Sum>
struct Keys {
  Rows<Sum> rows;      // the first is that of the box' first key
  int64_t row[kAxes];  // from one key to the next along an axis, in rows

  Keys(const Rows<Sum>& packed, const BlockView& block, const Tile& tile)
      : rows(packed), row{int64_t{block.axis(1).keys} * block.axis(2).keys, block.axis(2).keys, 1} {
    for (int a = 0; a < kAxes; ++a) rows.data += tile.box[a] * row[a] * kPanel;
  }

  Sum* at(int z, int y, int x) const { return rows.row(z * row[0] + y * row[1] + x); }
};

// Calls run(std::integral_constant<int, n>) for a number up to kMost.
template <int kMost, typename Run>
JAX_NATTEN_INLINE void with_constant(int n, Run&& run) {
  if constexpr (kMost > 0) {
    if (n == kMost) {
      run(std::integral_constant<int, kMost>{});
    } else {
      with_constant<kMost - 1>(n, run);
    }
  }
}

// sum[j] = sum_c key[j][c] query[c], of so many keys in a row and a vector of queries.
template <int kKeys, typename Sum>
JAX_NATTEN_INLINE void dot(Vector<Sum> (&sum)[kKeys], const Sum* keys, int64_t panel,
                           const Sum* queries, int64_t channels) {
  for (; channels > 0; channels -= kPanel, keys += panel, queries += kPanel * kTileQueries) {
    const int count = static_cast<int>(std::min<int64_t>(channels, kPanel));
    for (int c = 0; c < count; ++c) {
      const Vector<Sum> query = load(queries + c * kTileQueries);
      JAX_NATTEN_UNROLL
      for (int j = 0; j < kKeys; ++j) sum[j] += keys[j * kPanel + c] * query;
    }
  }
}

// Most keys at a time: their sums take half of the registers, or somewhat more where the others
// suffice.
inline constexpr int kMostKeys = kRegisters == 32 ? 16 : 12;

// The products of keys with a vector of the tile's queries, transposed ones, for the keys of a
// box: calls visit(z, y, x, sums) for runs of keys along the last axis. Runs may overlap.
template <typename Sum, typename Begin, typename Visit>
JAX_NATTEN_INLINE void for_each_product(const Keys<Sum>& keys, const Sum* queries, const Box& box,
                                        Begin&& begin, Visit&& visit) {
  const auto& [z_range, y_range, x_range] = box.axis;
  const int length = x_range.count();
  if (length <= 0) return;
  const int runs = (length + kMostKeys - 1) / kMostKeys;
  with_constant<kMostKeys>((length + runs - 1) / runs, [&](auto constant) JAX_NATTEN_LAMBDA {
    constexpr int kKeys = decltype(constant)::value;
    for (int z = z_range.begin; z < z_range.end; ++z) {
      for (int y = y_range.begin; y < y_range.end; ++y) {
        for (int r = 0; r < runs; ++r) {
          const int x = x_range.begin + std::min(r * kKeys, length - kKeys);
          Vector<Sum> sum[kKeys];
          begin(z, y, x, sum);
          dot(sum, keys.at(z, y, x), keys.rows.panel, queries, keys.rows.channels);
          visit(z, y, x, sum);
        }
      }
    }
  });
}

// out[g] = sum_j weight[j][g] value[j] over the keys of a box, of so many queries in a row and a
// vector or two of channels.
template <int kQueries, int kVectors, typename Sum>
__attribute__((noinline)) void combine_channels(Sum* out, const Sum* weights,
                                                const Keys<Sum>& values, int64_t offset,
                                                const Box& box, const int (&size)[kAxes]) {
  constexpr int kLanes = kWidth<Sum>;
  Vector<Sum> sum[kQueries][kVectors];
  JAX_NATTEN_UNROLL
  for (int g = 0; g < kQueries; ++g) {
    JAX_NATTEN_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      sum[g][v] = Vector<Sum>{};
    }
  }
  const auto& [z_range, y_range, x_range] = box.axis;
  for (int z = z_range.begin; z < z_range.end; ++z) {
    for (int y = y_range.begin; y < y_range.end; ++y) {
      const Sum* value = values.at(z, y, x_range.begin) + offset;
      const Sum* weight =
          weights + ((int64_t{z} * size[1] + y) * size[2] + x_range.begin) * kTileQueries;
      for (int x = x_range.begin; x < x_range.end; ++x, value += kPanel, weight += kTileQueries) {
        Vector<Sum> row[kVectors];
        JAX_NATTEN_UNROLL
        for (int v = 0; v < kVectors; ++v) row[v] = load(value + v * kLanes);
        JAX_NATTEN_UNROLL
        for (int g = 0; g < kQueries; ++g) {
          JAX_NATTEN_UNROLL
          for (int v = 0; v < kVectors; ++v) sum[g][v] += weight[g] * row[v];
        }
      }
    }
  }
  JAX_NATTEN_UNROLL
  for (int g = 0; g < kQueries; ++g) {
    JAX_NATTEN_UNROLL
    for (int v = 0; v < kVectors; ++v) store(out + g * kPanel + v * kLanes, sum[g][v]);
  }
}

// Calls run(offset of the channels, whether there are two vectors of them) for all channels.
template <typename Sum, typename Run>
JAX_NATTEN_INLINE void for_each_channels(int64_t channels, Run&& run) {
  constexpr int kLanes = kWidth<Sum>;
  for (int64_t c = 0; c < channels;) {
    const bool two = channels - c > kLanes;
    run(c, two);
    c += two ? 2 * kLanes : kLanes;
  }
}

// The same for the tile's queries, so many at a time, and all channels.
template <int kQueries, typename Sum>
void combine_strips(const Rows<Sum>& out, const Sum* weights, const Keys<Sum>& values,
                    const Shape& shape) {
  for (int first = 0; first < kTileQueries; first += kQueries) {
    const Box box = kQueries == 1 ? shape.box_of(first) : shape.strip(first, kQueries).box;
    for_each_channels<Sum>(out.channels, [&](int64_t c, bool two) {
      const int64_t p = c / kPanel, in_panel = c % kPanel;
      Sum* to = out.row(first) + p * out.panel + in_panel;
      const int64_t offset = p * values.rows.panel + in_panel;
      if (two) {
        combine_channels<kQueries, 2>(to, weights + first, values, offset, box, shape.size);
      } else {
        combine_channels<kQueries, 1>(to, weights + first, values, offset, box, shape.size);
      }
    });
  }
}

// out[i] = sum_j weight[j][i] value[j] for the tile's queries. The
// weights of pairs that don't see each other are 0, and never meet a value that is not finite.
template <typename Sum>
void combine(const Rows<Sum>& out, const Sum* weights, const Keys<Sum>& values,
             const Shape& shape) {
  combine_strips<kQuad>(out, weights, values, shape);
  // One query's own keys are all that it sees.
  if (!is_finite(out)) combine_strips<1>(out, weights, values, shape);
}

// ---- sums over queries

// sum[j] += sum_i weight[j][i] row[i] of so many keys in a row, over the strips of queries in
// `strips`, for a vector or two of channels.
template <int kLanes, int kKeys, int kVectors, typename Sum>
JAX_NATTEN_INLINE void spread_channels(Sum* sums, const Sum* weights, const Sum* rows,
                                       unsigned strips) {
  constexpr int kStep = kWidth<Sum>;
  Vector<Sum> sum[kKeys][kVectors];
  JAX_NATTEN_UNROLL
  for (int j = 0; j < kKeys; ++j) {
    JAX_NATTEN_UNROLL
    for (int v = 0; v < kVectors; ++v) sum[j][v] = load(sums + j * kPanel + v * kStep);
  }
  for (int first = 0; strips != 0; strips >>= 1, first += kLanes) {
    if ((strips & 1) == 0) continue;
    for (int i = first; i < first + kLanes; ++i) {
      Vector<Sum> row[kVectors];
      JAX_NATTEN_UNROLL
      for (int v = 0; v < kVectors; ++v) row[v] = load(rows + i * kPanel + v * kStep);
      JAX_NATTEN_UNROLL
      for (int j = 0; j < kKeys; ++j) {
        JAX_NATTEN_UNROLL
        for (int v = 0; v < kVectors; ++v) sum[j][v] += weights[j * kTileQueries + i] * row[v];
      }
    }
  }
  JAX_NATTEN_UNROLL
  for (int j = 0; j < kKeys; ++j) {
    JAX_NATTEN_UNROLL
    for (int v = 0; v < kVectors; ++v) store(sums + j * kPanel + v * kStep, sum[j][v]);
  }
}

// For keys in a row, all channels of them.
template <int kLanes, int kKeys, typename Sum>
__attribute__((noinline)) void spread_keys(Sum* sums, int64_t sums_panel, const Sum* weights,
                                           const Rows<Sum>& rows, unsigned strips) {
  for_each_channels<Sum>(rows.channels, [&](int64_t c, bool two) {
    const int64_t p = c / kPanel, in_panel = c % kPanel;
    Sum* to = sums + p * sums_panel + in_panel;
    const Sum* from = rows.data + p * rows.panel + in_panel;
    if (two) {
      spread_channels<kLanes, kKeys, 2>(to, weights, from, strips);
    } else {
      spread_channels<kLanes, kKeys, 1>(to, weights, from, strips);
    }
  });
}

// The same for all keys of the tile's box, so many at a time, and strips of so many queries.
template <int kLanes, int kMost, typename Sum>
void spread_strips(const Keys<Sum>& sums, const Sum* weights, const Rows<Sum>& rows,
                   const Shape& shape) {
  constexpr int kStrips = kTileQueries / kLanes;
  Box box[kStrips];
  for (int s = 0; s < kStrips; ++s) {
    box[s] = kLanes == 1 ? shape.box_of(s) : shape.strip(s * kLanes, kLanes).box;
  }
  const auto has = [](const Range& range, int begin, int end) {
    return range.begin < end && begin < range.end;
  };
  const int runs = (shape.size[2] + kMost - 1) / kMost;
  const int length = runs == 0 ? 1 : (shape.size[2] + runs - 1) / runs;
  for (int z = 0; z < shape.size[0]; ++z) {
    for (int y = 0; y < shape.size[1]; ++y, weights += shape.size[2] * kTileQueries) {
      unsigned in_row = 0;
      for (int s = 0; s < kStrips; ++s) {
        const bool sees = has(box[s].axis[0], z, z + 1) && has(box[s].axis[1], y, y + 1);
        in_row |= unsigned{sees} << s;
      }
      for (int x = 0; x < shape.size[2]; x += length) {
        const int count = std::min(length, shape.size[2] - x);
        unsigned strips = in_row;
        for (int s = 0; s < kStrips; ++s) {
          if (!has(box[s].axis[2], x, x + count)) strips &= ~(1u << s);
        }
        if (strips == 0) continue;
        with_constant<kMost>(count, [&](auto keys) {
          spread_keys<kLanes, decltype(keys)::value>(sums.at(z, y, x), sums.rows.panel,
                                                     weights + x * kTileQueries, rows, strips);
        });
      }
    }
  }
}

// sum[j] += sum_i weight[j][i] row[i] for all keys of the tile's box. The weights of pairs that
// don't see each other are 0, and never meet a row that is not finite.
template <typename Sum>
void spread(const Keys<Sum>& sums, const Sum* weights, const Rows<Sum>& rows, const Shape& shape) {
  if (is_finite(rows)) {
    spread_strips<kQuad, 6>(sums, weights, rows, shape);
  } else {
    spread_strips<1, 1>(sums, weights, rows, shape);
  }
}

}  // namespace jax_natten::JAX_NATTEN_TARGET
