// The matrix units as warps use them since Ampere: operands from shared memory into registers, and
// products of 16 rows.
//
// A product has kDepth terms, which are 32 bytes of a row for every element type. Half types go in
// as they are; float32 goes in as TF32, which has 11 significant bits: an accurate product splits
// each operand in two parts and leaves out only the product of the small parts,
//   (a + a')(b + b') = a b + a b' + a' b + O(2^-22).
//
// Lane l has, of 16 x 8 results, row l/4 and l/4 + 8 (the index / 2 of c) at columns 2 (l%4) and
// the next (index % 2).
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "cpu/number.h"
#include "cuda/common/number.cuh"
#include "cuda/common/warp.cuh"

namespace jax_natten::sm80 {

inline constexpr int kUnitBytes = 16;  // what a lane copies at once, and half of a product's depth

template <typename Element>
inline constexpr int kUnit = kUnitBytes / sizeof(Element);

__device__ inline uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Unsigned while divided, which takes an instruction less for every use.
__device__ inline int lane() { return static_cast<int>(threadIdx.x % kWarp); }

// Four matrices of 8 rows of 16 bytes; lane l gives the address of row l%8 of matrix l/8.
__device__ inline void load_matrices(uint32_t (&x)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(address)
               : "memory");
}

__device__ inline void load_matrices_transposed(uint32_t (&x)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(address)
               : "memory");
}

// Rows in shared memory, which begin at multiples of 128 bytes. The units of a row are permuted, so
// that the units of one number in eight neighboring rows lie in different banks: unit u lies where
// unit u ^ s would be, s the row's number, of which two short rows share one.
template <typename Element, int kDim>
struct RowLayout {
  static constexpr int kBytes = kDim * static_cast<int>(sizeof(Element));
  static constexpr int kUnits = kBytes / kUnitBytes;
  static constexpr int kCycle = kUnits < 8 ? kUnits : 8;
  static_assert(kCycle == 8 || kCycle == 4);

  static constexpr __device__ unsigned swizzle(unsigned row) { return row / (8 / kCycle) % kCycle; }

  // In bytes from the first row.
  static constexpr __device__ unsigned offset(unsigned row, unsigned unit) {
    return row * kBytes + (unit ^ swizzle(row)) * kUnitBytes;
  }

  // The address of the unit so many further in the same row, where no bit of that number is set in
  // the number of the unit at hand.
  static constexpr __device__ uint32_t further(uint32_t address, unsigned units) {
    return (address ^ (units % 8 * kUnitBytes)) + units / 8 * 8 * kUnitBytes;
  }

  // A lane's addresses for load_matrices, from the first of 16 rows.
  // Left operand: matrices by row, then by depth.
  static __device__ unsigned left() { return offset(lane() % 16, lane() / 16); }
  // Right operand whose rows are the result's columns: matrices by depth, then by column.
  // They are computed where they are used: the compiler would else compute them before the loop
  // over tiles and put them into local memory, whose reads wait for copies on their way.
  static __device__ unsigned right() {
    unsigned here = lane();
    asm volatile("" : "+r"(here));
    return offset(here % 8 + here / 16 * 8, here / 8 % 2);
  }
  // Right operand whose rows are the depth.
  static __device__ unsigned right_transposed() {
    if constexpr (sizeof(Element) == 2) {
      return offset(lane() % 16, lane() / 16);
    } else {
      return offset(2 * (lane() % 4), lane() / 16) + lane() / 4 % 4 * 4;
    }
  }
};

// ---- half types

template <typename Element>
__device__ uint32_t pack(float low, float high) {
  uint32_t result;
  if constexpr (std::is_same_v<Element, BFloat16>) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));
  }
  return result;
}

template <typename Element>
struct Matrix {
  static constexpr int kDepth = 16;

  struct Left {
    uint32_t x[4];
  };
  struct Right {
    uint32_t x[2];
  };

  __device__ explicit Matrix(bool /*tf32*/) {}

  __device__ void load(Left& a, uint32_t address) const { load_matrices(a.x, address); }

