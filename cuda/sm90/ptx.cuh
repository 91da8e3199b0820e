// Hopper's instructions that have no name in C++, one each.
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "cpu/number.h"

namespace jax_natten::sm90 {

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// ---- barriers that count arrivals, and bytes that the copy engine brings

struct Barrier {
  uint64_t word;

  __device__ __forceinline__ void init(int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(this)),
                 "r"(arrivals)
                 : "memory");
  }
  __device__ __forceinline__ void arrive() {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(this)) : "memory");
  }
  // So many bytes in this phase.
  __device__ __forceinline__ void expect(uint32_t bytes) {
    asm volatile(
        "mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;" ::"r"(shared_address(this)),
        "r"(bytes)
        : "memory");
  }
  // Until the phase of the given parity is over.
  __device__ __forceinline__ void wait(uint32_t parity) {
    const uint32_t address = shared_address(this);
    uint32_t is_over = 0;
    while (!is_over) {
      asm volatile(
          "{.reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; "
          "selp.u32 %0, 1, 0, p;}"
          : "=r"(is_over)
          : "r"(address), "r"(parity)
          : "memory");
    }
  }
};

__device__ __forceinline__ void publish_barriers() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// Of the threads of a warpgroup, by a number of its own.
__device__ __forceinline__ void synchronize_warpgroup(int number) {
  asm volatile("bar.sync %0, 128;" ::"r"(number) : "memory");
}

// ---- the copy engine: boxes of five axes, the fastest first

struct Corner {
  int at[5];
};

__device__ __forceinline__ void load_box(uint32_t to, const CUtensorMap* map, Barrier* barrier,
                                         const Corner& c) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4, %5, %6, %7}], [%2];" ::"r"(to),
      "l"(map), "r"(shared_address(barrier)), "r"(c.at[0]), "r"(c.at[1]), "r"(c.at[2]),
      "r"(c.at[3]), "r"(c.at[4])
      : "memory");
}
// The corner must not be negative. What overhangs the upper end is left out.
__device__ __forceinline__ void store_box(const CUtensorMap* map, uint32_t from, const Corner& c) {
  asm volatile(
      "cp.async.bulk.tensor.5d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4, %5, %6}], "
      "[%1];" ::"l"(map),
      "r"(from), "r"(c.at[0]), "r"(c.at[1]), "r"(c.at[2]), "r"(c.at[3]), "r"(c.at[4])
      : "memory");
}
__device__ __forceinline__ void prefetch(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}
__device__ __forceinline__ void commit_stores() {
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}
// Until the thread's stores have read shared memory.
__device__ __forceinline__ void wait_for_store_reads() {
  asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
}
// Begins to copy a number to shared memory, or a zero where there is none.
__device__ __forceinline__ void load_number(uint32_t to, const float* from, bool exists) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to), "l"(from),
               "r"(exists ? 4 : 0)
               : "memory");
}
// Arrives at a barrier once the numbers are there that the thread has begun to copy.
__device__ __forceinline__ void arrive_with_numbers(Barrier* barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(shared_address(barrier))
               : "memory");
}
// Makes the thread's writes to shared memory visible to the copy engine and the matrix units.
__device__ __forceinline__ void publish_writes() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// ---- the matrix units, which work while the warpgroup goes on

__device__ __forceinline__ void begin_products() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void commit_products() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
// Until at most so many groups of products are under way.
template <int kGroups>
__device__ __forceinline__ void wait_for_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kGroups) : "memory");
}
// Keeps the compiler from moving or copying registers that products read and write.
template <int kCount>
__device__ __forceinline__ void pin(float (&x)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(x[i])::"memory");
}
template <int kCount>
__device__ __forceinline__ void pin(uint32_t (&x)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+r"(x[i])::"memory");
}

// ---- registers, exponentials, pairs of halves

template <int kRegisters>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
__device__ __forceinline__ float exp2_of(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}
__device__ __forceinline__ float log2_of(float x) {
  float result;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}
__device__ __forceinline__ float reciprocal_of(float x) {
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}
// x & y & z in one instruction, which no later one is joined with.
__device__ __forceinline__ uint32_t conjunction(uint32_t x, uint32_t y, uint32_t z) {
  uint32_t result;
  asm volatile("lop3.b32 %0, %1, %2, %3, 0x80;" : "=r"(result) : "r"(x), "r"(y), "r"(z));
  return result;
}
template <typename Element>
__device__ __forceinline__ uint32_t pair(float low, float high);
template <>
__device__ __forceinline__ uint32_t pair<BFloat16>(float low, float high) {
  uint32_t result;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));
  return result;
}
template <>
__device__ __forceinline__ uint32_t pair<Float16>(float low, float high) {
  uint32_t result;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));
  return result;
}
// Four 8x8 blocks of halves; each lane gives the address of one row of one of them.
__device__ __forceinline__ void store_blocks(uint32_t address, uint32_t a, uint32_t b, uint32_t c,
                                             uint32_t d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address),
               "r"(a), "r"(b), "r"(c), "r"(d)
               : "memory");
}
// The number of an index from an address on.
template <int kIndex>
__device__ __forceinline__ float load_shared(uint32_t address) {
  float result;
  asm volatile("ld.shared.f32 %0, [%1 + %2];" : "=f"(result) : "r"(address), "n"(4 * kIndex));
  return result;
}
__device__ __forceinline__ void store_zeros(uint32_t address) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %1, %1, %1};" ::"r"(address), "r"(0) : "memory");
}

}  // namespace jax_natten::sm90
