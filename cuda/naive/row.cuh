// A few lanes of a warp that work on one row of an array together, and the walk of all rows over
// the grid.
//
// The lanes hold a piece of the row, kWidth elements, in registers: each lane kUnits units of
// kUnit neighboring elements, a unit of every lane before the next unit of any. Rows shorter than
// that are padded with zeros in registers. Longer ones are produced piece by piece, each piece by
// other lanes, which all compute the row's weights anew; products over them take what lies beyond
// the first piece from memory.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cpu/problem.h"
#include "cuda/common/launch.cuh"
#include "cuda/common/number.cuh"

namespace jax_natten::naive {

inline constexpr int kThreads = 128;           // of a block
inline constexpr int kBlocksPerProcessor = 4;  // bounds the registers
inline constexpr int kWarp = 32;
inline constexpr int kUnit = 4;   // elements that a lane loads at once
inline constexpr int kUnits = 2;  // that a lane holds

// Neighbors whose rows are on their way from memory together.
template <typename Element>
inline constexpr int kBatch = std::is_same_v<Element, double> ? 2 : 4;

template <typename Element>
struct alignas(sizeof(Element) * kUnit < 16 ? sizeof(Element) * kUnit : 16) Unit {
  Element value[kUnit];
};

template <typename Sum>
struct Piece {
  Sum value[kUnits * kUnit];

  __device__ void clear() {
    for (Sum& x : value) x = 0;
  }
  __device__ void scale(Sum a) {
    for (Sum& x : value) x *= a;
  }
  __device__ void add_scaled(Sum a, const Piece& piece) {
    for (int e = 0; e < kUnits * kUnit; ++e) value[e] += a * piece.value[e];
  }
  __device__ Sum dot(const Piece& piece) const {
    Sum total = 0;
    for (int e = 0; e < kUnits * kUnit; ++e) total += value[e] * piece.value[e];
    return total;
  }
};

template <typename Element, int kLanes>
struct Lanes {
  using Sum = Accumulator<Element>;
  static constexpr int kCount = kLanes;
  static constexpr int64_t kWidth = kLanes * kUnits * kUnit;
  // Only the largest group meets rows that are longer than its piece.
  static constexpr bool kHasLongRows = kLanes == kWarp;

  static __device__ int lane() { return static_cast<int>(threadIdx.x) % kLanes; }

  // The group's lanes within the warp: others may be elsewhere in the program.
  static __device__ unsigned mask() {
    return ~0u >> (kWarp - kLanes) << (threadIdx.x % kWarp / kLanes * kLanes);
  }

  static __device__ Sum sum(Sum x) {
    for (int offset = kLanes / 2; offset > 0; offset /= 2) {
      x += __shfl_xor_sync(mask(), x, offset);
    }
    return x;
  }

  // Rows begin at multiples of their length, so units are aligned where they divide it.
  static __device__ Piece<Sum> load(const Element* row, int64_t length, int64_t begin = 0) {
    Piece<Sum> piece;
    for (int u = 0; u < kUnits; ++u) {
      const int64_t at = begin + (u * kLanes + lane()) * kUnit;
      Unit<Element> unit{};
      if (length % kUnit == 0) {
        if (at < length) unit = *reinterpret_cast<const Unit<Element>*>(row + at);
      } else {
        for (int e = 0; e < kUnit; ++e) {
          if (at + e < length) unit.value[e] = row[at + e];
        }
      }
      for (int e = 0; e < kUnit; ++e) piece.value[u * kUnit + e] = device::widen(unit.value[e]);
    }
    return piece;
  }

  static __device__ void store(Element* row, int64_t length, int64_t begin, Sum scale,
                               const Piece<Sum>& piece) {
    for (int u = 0; u < kUnits; ++u) {
      const int64_t at = begin + (u * kLanes + lane()) * kUnit;
      Unit<Element> unit;
      for (int e = 0; e < kUnit; ++e) {
        unit.value[e] = device::narrow(scale * piece.value[u * kUnit + e], Element{});
      }
      if (length % kUnit == 0) {
        if (at < length) *reinterpret_cast<Unit<Element>*>(row + at) = unit;
      } else {
        for (int e = 0; e < kUnit; ++e) {
          if (at + e < length) row[at + e] = unit.value[e];
        }
      }
    }
  }

  // This lane's share of the product of two rows, whose first pieces are given.
  static __device__ Sum dot_share(const Piece<Sum>& a, const Element* a_row, const Piece<Sum>& b,
                                  const Element* b_row, int64_t length) {
    Sum total = a.dot(b);
    if constexpr (kHasLongRows) {
      for (int64_t at = kWidth; at < length; at += kWidth) {
        total += load(a_row, length, at).dot(load(b_row, length, at));
      }
    }
    return total;
  }

