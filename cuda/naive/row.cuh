// A few lanes of a warp that work on one row of an array together, and the walk of all rows over
// the grid.
//
// The lanes hold a piece of the row, kWidth elements, in registers: each lane kUnits units of
// kUnit neighboring elements, a unit of every lane before the next unit of any. Rows shorter than
// that are padded with zeros in registers. Longer ones are produced piece by piece, each piece by
// other lanes, which all compute the row's weights anew; products over them take what lies beyond
// the first piece from memory.
//
// All groups of a warp stay together: loops run until the last of them is done, so that lanes can
// exchange values without asking who is there.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cpu/problem.h"
#include "cuda/common/launch.cuh"
#include "cuda/common/number.cuh"
#include "cuda/common/warp.cuh"

namespace jax_natten::naive {

inline constexpr int kThreads = 128;           // of a block
inline constexpr int kBlocksPerProcessor = 4;  // bounds the registers
inline constexpr int kPerLane = 8;             // elements of a row that a lane holds

// Neighbors whose rows are on their way from memory together.
template <typename Element>
inline constexpr int kBatch = std::is_same_v<Element, double> ? 2 : 4;

// What a lane loads at once, where rows begin at multiples of it.
template <typename Element>
inline constexpr int kVector = 16 / sizeof(Element);

// Neighboring elements, loaded and stored as one; in words, since narrow registers would each take
// an instruction to fill.
template <typename Element, int kCount>
struct alignas(sizeof(Element) * kCount) Unit {
  using Sum = Accumulator<Element>;
  using Word = std::conditional_t < sizeof(Element) * kCount<4, uint16_t, uint32_t>;
  static constexpr int kBytes = sizeof(Element) * kCount;

  Word word[kBytes / sizeof(Word)];

  __device__ Sum get(int e) const {
    if constexpr (sizeof(Element) == 8) {
      return __hiloint2double(word[2 * e + 1], word[2 * e]);
    } else if constexpr (sizeof(Element) == 4) {
      return __uint_as_float(word[e]);
    } else if constexpr (kCount == 1) {
      return device::widen(Element{word[0]});
    } else {
      return device::widen(Element{static_cast<uint16_t>(word[e / 2] >> (e % 2 * 16))});
    }
  }

  __device__ void set(int e, Sum value) {
    if constexpr (sizeof(Element) == 8) {
      word[2 * e] = __double2loint(value);
      word[2 * e + 1] = __double2hiint(value);
    } else if constexpr (sizeof(Element) == 4) {
      word[e] = __float_as_uint(value);
    } else if constexpr (kCount == 1) {
      word[0] = device::narrow(value, Element{}).bits;
    } else {
      const uint32_t bits = device::narrow(value, Element{}).bits;
      word[e / 2] = e % 2 == 0 ? bits : word[e / 2] | bits << 16;
    }
  }
};

template <typename Sum>
struct Piece {
  Sum value[kPerLane];

  __device__ void clear() {
    for (Sum& x : value) x = 0;
  }
  __device__ void scale(Sum a) {
    for (Sum& x : value) x *= a;
  }
  __device__ void add_scaled(Sum a, const Piece& piece) {
    for (int e = 0; e < kPerLane; ++e) value[e] += a * piece.value[e];
  }
  __device__ Sum dot(const Piece& piece) const {
    Sum total = 0;
    for (int e = 0; e < kPerLane; ++e) total += value[e] * piece.value[e];
    return total;
  }
};

// Rows' lengths are multiples of kUnit. kCount lanes.
template <typename Element, int kLanes, int kUnitSize>
struct Lanes {
  using Sum = Accumulator<Element>;
  static constexpr int kCount = kLanes;
  static constexpr int kUnit = kUnitSize;
  static constexpr int kUnits = kPerLane / kUnit;
  static constexpr int64_t kWidth = kLanes * kPerLane;
  // Only the largest group meets rows that are longer than its piece.
  static constexpr bool kHasLongRows = kLanes == kWarp;

  static __device__ int lane() { return static_cast<int>(threadIdx.x) % kLanes; }

