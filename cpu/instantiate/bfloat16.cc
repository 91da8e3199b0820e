// Compiles the operations for bfloat16.
#include "cpu/operations_impl.h"

JAX_NATTEN_INSTANTIATE(jax_natten::BFloat16);
