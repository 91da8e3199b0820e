// A few lanes of a warp that work on a few rows of an array together, and on a batch of the rows'
// neighbors.
//
// The lanes hold a piece of a row, kWidth elements, in registers: each lane kUnits units of kUnit
// neighboring elements, a unit of every lane before the next unit of any. Rows shorter than that
// are padded with zeros in registers. Longer ones are produced piece by piece, each piece by other
// lanes, which all compute the rows' weights anew; products over them take what lies beyond the
// first piece from memory.
//
// Every lane has an order of its own of the group's rows and of a batch's neighbors: its i-th row
// is row i ^ lane % kRows, and so for neighbors. Thereby sums over lanes need no selection. The
// first pairs in a lane's order are its own: it alone, or with few others, finishes their sums.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cpu/geometry.h"
#include "cuda/common/number.cuh"
#include "cuda/common/warp.cuh"

namespace jax_natten::naive {

inline constexpr int kPerLane = 8;  // elements of a row that a lane holds

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
  __device__ Sum dot(const Piece& piece, Sum total = 0) const {
    for (int e = 0; e < kPerLane; ++e) total += value[e] * piece.value[e];
    return total;
  }
};

// kCount lanes that own kRows rows and take kBatch neighbors at once. Rows' lengths are multiples
// of kUnit.
template <typename Element, int kLanes, int kUnitSize, int kOwnedRows = 1, int kTaken = 1>
struct Lanes {
  using Sum = Accumulator<Element>;
  static constexpr int kCount = kLanes;
  static constexpr int kUnit = kUnitSize;
  static constexpr int kUnits = kPerLane / kUnit;
  static constexpr int64_t kWidth = kLanes * kPerLane;
  // Only the largest group meets rows that are longer than its piece.
  static constexpr bool kHasLongRows = kLanes == kWarp;
  static constexpr int kRows = kOwnedRows;
  static constexpr int kBatch = kTaken;
  static constexpr int kOrders = kLanes / kRows < kBatch ? kLanes / kRows : kBatch;
  static constexpr int kOwners = kRows * kOrders;        // lanes with different pairs of their own
  static constexpr int kOwn = kRows * kBatch / kOwners;  // pairs that a lane owns
  static_assert(kLanes % kRows == 0);

  using Loaded = Unit<Element, kUnit>[kUnits];

  static __device__ int lane() { return static_cast<int>(threadIdx.x) % kLanes; }

  // ---- memory

  // This lane's first unit in the piece of a row that begins at `begin`, and how many elements of
  // the piece there are from there on.
  static __device__ const Unit<Element, kUnit>* first_unit(const Element* row, int64_t begin) {
    return reinterpret_cast<const Unit<Element, kUnit>*>(row + begin) + lane();
  }
  static __device__ int left(int64_t length, int64_t begin) {
    return static_cast<int>(geometry::min(length - begin, kWidth)) - lane() * kUnit;
  }

  // Loads this lane's units; what lies beyond the row's end, and everything where there is no row,
  // is left as it was.
  static __device__ void load_into(Loaded& loaded, const Unit<Element, kUnit>* first, int left,
                                   bool exists) {
    for (int u = 0; u < kUnits; ++u) {
      if (exists && u * kLanes * kUnit < left) loaded[u] = first[u * kLanes];
    }
  }

  static __device__ Piece<Sum> widen(const Loaded& loaded) {
    Piece<Sum> piece;
    for (int e = 0; e < kPerLane; ++e) piece.value[e] = loaded[e / kUnit].get(e % kUnit);
    return piece;
  }