  static __device__ Sum sum(Sum x) {
    for (int offset = kLanes / 2; offset > 0; offset /= 2) {
      x += __shfl_xor_sync(kAllLanes, x, offset);
    }
    return x;
  }

  // The piece of a row that begins at `begin`; zeros where there is no row.
  static __device__ Piece<Sum> load(const Element* row, int64_t length, int64_t begin = 0,
                                    bool exists = true) {
    return load_from(row + begin + lane() * kUnit, length - begin, exists);
  }

  // The same from this lane's first element on, of a row with so many elements left.
  static __device__ Piece<Sum> load_from(const void* first, int64_t left, bool exists) {
    Piece<Sum> piece;
    for (int u = 0; u < kUnits; ++u) {
      Unit<Element, kUnit> unit{};
      if (exists && (u * kLanes + lane()) * kUnit < left) {
        unit = static_cast<const Unit<Element, kUnit>*>(first)[u * kLanes];
      }
      for (int e = 0; e < kUnit; ++e) piece.value[u * kUnit + e] = unit.get(e);
    }
    return piece;
  }

  static __device__ void store(Element* row, int64_t length, int64_t begin, Sum scale,
                               const Piece<Sum>& piece) {
    for (int u = 0; u < kUnits; ++u) {
      const int64_t at = begin + (u * kLanes + lane()) * kUnit;
      Unit<Element, kUnit> unit;
      for (int e = 0; e < kUnit; ++e) {
        unit.set(e, scale * piece.value[u * kUnit + e]);
      }
      if (at < length) *reinterpret_cast<Unit<Element, kUnit>*>(row + at) = unit;
    }
  }

  // This lane's share of the product of two rows, whose first pieces are given.
  static __device__ Sum dot_share(const Piece<Sum>& a, const Element* a_row, const Piece<Sum>& b,
                                  const Element* b_row, int64_t length, bool exists = true) {
    Sum total = a.dot(b);
    if constexpr (kHasLongRows) {
      for (int64_t at = kWidth; exists && at < length; at += kWidth) {
        total += load(a_row, length, at).dot(load(b_row, length, at));
      }
    }
    return total;
  }