  // Two neighboring operands of 8 columns.
  __device__ void load(Right (&b)[2], uint32_t address) const {
    uint32_t x[4];
    load_matrices(x, address);
    b[0] = {x[0], x[1]};
    b[1] = {x[2], x[3]};
  }

  template <int kRowBytes>
  __device__ void load_transposed(Right (&b)[2], uint32_t address) const {
    uint32_t x[4];
    load_matrices_transposed(x, address);
    b[0] = {x[0], x[1]};
    b[1] = {x[2], x[3]};
  }

  // Results as the left operand of the k-th product over their columns.
  template <int kTiles>
  __device__ void from_results(Left& a, const float (&c)[kTiles][4], int k) const {
    for (int i = 0; i < 4; ++i) {
      const float (&tile)[4] = c[2 * k + i / 2];
      a.x[i] = pack<Element>(tile[i % 2 * 2], tile[i % 2 * 2 + 1]);
    }
  }

  __device__ void multiply_add(float (&c)[4], const Left& a, const Right& b) const {
    if constexpr (std::is_same_v<Element, BFloat16>) {
      asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
          "{%8, %9}, {%0, %1, %2, %3};"
          : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
          : "r"(a.x[0]), "r"(a.x[1]), "r"(a.x[2]), "r"(a.x[3]), "r"(b.x[0]), "r"(b.x[1]));
    } else {
      asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
          "{%8, %9}, {%0, %1, %2, %3};"
          : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
          : "r"(a.x[0]), "r"(a.x[1]), "r"(a.x[2]), "r"(a.x[3]), "r"(b.x[0]), "r"(b.x[1]));
    }
  }
};

// ---- float32

template <>
struct Matrix<float> {
  static constexpr int kDepth = 8;

  // x = large + small; small is 0 where TF32 is enough.
  template <int kSize>
  struct Split {
    uint32_t large[kSize];
    uint32_t small[kSize];
  };
  using Left = Split<4>;
  using Right = Split<2>;

  bool tf32;

  __device__ explicit Matrix(bool tf32) : tf32(tf32) {}

  __device__ void load(Left& a, uint32_t address) const {
    uint32_t x[4];
    load_matrices(x, address);
    for (int i = 0; i < 4; ++i) split(a, i, __uint_as_float(x[i]));
  }

  __device__ void load(Right (&b)[2], uint32_t address) const {
    uint32_t x[4];
    load_matrices(x, address);
    for (int i = 0; i < 4; ++i) split(b[i / 2], i % 2, __uint_as_float(x[i]));
  }

  // Matrices of 4-byte elements cannot be transposed on the way. The terms of a product are
  // numbered as from_results numbers them: the lane's two are neighbors.
  template <int kRowBytes>
  __device__ void load_transposed(Right (&b)[2], uint32_t address) const {
    for (int i = 0; i < 4; ++i) {
      float x;
      asm volatile(
          "ld.shared.f32 %0, [%1];"
          : "=f"(x)
          : "r"((address ^ (i % 2 * kUnitBytes + i / 2 * 2 * kUnitBytes)) + i % 2 * kRowBytes)
          : "memory");
      split(b[i / 2], i % 2, x);
    }
  }

  template <int kTiles>
  __device__ void from_results(Left& a, const float (&c)[kTiles][4], int k) const {
    for (int i = 0; i < 4; ++i) split(a, i, c[k][i % 2 * 2 + i / 2]);
  }

  // The matrix units cut off what they add to c. Accurate products are summed apart, and added to
  // c with rounding.
  __device__ void multiply_add(float (&c)[4], const Left& a, const Right& b) const {
    if (tf32) {
      multiply_add(c, a.large, b.large);
      return;
    }
    float product[4] = {};
    multiply_add(product, a.small, b.large);
    multiply_add(product, a.large, b.small);
    multiply_add(product, a.large, b.large);
    for (int i = 0; i < 4; ++i) c[i] += product[i];
  }

