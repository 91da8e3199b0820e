// Compiles the operations for float32.
#include "cpu/operations_impl.h"

JAX_NATTEN_INSTANTIATE(float);
