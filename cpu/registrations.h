// What every Python module of kernels has: its FFI handlers as capsules, and the FFI version that
// they were built with.
#pragma once

#include <nanobind/nanobind.h>

#include "cpu/handlers.h"
#include "xla/ffi/api/c_api.h"

namespace jax_natten {

inline void define_registrations(nanobind::module_& module) {
  module.def("registrations", [] {
    nanobind::dict result;
    for (const Handler& handler : handlers()) {
      result[handler.target] = nanobind::capsule(reinterpret_cast<void*>(handler.function));
    }
    return result;
  });
  module.def("ffi_api_version",
             [] { return nanobind::make_tuple(XLA_FFI_API_MAJOR, XLA_FFI_API_MINOR); });
}

}  // namespace jax_natten
