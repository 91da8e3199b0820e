// The XLA FFI handlers of a platform, all that its Python module needs.
#pragma once

#include <vector>

#include "xla/ffi/api/c_api.h"

namespace jax_natten {

struct Handler {
  const char* target;  // the name that it is registered under
  XLA_FFI_Handler* function;
};

// Each platform's library defines its own.
std::vector<Handler> handlers();

}  // namespace jax_natten
