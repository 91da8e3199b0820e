// Rows between device and shared memory, a unit of 16 bytes a lane.
//
// A token's row of a head is numbered token * heads + head (token-major arrays) or
// head * tokens + token (heads first); row r begins at element r * length either way.
#pragma once

#include <cstdint>

#include "cuda/common/number.cuh"
#include "cuda/sm80/matrix.cuh"

namespace jax_natten::sm80 {

inline constexpr int kThreads = 128;  // of a block: four warps
inline constexpr int kNoRow = -1;

// Zeros where `exists` is false.
template <int kBytes>
__device__ void copy_async(uint32_t to, const void* from, bool exists) {
  const int bytes = exists ? kBytes : 0;
  if constexpr (kBytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %3, %2;" ::"r"(to), "l"(from), "r"(bytes),
                 "n"(kBytes)
                 : "memory");
  }
}

__device__ inline void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
__device__ inline void wait_for_copies() { asm volatile("cp.async.wait_group 0;" ::: "memory"); }

// Whether rows begin at multiples of a unit.
template <typename Element>
__device__ bool has_whole_units(int length) {
  return length % kUnit<Element> == 0;
}

// Elements of a unit, as they lie in memory.
template <typename Element>
union Unit {
  uint4 words;
  Element element[kUnit<Element>];
};

// The unit of a row that begins at element `begin`; zeros where nothing is.
template <typename Element>
__device__ Unit<Element> load_unit(const Element* rows, int32_t row, int begin, int length) {
  Unit<Element> unit{};
  if (row == kNoRow) return unit;
  const Element* first = rows + static_cast<int64_t>(row) * length + begin;
  if (has_whole_units<Element>(length)) {
    if (begin < length) unit.words = __ldg(reinterpret_cast<const uint4*>(first));
  } else {
    for (int e = 0; e < kUnit<Element> && begin + e < length; ++e) unit.element[e] = first[e];
  }
  return unit;
}

// Starts copying kCount rows, given by their numbers, into rows of kDim elements; what does not
// exist becomes 0.
template <int kDim, int kCount, typename Element>
__device__ void load_rows(Element* to, const Element* from, const int32_t* rows, int length) {
  constexpr int kUnits = kDim / kUnit<Element>;
  constexpr int kStep = kThreads / kUnits;
  static_assert(kThreads % kUnits == 0 && kCount % kStep == 0);
  const int unit = threadIdx.x % kUnits, begin = unit * kUnit<Element>;
  const int first = threadIdx.x / kUnits;
  const uint32_t address = shared_address(to + first * kPitch<Element, kDim> + begin);
  const Element* column = from + begin;
  if (has_whole_units<Element>(length)) {
    const bool inside = begin < length;
#pragma unroll
    for (int i = 0; i < kCount; i += kStep) {
      const int32_t row = rows[first + i];
      const bool exists = inside && row != kNoRow;
      copy_async<kUnitBytes>(address + i * LaneOffset<Element, kDim>::kRowBytes,
                             column + (exists ? static_cast<int64_t>(row) * length : 0), exists);
    }
  } else {
    for (int i = 0; i < kCount; i += kStep) {
      *reinterpret_cast<uint4*>(to + (first + i) * kPitch<Element, kDim> + begin) =
          load_unit(from, rows[first + i], begin, length).words;
    }
  }
}

// Puts a warp's results into rows of shared memory of which no other warp knows.
template <int kDim, typename Element, int kBlocks, int kTiles>
__device__ void stage_rows(Element* staging, const Results<kBlocks, kTiles>& results) {
  static_assert(kTiles * 8 <= kDim);
  __syncwarp();
#pragma unroll
  for (int m = 0; m < kBlocks; ++m) {
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        Element* pair = staging + (m * 16 + r * 8 + lane() / 4) * kPitch<Element, kDim> + n * 8 +
                        lane() % 4 * 2;
        const float x = results.x[m][n][2 * r];
        const float y = results.x[m][n][2 * r + 1];
        if constexpr (sizeof(Element) == 2) {
          *reinterpret_cast<uint32_t*>(pair) = pack<Element>(x, y);
        } else {
          *reinterpret_cast<float2*>(pair) = {x, y};
        }
      }
    }
  }
  __syncwarp();
}

// Writes a warp's results into rows of which they are the elements from `begin` on. `staging` has
// room for the warp's rows, whose numbers are `rows`.
template <int kDim, typename Element, int kBlocks, int kTiles>
__device__ void store_rows(Element* to, const int32_t* rows, int begin, int length,
                           Element* staging, const Results<kBlocks, kTiles>& results) {
  constexpr int kLength = kPitch<Element, kDim>;
  stage_rows<kDim>(staging, results);
  constexpr int kUnits = kTiles * 8 / kUnit<Element>;
  const bool whole = has_whole_units<Element>(length);
  for (int i = lane(); i < kBlocks * 16 * kUnits; i += kWarp) {
    const int at = begin + i % kUnits * kUnit<Element>;
    const int32_t row = rows[i / kUnits];
    if (row == kNoRow || at >= length) continue;
    Unit<Element> unit;
    unit.words = *reinterpret_cast<const uint4*>(staging + i / kUnits * kLength +
                                                 i % kUnits * kUnit<Element>);
    Element* target = to + static_cast<int64_t>(row) * length + at;
    if (whole) {
      *reinterpret_cast<uint4*>(target) = unit.words;
    } else {
      for (int e = 0; e < kUnit<Element> && at + e < length; ++e) target[e] = unit.element[e];
    }
  }
}

}  // namespace jax_natten::sm80