 private:
  static __device__ void multiply_add(float (&c)[4], const uint32_t (&a)[4],
                                      const uint32_t (&b)[2]) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }

  template <int kSize>
  static __device__ void split(Split<kSize>& result, int i, float x) {
    uint32_t large;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(large) : "f"(x));
    result.large[i] = large;
    result.small[i] = __float_as_uint(x - __uint_as_float(large));
  }
};

// ---- products of tiles; a warp has kBlocks blocks of 16 rows

template <int kBlocks, int kTiles>
struct Results {
  float x[kBlocks][kTiles][4];

  __device__ void clear() {
    for (auto& block : x) {
      for (auto& tile : block) {
        for (float& value : tile) value = 0;
      }
    }
  }
  __device__ void scale_rows(const float (&factor)[kBlocks][2]) {
    for (int m = 0; m < kBlocks; ++m) {
      for (auto& tile : x[m]) {
        for (int i = 0; i < 4; ++i) tile[i] *= factor[m][i / 2];
      }
    }
  }
  __device__ void scale(float factor) {
    for (auto& block : x) {
      for (auto& tile : block) {
        for (float& value : tile) value *= factor;
      }
    }
  }
};

// c += a b^T, the rows of both in shared memory: addresses are the lane's, of the first rows.
template <typename Element, int kDim, int kBlocks, int kTiles>
__device__ void multiply_rows(Results<kBlocks, kTiles>& c, const Matrix<Element>& matrix,
                              uint32_t left, uint32_t right) {
  using Layout = RowLayout<Element, kDim>;
#pragma unroll
  for (int k = 0; k < kDim / Matrix<Element>::kDepth; ++k) {
    typename Matrix<Element>::Left a[kBlocks];
#pragma unroll
    for (int m = 0; m < kBlocks; ++m) {
      matrix.load(a[m], Layout::further(left, 2 * k) + m * 16 * Layout::kBytes);
    }
#pragma unroll
    for (int n = 0; n < kTiles / 2; ++n) {
      typename Matrix<Element>::Right b[2];
      matrix.load(b, Layout::further(right, 2 * k) + n * 16 * Layout::kBytes);
#pragma unroll
      for (int m = 0; m < kBlocks; ++m) {
        matrix.multiply_add(c.x[m][2 * n], a[m], b[0]);
        matrix.multiply_add(c.x[m][2 * n + 1], a[m], b[1]);
      }
    }
  }
}

// c += a b for one product's depth of the rows of b, which begin at the address.
template <typename Element, int kDim, int kBlocks, int kTiles>
__device__ void multiply_depth(Results<kBlocks, kTiles>& c, const Matrix<Element>& matrix,
                               const typename Matrix<Element>::Left (&a)[kBlocks], uint32_t right) {
  using Layout = RowLayout<Element, kDim>;
#pragma unroll
  for (int n = 0; n < kTiles / 2; ++n) {
    typename Matrix<Element>::Right b[2];
    matrix.template load_transposed<Layout::kBytes>(
        b, Layout::further(right, n * 16 / kUnit<Element>));
#pragma unroll
    for (int m = 0; m < kBlocks; ++m) {
      matrix.multiply_add(c.x[m][2 * n], a[m], b[0]);
      matrix.multiply_add(c.x[m][2 * n + 1], a[m], b[1]);
    }
  }
}

// c += w b: w in registers, the rows of b in shared memory.
template <typename Element, int kDim, int kBlocks, int kTiles, int kTerms>
__device__ void multiply_weights(Results<kBlocks, kTiles>& c, const Matrix<Element>& matrix,
                                 const Results<kBlocks, kTerms>& w, uint32_t right) {
  constexpr int kDepth = Matrix<Element>::kDepth;
#pragma unroll
  for (int k = 0; k < kTerms * 8 / kDepth; ++k) {
    typename Matrix<Element>::Left a[kBlocks];
#pragma unroll
    for (int m = 0; m < kBlocks; ++m) matrix.from_results(a[m], w.x[m], k);
    multiply_depth<Element, kDim>(c, matrix, a,
                                  right + k * kDepth * RowLayout<Element, kDim>::kBytes);
  }
}

}  // namespace jax_natten::sm80
