// Compiles the operations for float32.
#include "cpu/operations_impl.h"

template struct jax_natten::Operations<float>;