  // The piece of a row that begins at `begin`; zeros where there is no row.
  static __device__ Piece<Sum> load(const Element* row, int64_t length, int64_t begin = 0,
                                    bool exists = true) {
    Loaded loaded{};
    load_into(loaded, first_unit(row, begin), left(length, begin), exists);
    return widen(loaded);
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

  // ---- sums over lanes

  static __device__ Sum sum(Sum x) {
    for (int offset = kLanes / 2; offset > 0; offset /= 2) {
      x += __shfl_xor_sync(kAllLanes, x, offset);
    }
    return x;
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

  // What the lane has that differs from this one in the bits of `difference`.
  template <typename T>
  static __device__ T from(T x, int difference) {
    return difference == 0 ? x : __shfl_xor_sync(kAllLanes, x, difference);
  }

  // ---- pairs

  // Which row is this lane's i-th, and which neighbor its b-th.
  static __device__ int row(int i) { return i ^ lane() % kRows; }
  static __device__ int neighbor(int b) { return b ^ lane() / kRows % kOrders; }

  // A number for each pair, in this lane's order.
  struct Pairs {
    Sum value[kOwn][kOwners];

    __device__ Sum& at(int i, int b) { return value[b / kOrders][b % kOrders * kRows + i]; }
  };

  // A number for each pair of the lane's own: of its first row and its neighbors `own(o)`.
  struct Own {
    Sum value[kOwn];

    // That of any pair, from its owner.
    __device__ Sum at(int i, int b) const {
      return from(value[b / kOrders], b % kOrders * kRows + i);
    }
  };
  static constexpr __device__ int own(int o) { return o * kOrders; }

  // Of sums over all lanes, each in the order of its lane, the first. Half of those that are left
  // go to the lanes that still want them, again and again.
  template <int kCount>
  static __device__ Sum first_sum(Sum (&x)[kCount]) {
    for (int offset = kCount / 2; offset > 0; offset /= 2) {
      for (int j = 0; j < offset; ++j) {
        x[j] += __shfl_xor_sync(kAllLanes, x[j + offset], offset);
      }
    }
    for (int offset = kCount; offset < kLanes; offset *= 2) {
      x[0] += __shfl_xor_sync(kAllLanes, x[0], offset);
    }
    return x[0];
  }

  static __device__ Own sum(Pairs shares) {
    Own own;
    for (int o = 0; o < kOwn; ++o) own.value[o] = first_sum(shares.value[o]);
    return own;
  }

  // Combines what the owners of a row's pairs have.
  template <typename Combine>
  static __device__ Sum over_row(Sum x, Combine&& combine) {
    for (int offset = kRows; offset < kOwners; offset *= 2) {
      x = combine(x, __shfl_xor_sync(kAllLanes, x, offset));
    }
    return x;
  }

  // Of the lane's i-th row, what the lanes have of their first.
  template <typename T>
  static __device__ T of_row(T x, int i) {
    return from(x, i);
  }
};

// How the groups of a kernel work: the rows that one owns, the neighbors that it takes at once, and
// how many blocks a processor shall have, which bounds the registers. The best were found by trial.
struct Shape {
  int rows;
  int batch;
  int blocks;
};

// Calls start(Lanes) with the group for rows of the lengths. In float64, which takes twice the
// registers, it owns half as many.
template <typename Element, const Shape& kShape, typename Start>
cudaError_t with_lanes(int64_t length, int64_t other_length, Start&& start) {
  constexpr int kUnit = kVector<Element>;
  constexpr int kBatch = kShape.batch;
  constexpr int kRows = sizeof(Element) == 8 && kShape.rows > 1 ? kShape.rows / 2 : kShape.rows;
  const int64_t longest = geometry::max(length, other_length);
  if (length % kUnit != 0 || other_length % kUnit != 0) {
    if (longest <= 8 * kPerLane) return start(Lanes<Element, 8, 1, kRows, kBatch>{});
    return start(Lanes<Element, kWarp, 1, kRows, kBatch>{});
  }
  if (longest <= 4 * kPerLane) return start(Lanes<Element, 4, kUnit, kRows, kBatch>{});
  if (longest <= 8 * kPerLane) return start(Lanes<Element, 8, kUnit, kRows, kBatch>{});
  if (longest <= 16 * kPerLane) return start(Lanes<Element, 16, kUnit, kRows, kBatch>{});
  return start(Lanes<Element, kWarp, kUnit, kRows, kBatch>{});
}

}  // namespace jax_natten::naive
