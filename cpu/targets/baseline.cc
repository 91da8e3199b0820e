// The kernels for what every processor has.
#include "cpu/kernels/common.h"

#define JAX_NATTEN_TARGET baseline
#define JAX_NATTEN_VECTOR_BYTES 16
#define JAX_NATTEN_VECTOR_REGISTERS 16
#include "cpu/kernels/kernels.h"