  // The piece that begins at `begin` of a row whose first piece is given.
  static __device__ Piece<Sum> piece_at(int64_t begin, const Piece<Sum>& first, const Element* row,
                                        int64_t length, bool exists) {
    if constexpr (kHasLongRows) {
      if (begin > 0) return load(row, length, begin, exists);
    }
    return first;
  }
};

// ---- rows

// A piece of a token's row.
struct Row {
  int64_t sample;
  int64_t head;
  int64_t token;
  int64_t begin;  // of the piece, a multiple of kWidth
};

// How many pieces there are in a row of `length` elements.
template <typename Group>
JAX_NATTEN_HOST_DEVICE int64_t pieces(int64_t length) {
  return geometry::max(geometry::ceil_div(length, Group::kWidth), 1);
}

// Calls visit(const Row&) for every piece of the rows of all tokens; neighboring groups get
// neighboring tokens, which share most of their neighbors. Groups that the last warp has too many
// repeat the last piece.
template <typename Group, typename Visit>
__device__ void for_each_row(int64_t samples, int64_t heads, int64_t tokens, int64_t length,
                             Visit&& visit) {
  const int64_t pieces_of_row = pieces<Group>(length);
  const int64_t tasks = samples * heads * pieces_of_row * tokens;
  constexpr int kGroups = kWarp / Group::kCount;
  const int64_t step = static_cast<int64_t>(gridDim.x) * (kThreads / kWarp) * kGroups;
  int64_t first = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / kWarp * kGroups;
  for (; first < tasks; first += step) {
    const int64_t task = geometry::min(first + threadIdx.x % kWarp / Group::kCount, tasks - 1);
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

// ---- neighbors

// The walk over a neighborhood in batches of kSize neighbors that follow each other along the last
// axis; the last batch of a run reaches past its end. Members are those of a batch's first one.
template <int Rank, int kSize>
struct Walk {
  int left;  // neighbors of the run from here on; none at the walk's end
  int64_t token;
  int64_t token_step;
  int64_t slot;
  int64_t bias;
  int64_t bias_step;
  int ordinal[Rank];  // of the run, on every axis but the last

  __device__ Walk(const Neighborhood<Rank>& neighborhood, bool any = true)
      : ordinal{}, neighborhood_(neighborhood) {
    token_step = neighborhood.axis[kLast].step * neighborhood.token_stride[kLast];
    bias_step = neighborhood.axis[kLast].bias_step * neighborhood.bias_stride[kLast];
    left = 0;
    if (any && !neighborhood.empty()) begin_run();
  }

  // Whether any group of the warp has neighbors left.
  __device__ bool goes_on() const { return __any_sync(kAllLanes, left > 0); }

  // Does nothing at the walk's end.
  __device__ void advance() {
    if (left == 0) return;
    left -= kSize;
    token += kSize * token_step;
    slot += kSize;
    bias += kSize * bias_step;
    if (left > 0) return;
    int a = kLast - 1;
    for (; a >= 0; --a) {
      if (++ordinal[a] < neighborhood_.axis[a].count) break;
      ordinal[a] = 0;
    }
    left = 0;
    if (a >= 0) begin_run();
  }

  __device__ bool has(int b) const { return b < left; }

  template <typename Rows>
  __device__ auto* row(const Rows& rows, int b) const {
    return rows.row(token + b * token_step);
  }

 private:
  static constexpr int kLast = Rank - 1;

  __device__ void begin_run() {
    token = slot = bias = 0;
    for (int a = 0; a < Rank; ++a) {
      const AxisNeighbors& axis = neighborhood_.axis[a];
      const int64_t m = a == kLast ? 0 : ordinal[a];
      token += (axis.first + m * axis.step) * neighborhood_.token_stride[a];
      slot += (axis.slot + m) * neighborhood_.slot_stride[a];
      bias += (axis.bias + m * axis.bias_step) * neighborhood_.bias_stride[a];
    }
    left = static_cast<int>(neighborhood_.axis[kLast].count);
  }

  const Neighborhood<Rank>& neighborhood_;
};

template <typename Element, int Rank>
using WalkOf = Walk<Rank, kBatch<Element>>;

// A piece of the row of every neighbor in a batch. Addresses advance in bytes: as indices, each one
// would be multiplied out anew.
template <typename Group, int Rank, int kSize, typename Rows>
__device__ void load_batch(Piece<typename Group::Sum> (&pieces)[kSize],
                           const Walk<Rank, kSize>& walk, const Rows& rows, int64_t length,
                           int64_t begin = 0) {
  const auto* first = rows.row(walk.token) + begin + Group::lane() * Group::kUnit;
  const auto* address = reinterpret_cast<const char*>(first);
  const int64_t step = walk.token_step * rows.stride * static_cast<int64_t>(sizeof(*first));
  for (int b = 0; b < kSize; ++b, address += step) {
    pieces[b] = Group::load_from(address, length - begin, walk.has(b));
  }
}

// Calls start(Lanes) with the group for rows of the lengths.
template <typename Element, typename Start>
cudaError_t with_lanes(int64_t length, int64_t other_length, Start&& start) {
  constexpr int kUnit = kVector<Element>;
  const int64_t longest = geometry::max(length, other_length);
  if (length % kUnit != 0 || other_length % kUnit != 0) {
    if (longest <= 8 * kPerLane) return start(Lanes<Element, 8, 1>{});
    return start(Lanes<Element, kWarp, 1>{});
  }
  if (longest <= 4 * kPerLane) return start(Lanes<Element, 4, kUnit>{});
  if (longest <= 8 * kPerLane) return start(Lanes<Element, 8, kUnit>{});
  if (longest <= 16 * kPerLane) return start(Lanes<Element, 16, kUnit>{});
  return start(Lanes<Element, kWarp, kUnit>{});
}

}  // namespace jax_natten::naive