  // The piece that begins at `begin` of a row whose first piece is given.
  static __device__ Piece<Sum> piece_at(int64_t begin, const Piece<Sum>& first, const Element* row,
                                        int64_t length) {
    if constexpr (kHasLongRows) {
      if (begin > 0) return load(row, length, begin);
    }
    return first;
  }
};

// A piece of a token's row.
struct Row {
  int64_t sample;
  int64_t head;
  int64_t token;
  int64_t begin;  // of the piece, a multiple of kWidth
};

// How many pieces there are in `rows` rows; at least one each, since a row is more than its piece.
template <typename Group>
JAX_NATTEN_HOST_DEVICE int64_t pieces(int64_t length) {
  return geometry::max(geometry::ceil_div(length, Group::kWidth), 1);
}

// Calls visit(const Row&) for every piece of the rows of all tokens; neighboring groups get
// neighboring tokens, which share most of their neighbors.
template <typename Group, typename Visit>
__device__ void for_each_row(int64_t samples, int64_t heads, int64_t tokens, int64_t length,
                             Visit&& visit) {
  const int64_t pieces_of_row = pieces<Group>(length);
  const int64_t tasks = samples * heads * pieces_of_row * tokens;
  const int64_t step = static_cast<int64_t>(gridDim.x) * (kThreads / Group::kCount);
  int64_t task = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / Group::kCount;
  for (; task < tasks; task += step) {
    Row row;
    row.token = task % tokens;
    int64_t rest = task / tokens;
    row.begin = 0;
    if constexpr (Group::kHasLongRows) {
      row.begin = rest % pieces_of_row * Group::kWidth;
      rest /= pieces_of_row;
    }
    row.head = rest % heads;
    row.sample = rest / heads;
    visit(row);
  }
}

// Launches a kernel that is one for_each_row.
template <typename Group, typename Operands>
cudaError_t launch_rows(cudaStream_t stream, void (*kernel)(Operands), int64_t samples,
                        int64_t heads, int64_t tokens, int64_t length, const Operands& operands) {
  const int64_t tasks = samples * heads * tokens * pieces<Group>(length);
  return launch(stream, kernel, tasks, kThreads / Group::kCount, kThreads, operands);
}

// Some of a run's neighbors, from the one of number `first` on; the last batch of a run may reach
// past its end, where rows have no element.
template <typename Element, int Rank>
struct Batch {
  const Run<Rank>& run;
  int64_t first;

  __device__ bool has(int b) const { return first + b < run.count; }
  __device__ int64_t token(int b) const { return run.token + (first + b) * run.token_step; }
  __device__ int64_t slot(int b) const { return run.slot + first + b; }
  __device__ int64_t bias(int b) const { return run.bias + (first + b) * run.bias_step; }

  __device__ const Element* row(const typename Tensor<const Element>::Head& rows, int b) const {
    return has(b) ? rows.row(token(b)) : nullptr;
  }
  __device__ int64_t length(int64_t dim, int b) const { return has(b) ? dim : 0; }

  // A piece of every neighbor's row.
  template <typename Group, typename Sum = Accumulator<Element>>
  __device__ void load(Piece<Sum> (&pieces)[kBatch<Element>],
                       const typename Tensor<const Element>::Head& rows, int64_t dim,
                       int64_t begin = 0) const {
    for (int b = 0; b < kBatch<Element>; ++b) {
      pieces[b] = Group::load(row(rows, b), length(dim, b), begin);
    }
  }
};

// Calls visit(const Batch&) for all neighbors, in row-major order.
template <typename Element, int Rank, typename Visit>
__device__ void for_each_batch(const Neighborhood<Rank>& neighborhood, Visit&& visit) {
  neighborhood.for_each_run([&](const Run<Rank>& run) {
    for (int64_t m = 0; m < run.count; m += kBatch<Element>) visit(Batch<Element, Rank>{run, m});
  });
}

// Calls start(Lanes) with the group for rows of up to `length` elements.
template <typename Element, typename Start>
cudaError_t with_lanes(int64_t length, Start&& start) {
  if (length <= Lanes<Element, 4>::kWidth) return start(Lanes<Element, 4>{});
  if (length <= Lanes<Element, 8>::kWidth) return start(Lanes<Element, 8>{});
  if (length <= Lanes<Element, 16>::kWidth) return start(Lanes<Element, 16>{});
  return start(Lanes<Element, kWarp>{});
}

}  // namespace jax_natten::naive
