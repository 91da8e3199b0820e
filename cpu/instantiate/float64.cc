// Compiles the operations for float64.
#include "cpu/operations_impl.h"

JAX_NATTEN_INSTANTIATE(double);
