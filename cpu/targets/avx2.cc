// The kernels for avx2.
#include "cpu/kernels/common.h"

#pragma GCC target("avx2,fma,bmi2,f16c")

#define JAX_NATTEN_TARGET avx2
#define JAX_NATTEN_VECTOR_BYTES 32
#define JAX_NATTEN_VECTOR_REGISTERS 16
#include "cpu/kernels/kernels.h"
