// Compiles the operations for float16.
#include "cpu/operations_impl.h"

template struct jax_natten::Operations<jax_natten::Float16>;
