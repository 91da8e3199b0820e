// Compiles the operations for float16.
#include "cpu/operations_impl.h"

JAX_NATTEN_INSTANTIATE(jax_natten::Float16);
