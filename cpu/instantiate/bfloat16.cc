// Compiles the operations for bfloat16.
#include "cpu/operations_impl.h"

template struct jax_natten::Operations<jax_natten::BFloat16>;
