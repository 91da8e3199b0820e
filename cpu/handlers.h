// The XLA FFI handlers of the CPU, the only symbols that the Python module needs.
#pragma once

#include "xla/ffi/api/ffi.h"

XLA_FFI_DECLARE_HANDLER_SYMBOL(jax_natten_forward);
XLA_FFI_DECLARE_HANDLER_SYMBOL(jax_natten_tangent);
XLA_FFI_DECLARE_HANDLER_SYMBOL(jax_natten_backward);
XLA_FFI_DECLARE_HANDLER_SYMBOL(jax_natten_qk);
XLA_FFI_DECLARE_HANDLER_SYMBOL(jax_natten_av);
XLA_FFI_DECLARE_HANDLER_SYMBOL(jax_natten_inverse);
XLA_FFI_DECLARE_HANDLER_SYMBOL(jax_natten_spread);
XLA_FFI_DECLARE_HANDLER_SYMBOL(jax_natten_collect);
