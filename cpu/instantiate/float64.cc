// Compiles the operations for float64.
#include "cpu/operations_impl.h"

template struct jax_natten::Operations<double>;
