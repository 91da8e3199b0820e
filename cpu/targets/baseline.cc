// The kernels for all processors that the build is for.
#include "cpu/kernels/common.h"

#define JAX_NATTEN_TARGET baseline
#define JAX_NATTEN_VECTOR_BYTES 16
#ifdef __aarch64__
#define JAX_NATTEN_VECTOR_REGISTERS 32
#else
#define JAX_NATTEN_VECTOR_REGISTERS 16
#endif
#include "cpu/kernels/kernels.h"
