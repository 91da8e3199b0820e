// The kernels for processors with AVX2, FMA and F16C.
#include "cpu/kernels/common.h"

#pragma GCC target("avx2,fma,f16c")

#define JAX_NATTEN_TARGET avx2
#define JAX_NATTEN_VECTOR_BYTES 32
#define JAX_NATTEN_VECTOR_REGISTERS 16
#include "cpu/kernels/kernels.h"
