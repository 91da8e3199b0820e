// Element types on the GPU: widening to the type of sums and rounding to nearest even, by the
// processor's own instructions.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "cpu/number.h"

namespace jax_natten::device {

__device__ inline double widen(double value) { return value; }
__device__ inline float widen(float value) { return value; }
__device__ inline float widen(Float16 value) { return __half2float(__ushort_as_half(value.bits)); }
__device__ inline float widen(BFloat16 value) {
  return __uint_as_float(static_cast<uint32_t>(value.bits) << 16);
}

// The second argument only names the type.
__device__ inline double narrow(double value, double) { return value; }
__device__ inline float narrow(float value, float) { return value; }
__device__ inline Float16 narrow(float value, Float16) {
  return {__half_as_ushort(__float2half_rn(value))};
}
__device__ inline BFloat16 narrow(float value, BFloat16) {
  return {__bfloat16_as_ushort(__float2bfloat16_rn(value))};
}

}  // namespace jax_natten::device
