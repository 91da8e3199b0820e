// The operations as the FFI handlers call them, one set for each element type.
//
// This header only declares them, so that handlers.cc does not compile a kernel; operations_impl.h
// defines them and every file of instantiate/ compiles one element type.
#pragma once

#include "cpu/buffers.h"
#include "cpu/decode.h"
#include "xla/ffi/api/ffi.h"

namespace jax_natten {

template <typename Element>
struct Operations {
  static ffi::Future run(ffi::ThreadPool&, const Attributes&, const ForwardBuffers&);
  static ffi::Future run(ffi::ThreadPool&, const Attributes&, const TangentBuffers&);
  static ffi::Future run(ffi::ThreadPool&, const Attributes&, const BackwardBuffers&);
  static ffi::Future run(ffi::ThreadPool&, const Attributes&, const QkBuffers&);
  static ffi::Future run(ffi::ThreadPool&, const Attributes&, const AvBuffers&);
  static ffi::Future run(ffi::ThreadPool&, const Attributes&, const InverseBuffers&);
  static ffi::Future run(ffi::ThreadPool&, const Attributes&, const SpreadBuffers&);
  static ffi::Future run(ffi::ThreadPool&, const Attributes&, const CollectBuffers&);
};

}  // namespace jax_natten
