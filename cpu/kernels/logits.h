// The logits of a tile: scaled products in base 2 with the bias, masked where a query does not see
// a key.
#pragma once

#include <cstdint>

#include "cpu/kernels/bias.h"
#include "cpu/kernels/products.h"
#include "cpu/kernels/simd.h"

namespace jax_natten::JAX_NATTEN_TARGET {

template <typename Sum>
inline constexpr Sum kLog2E = static_cast<Sum>(1.44269504088896340736);
template <typename Sum>
inline constexpr Sum kLn2 = static_cast<Sum>(0.69314718055994530942);

// What is taken from the logits of a tile's queries to make weights, and whether a query has a
// derivative: one that sees no key, or all of whose logits are -infinity, has none, and weights 0.
template <typename Sum>
void read_shifts(Sum* shifts, bool (&has_derivative)[kTileQueries],
                 const typename Tensor<const Sum>::Head& lses, const Tile& tile,
                 const Shape& shape) {
  for (int l = 0; l < kTileQueries; ++l) {
    const Sum lse = shape.sees[l] ? *lses.row(tile.token[l]) : -kInfinity<Sum>;
    has_derivative[l] = lse != -kInfinity<Sum>;
    shifts[l] = has_derivative[l] ? lse * kLog2E<Sum> : kInfinity<Sum>;
  }
}

// The keys that a vector of a tile's queries, from the `first` on, sees together: along the last
// axis the whole box of the tile, so that what combines more queries finds their weights there.
template <typename Sum>
Strip vector_strip(const Shape& shape, int first) {
  Strip strip = shape.strip(first, kWidth<Sum>);
  if (strip.box.volume() > 0) strip.box.axis[2] = {0, shape.size[2]};
  return strip;
}

// Calls visit(entry in a table) for every key of a vector's strip.
template <typename Sum, typename Visit>
JAX_NATTEN_INLINE void for_each_entry(const Shape& shape, int first, Visit&& visit) {
  const Box box = vector_strip<Sum>(shape, first).box;
  const auto& [z_range, y_range, x_range] = box.axis;
  for (int z = z_range.begin; z < z_range.end; ++z) {
    // Rows of the box follow each other.
    const int64_t begin = shape.entry(z, y_range.begin, x_range.begin);
    const int64_t end = begin + int64_t{y_range.count()} * x_range.count();
    for (int64_t key = begin; key < end; ++key) visit(key * kTileQueries + first);
  }
}

// Which of the lanes of a vector see a key.
template <typename Sum>
class Sight {
 public:
  Sight(const Shape& shape, int first) {
    for (int a = 0; a < kAxes; ++a) {
      begin_[a] = load_ints<Sum>(shape.lanes[a].begin + first);
      end_[a] = load_ints<Sum>(shape.lanes[a].end + first);
    }
  }

  JAX_NATTEN_INLINE Mask<Sum> sees(int axis, int key) const {
    return (key >= begin_[axis]) & (key < end_[axis]);
  }

 private:
  Mask<Sum> begin_[kAxes];
  Mask<Sum> end_[kAxes];
};

// Writes the logits of the queries from `first` on, a vector of them, -infinity where a query
// doesn't see a key; returns their maxima. `bias` is null or holds the bias of every entry.
template <typename Sum>
__attribute__((noinline)) void logits_of_vector(Sum* logits, Sum* maxima, const Keys<Sum>& keys,
                                                const Sum* queries, const Sum* bias,
                                                const Shape& shape, int first) {
  const auto [box, inner] = vector_strip<Sum>(shape, first);
  const Sight<Sum> sight(shape, first);
  const Vector<Sum> nothing = splat<Sum>(-kInfinity<Sum>);
  Vector<Sum> most = nothing;
  for_each_product(
      keys, queries + first, box,
      [&](int z, int y, int x, auto& sum) JAX_NATTEN_LAMBDA {
        const Sum* from = bias + shape.entry(z, y, x) * kTileQueries + first;
        JAX_NATTEN_UNROLL
        for (auto& lane : sum) {
          lane = bias == nullptr ? Vector<Sum>{} : load(from);
          from += kTileQueries;
        }
      },
      [&](int z, int y, int x, auto& sum) JAX_NATTEN_LAMBDA {
        constexpr int kKeys = std::extent_v<std::remove_reference_t<decltype(sum)>>;
        Sum* to = logits + shape.entry(z, y, x) * kTileQueries + first;
        const bool all_see = inner.axis[0].begin <= z && z < inner.axis[0].end &&
                             inner.axis[1].begin <= y && y < inner.axis[1].end &&
                             inner.axis[2].begin <= x && x + kKeys <= inner.axis[2].end;
        if (!all_see) {
          const Mask<Sum> row = sight.sees(0, z) & sight.sees(1, y);
          JAX_NATTEN_UNROLL
          for (int j = 0; j < kKeys; ++j) {
            sum[j] = select(row & sight.sees(2, x + j), sum[j], nothing);
          }
        }
        JAX_NATTEN_UNROLL
        for (int j = 0; j < kKeys; ++j) {
          most = largest(sum[j], most);
          store(to + j * kTileQueries, sum[j]);
        }
      });
  store(maxima + first, most);
}

// Of all queries of a tile.
template <typename Sum>
void tile_logits(Sum* logits, Sum* maxima, const Keys<Sum>& keys, const Sum* queries,
                 const Sum* bias, const Shape& shape) {
  for (int first = 0; first < kTileQueries; first += kWidth<Sum>) {
    logits_of_vector(logits, maxima, keys, queries, bias, shape, first);
  }
}

// Makes weights of logits, 0 where a query does not see a key, even where the query's lse is NaN.
template <typename Sum>
__attribute__((noinline)) void exponentials(Sum* logits, const Sum* shifts, const Shape& shape) {
  const Vector<Sum> nothing = splat<Sum>(-kInfinity<Sum>);
  for (int first = 0; first < kTileQueries; first += kWidth<Sum>) {
    const Vector<Sum> shift = load(shifts + first);
    for_each_entry<Sum>(shape, first, [&](int64_t entry) JAX_NATTEN_LAMBDA {
      const Vector<Sum> logit = load(logits + entry);
      store(logits + entry, select(logit == nothing, Vector<Sum>{}, exp2<Sum>(logit - shift)));
    });
  }
}

// Products alone, of all queries of a tile.
template <typename Sum>
__attribute__((noinline)) void tile_products(Sum* products, const Keys<Sum>& keys,
                                             const Sum* queries, const Shape& shape) {
  for (int first = 0; first < kTileQueries; first += kWidth<Sum>) {
    for_each_product(
        keys, queries + first, vector_strip<Sum>(shape, first).box,
        [&](int, int, int, auto& sum) JAX_NATTEN_LAMBDA {
          JAX_NATTEN_UNROLL
          for (auto& lane : sum) lane = Vector<Sum>{};
        },
        [&](int z, int y, int x, auto& sum) JAX_NATTEN_LAMBDA {
          Sum* to = products + shape.entry(z, y, x) * kTileQueries + first;
          JAX_NATTEN_UNROLL
          for (auto& lane : sum) {
            store(to, lane);
            to += kTileQueries;
          }
        });
  }
}

}  // namespace jax_natten::JAX_NATTEN_TARGET
