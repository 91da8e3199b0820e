// The kernels for processors with AVX-512.
#include "cpu/kernels/common.h"

#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,prefer-vector-width=512")

#define JAX_NATTEN_TARGET avx512
#define JAX_NATTEN_VECTOR_BYTES 64
#define JAX_NATTEN_VECTOR_REGISTERS 32
#include "cpu/kernels/kernels.h"
