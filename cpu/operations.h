// The operations as the FFI handlers call them, one set for each element type.
//
// This header only declares them, so that handlers.cc does not compile a kernel; operations_impl.h
// defines them and every file of instantiate/ compiles one element type.
#pragma once

#include "cpu/decode.h"
#include "xla/ffi/api/ffi.h"

namespace jax_natten {

struct ForwardBuffers {
  ffi::AnyBuffer q, k, v, bias, frame;
  ffi::AnyBuffer out, lse;
};

struct TangentBuffers {
  ffi::AnyBuffer q, k, v, bias, frame, out, lse, dq, dk, dv, dbias;
  ffi::AnyBuffer dout, dlse;
};

struct BackwardBuffers {
  ffi::AnyBuffer q, k, v, bias, frame, out, lse, ct_out, ct_lse;
  ffi::AnyBuffer dq, dk, dv, dbias, delta;
};

struct QkBuffers {
  ffi::AnyBuffer query, key, frame;
  ffi::AnyBuffer attn;
};

struct AvBuffers {
  ffi::AnyBuffer attn, value, frame;
  ffi::AnyBuffer out;
};

struct InverseBuffers {
  ffi::AnyBuffer attn, x, frame;
  ffi::AnyBuffer out;
};

struct SpreadBuffers {
  ffi::AnyBuffer table, frame;
  ffi::AnyBuffer attn;
};

struct CollectBuffers {
  ffi::AnyBuffer attn, frame;
  ffi::AnyBuffer table;
};

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
