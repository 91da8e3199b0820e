// The operations as the FFI handlers call them.
//
// This header only declares them, so that handlers.cc does not compile a kernel; operations_impl.h
// defines them and every file of instantiate/ compiles one element type.
#pragma once

#include "cpu/decode.h"
#include "xla/ffi/api/ffi.h"

namespace jax_natten {

// One operation, given by its buffers, on one element type.
template <typename Element, typename Buffers>
struct Operation {
  static ffi::Future run(ffi::ThreadPool& pool, const Attributes& attributes,
                         const Buffers& buffers);
};

}  // namespace jax_natten
