// How the operations bind to XLA FFI: each handler's operands, results and attributes, and the
// choice of the element type; the same on CPU and GPU.
//
// A Backend says what runs:
//   kName                                        for messages
//   Context, Result                              what its handlers decode besides, and return
//   bind(), kTraits                              XLA's binding of the context, and the traits
//   run<Element>(context, attributes, buffers)   one operation
//   failed(error)                                the result of a call that failed
// No exception leaves a handler.
#pragma once

#include <exception>
#include <string>
#include <utility>
#include <vector>

#include "cpu/buffers.h"
#include "cpu/decode.h"
#include "cpu/handlers.h"
#include "cpu/number.h"
#include "xla/ffi/api/ffi.h"

namespace jax_natten {

template <typename Backend>
struct Handlers {
  using Context = typename Backend::Context;
  using Result = typename Backend::Result;
  using Sizes = ffi::Span<const int64_t>;
  using In = ffi::AnyBuffer;
  using Out = ffi::Result<ffi::AnyBuffer>;

  template <typename Buffers>
  static Result dispatch(ffi::DataType type, Context context, const Attributes& attributes,
                         const Buffers& buffers) try {
    switch (type) {
      case ffi::DataType::F64:
        return Backend::template run<double>(context, attributes, buffers);
      case ffi::DataType::F32:
        return Backend::template run<float>(context, attributes, buffers);
      case ffi::DataType::F16:
        return Backend::template run<Float16>(context, attributes, buffers);
      case ffi::DataType::BF16:
        return Backend::template run<BFloat16>(context, attributes, buffers);
      default:
        return Backend::failed(ffi::Error(
            XLA_FFI_Error_Code_UNIMPLEMENTED,
            std::string("jax_natten: no ") + Backend::kName +
                " kernel for this dtype, only for float64, float32, float16 and bfloat16"));
    }
  } catch (const std::exception& exception) {
    return Backend::failed(ffi::Error::Internal(std::string("jax_natten: ") + exception.what()));
  }

  static Result forward(Context context, In q, In k, In v, In bias, In frame, Out out, Out lse,
                        Sizes kernel_size, Sizes stride, Sizes dilation, Sizes is_causal, bool tf32,
                        double scale) {
    return dispatch(q.element_type(), context,
                    {kernel_size, stride, dilation, is_causal, tf32, scale},
                    ForwardBuffers{q, k, v, bias, frame, *out, *lse});
  }

  static Result tangent(Context context, In q, In k, In v, In bias, In frame, In out, In lse, In dq,
                        In dk, In dv, In dbias, Out dout, Out dlse, Sizes kernel_size, Sizes stride,
                        Sizes dilation, Sizes is_causal, bool tf32, double scale) {
    return dispatch(
        q.element_type(), context, {kernel_size, stride, dilation, is_causal, tf32, scale},
        TangentBuffers{q, k, v, bias, frame, out, lse, dq, dk, dv, dbias, *dout, *dlse});
  }

  static Result backward(Context context, In q, In k, In v, In bias, In frame, In out, In lse,
                         In ct_out, In ct_lse, Out dq, Out dk, Out dv, Out dbias, Out delta,
                         Out dbias_parts, Out dk_sums, Out dv_sums, Sizes kernel_size, Sizes stride,
                         Sizes dilation, Sizes is_causal, bool tf32, double scale) {
    return dispatch(q.element_type(), context,
                    {kernel_size, stride, dilation, is_causal, tf32, scale},
                    BackwardBuffers{q, k, v, bias, frame, out, lse, ct_out, ct_lse, *dq, *dk, *dv,
                                    *dbias, *delta, *dbias_parts, *dk_sums, *dv_sums});
  }

  // The unfused operations have no scale.
  template <typename Buffers>
  static Result two_operands(Context context, In a, In b, In frame, Out result, Sizes kernel_size,
                             Sizes stride, Sizes dilation, Sizes is_causal, bool tf32) {
    return dispatch(a.element_type(), context,
                    {kernel_size, stride, dilation, is_causal, tf32, 1.0},
                    Buffers{a, b, frame, *result});
  }

  static Result inverse(Context context, In attn, In x, In frame, Out out, Out sums,
                        Sizes kernel_size, Sizes stride, Sizes dilation, Sizes is_causal,
                        bool tf32) {
    return dispatch(attn.element_type(), context,
                    {kernel_size, stride, dilation, is_causal, tf32, 1.0},
                    InverseBuffers{attn, x, frame, *out, *sums});
  }

  template <typename Buffers>
  static Result one_operand(Context context, In a, In frame, Out result, Sizes kernel_size,
                            Sizes stride, Sizes dilation, Sizes is_causal, bool tf32) {
    return dispatch(a.element_type(), context,
                    {kernel_size, stride, dilation, is_causal, tf32, 1.0},
                    Buffers{a, frame, *result});
  }
};

// `binding` with so many operands and results, and the attributes.
template <int kOperands, int kResults, bool kHasScale, typename Binding>
auto bind(Binding&& binding) {
  using Sizes = ffi::Span<const int64_t>;
  if constexpr (kOperands > 0) {
    return bind<kOperands - 1, kResults, kHasScale>(
        std::forward<Binding>(binding).template Arg<ffi::AnyBuffer>());
  } else if constexpr (kResults > 0) {
    return bind<0, kResults - 1, kHasScale>(
        std::forward<Binding>(binding).template Ret<ffi::AnyBuffer>());
  } else if constexpr (kHasScale) {
    return bind<0, 0, false>(std::forward<Binding>(binding)).template Attr<double>("scale");
  } else {
    return std::forward<Binding>(binding)
        .template Attr<Sizes>("kernel_size")
        .template Attr<Sizes>("stride")
        .template Attr<Sizes>("dilation")
        .template Attr<Sizes>("is_causal")
        .template Attr<bool>("tf32");
  }
}

// One handler of XLA's C interface. A call with kHasScale has that attribute beside the others.
template <typename Backend, auto kImplementation, int kOperands, int kResults, bool kHasScale>
XLA_FFI_Error* call(XLA_FFI_CallFrame* frame) {
  static auto* handler = bind<kOperands, kResults, kHasScale>(Backend::bind())
                             .To(kImplementation, Backend::kTraits)
                             .release();
  return handler->Call(frame);
}

template <typename Backend>
std::vector<Handler> handlers_of() {
  using H = Handlers<Backend>;
  return {
      {"jax_natten_forward", call<Backend, H::forward, 5, 2, true>},
      {"jax_natten_tangent", call<Backend, H::tangent, 11, 2, true>},
      {"jax_natten_backward", call<Backend, H::backward, 9, 8, true>},
      {"jax_natten_qk", call<Backend, H::template two_operands<QkBuffers>, 3, 1, false>},
      {"jax_natten_av", call<Backend, H::template two_operands<AvBuffers>, 3, 1, false>},
      {"jax_natten_inverse", call<Backend, H::inverse, 3, 2, false>},
      {"jax_natten_spread", call<Backend, H::template one_operand<SpreadBuffers>, 2, 1, false>},
      {"jax_natten_collect", call<Backend, H::template one_operand<CollectBuffers>, 2, 1, false>},
  };
}

}  // namespace jax_natten
