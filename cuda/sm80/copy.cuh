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

// Zeros where `exists` is false; then nothing is read.
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

// Neighboring numbers of rows, read at once.
template <int kCount>
struct alignas(kCount % 4 == 0 ? 16 : 4 * kCount) RowNumbers {
  int32_t x[kCount];
};

// An element of a row in shared memory.
template <int kDim, typename Element>
__device__ Element* element_of(Element* rows, int row, int element) {
  using Layout = RowLayout<Element, kDim>;
  constexpr int kSize = sizeof(Element);
  return rows + Layout::offset(row, element / kUnit<Element>) / kSize + element % kUnit<Element>;
}

// Starts copying kCount rows, given by their numbers, into rows of kDim elements; what does not
// exist becomes 0.
template <int kDim, int kCount, typename Element>
__device__ void load_rows(Element* to, const Element* from, const int32_t* rows, int length) {
  constexpr int kUnits = kDim / kUnit<Element>;
  constexpr int kOwn = kCount * kUnits / kThreads;  // rows of a thread, which follow each other
  static_assert(kOwn * kThreads == kCount * kUnits);
  using Layout = RowLayout<Element, kDim>;
  const int unit = static_cast<int>(threadIdx.x) % kUnits, begin = unit * kUnit<Element>;
  const int first = static_cast<int>(threadIdx.x) / kUnits * kOwn;
  const auto numbers = *reinterpret_cast<const RowNumbers<kOwn>*>(rows + first);
  const int row_bytes = length * static_cast<int>(sizeof(Element));
  const char* column = reinterpret_cast<const char*>(from + begin);
  if (has_whole_units<Element>(length)) {
    const bool inside = begin < length;
    const uint32_t address = shared_address(to) + Layout::offset(first, unit);
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      const int32_t row = numbers.x[i];
      // swizzle(first + i) = swizzle(first) ^ swizzle(i)
      copy_async<kUnitBytes>((address ^ (Layout::swizzle(i) * kUnitBytes)) + i * Layout::kBytes,
                             column + static_cast<int64_t>(row) * row_bytes,
                             inside && row != kNoRow);
    }
    return;
  }
  // Seldom; as little code as possible, so that it does not crowd the instruction cache.
#pragma unroll 1
  for (int i = 0; i < kOwn; ++i) {
    const int32_t row = rows[first + i];
#pragma unroll 1
    for (int e = 0; e < kUnit<Element>; ++e) {
      Element value{};
      if (row != kNoRow && begin + e < length) {
        value = from[static_cast<int64_t>(row) * length + begin + e];
      }
      *element_of<kDim>(to, first + i, begin + e) = value;
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
        Element* pair =
            element_of<kDim>(staging, m * 16 + r * 8 + lane() / 4, n * 8 + lane() % 4 * 2);
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
  stage_rows<kDim>(staging, results);
  if (has_whole_units<Element>(length)) {
    constexpr int kUnits = kTiles * 8 / kUnit<Element>;
    for (int i = lane(); i < kBlocks * 16 * kUnits; i += kWarp) {
      const int32_t row = rows[i / kUnits];
      const int at = i % kUnits * kUnit<Element>;
      if (row == kNoRow || begin + at >= length) continue;
      *reinterpret_cast<uint4*>(to + static_cast<int64_t>(row) * length + begin + at) =
          *reinterpret_cast<const uint4*>(element_of<kDim>(staging, i / kUnits, at));
    }
    return;
  }
#pragma unroll 1
  for (int i = lane(); i < kBlocks * 16 * kTiles * 8; i += kWarp) {
    const int32_t row = rows[i / (kTiles * 8)];
    const int at = i % (kTiles * 8);
    if (row == kNoRow || begin + at >= length) continue;
    to[static_cast<int64_t>(row) * length + begin + at] =
        *element_of<kDim>(staging, i / (kTiles * 8), at);
  }
}

}  // namespace jax_natten::sm80
