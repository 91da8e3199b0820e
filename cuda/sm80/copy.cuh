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
__device__ Element* element_of(Element* rows, unsigned row, unsigned element) {
  using Layout = RowLayout<Element, kDim>;
  return rows + Layout::offset(row, element / kUnit<Element>) / sizeof(Element) +
         element % kUnit<Element>;
}

// Starts copying kCount rows, given by their numbers, into rows of kDim elements; what does not
// exist becomes 0.
template <int kDim, int kCount, typename Element>
__device__ void load_rows(Element* to, const Element* from, const int32_t* rows, int length) {
  constexpr int kUnits = kDim / kUnit<Element>;
  constexpr int kOwn = kCount * kUnits / kThreads;  // rows of a thread, which follow each other
  static_assert(kOwn * kThreads == kCount * kUnits);
  using Layout = RowLayout<Element, kDim>;
  const int unit = static_cast<int>(threadIdx.x % kUnits), begin = unit * kUnit<Element>;
  const int first = static_cast<int>(threadIdx.x / kUnits) * kOwn;
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

// Two neighboring elements, into shared memory.
template <typename Element>
__device__ void store_pair(uint32_t to, float x, float y) {
  if constexpr (sizeof(Element) == 2) {
    asm volatile("st.shared.b32 [%0], %1;" ::"r"(to), "r"(pack<Element>(x, y)) : "memory");
  } else {
    asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(to), "f"(x), "f"(y) : "memory");
  }
}

// Puts a warp's results into rows of shared memory of which no other warp knows.
template <int kDim, typename Element, int kBlocks, int kTiles>
__device__ void stage_rows(Element* staging, const Results<kBlocks, kTiles>& results) {
  static_assert(kTiles * 8 <= kDim);
  using Layout = RowLayout<Element, kDim>;
  constexpr int kUnitsOfTile = 8 / kUnit<Element>;
  const int pair = lane() % 4 * 2;  // the lane's elements of a tile
  const uint32_t own = shared_address(element_of<kDim>(staging, lane() / 4, pair));
  __syncwarp();
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
    const uint32_t address = Layout::further(own, n * kUnitsOfTile);
#pragma unroll
    for (int i = 0; i < kBlocks * 2; ++i) {
      store_pair<Element>(address + i * 8 * Layout::kBytes, results.x[i / 2][n][i % 2 * 2],
                          results.x[i / 2][n][i % 2 * 2 + 1]);
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
    for (unsigned i = lane(); i < kBlocks * 16 * kUnits; i += kWarp) {
      const int32_t row = rows[i / kUnits];
      const int at = static_cast<int>(i % kUnits) * kUnit<Element>;
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
