// Binds the operations to XLA FFI: each handler names its operands, results and attributes, and
// picks the element type. No exception leaves a handler.
#include "cpu/handlers.h"

#include <exception>
#include <string>
#include <utility>

#include "cpu/number.h"
#include "cpu/operations.h"
#include "cpu/parallel.h"
#include "xla/ffi/api/ffi.h"

namespace jax_natten {
namespace {

using Sizes = ffi::Span<const int64_t>;
using In = ffi::AnyBuffer;
using Out = ffi::Result<ffi::AnyBuffer>;

template <typename Buffers>
ffi::Future dispatch(ffi::DataType type, ffi::ThreadPool pool, const Attributes& attributes,
                     const Buffers& buffers) try {
  switch (type) {
    case ffi::DataType::F64:
      return Operations<double>::run(pool, attributes, buffers);
    case ffi::DataType::F32:
      return Operations<float>::run(pool, attributes, buffers);
    case ffi::DataType::F16:
      return Operations<Float16>::run(pool, attributes, buffers);
    case ffi::DataType::BF16:
      return Operations<BFloat16>::run(pool, attributes, buffers);
    default:
      return failed(ffi::Error(XLA_FFI_Error_Code_UNIMPLEMENTED,
                               "jax_natten: no CPU kernel for this dtype, only for float64, "
                               "float32, float16 and bfloat16"));
  }
} catch (const std::exception& exception) {
  return failed(ffi::Error::Internal(std::string("jax_natten: ") + exception.what()));
}

ffi::Future forward(ffi::ThreadPool pool, In q, In k, In v, In bias, In frame, Out out, Out lse,
                    Sizes kernel_size, Sizes stride, Sizes dilation, Sizes is_causal,
                    double scale) {
  return dispatch(q.element_type(), pool, {kernel_size, stride, dilation, is_causal, scale},
                  ForwardBuffers{q, k, v, bias, frame, *out, *lse});
}

ffi::Future tangent(ffi::ThreadPool pool, In q, In k, In v, In bias, In frame, In out, In lse,
                    In dq, In dk, In dv, In dbias, Out dout, Out dlse, Sizes kernel_size,
                    Sizes stride, Sizes dilation, Sizes is_causal, double scale) {
  return dispatch(q.element_type(), pool, {kernel_size, stride, dilation, is_causal, scale},
                  TangentBuffers{q, k, v, bias, frame, out, lse, dq, dk, dv, dbias, *dout, *dlse});
}

ffi::Future backward(ffi::ThreadPool pool, In q, In k, In v, In bias, In frame, In out, In lse,
                     In ct_out, In ct_lse, Out dq, Out dk, Out dv, Out dbias, Out delta,
                     Sizes kernel_size, Sizes stride, Sizes dilation, Sizes is_causal,
                     double scale) {
  return dispatch(q.element_type(), pool, {kernel_size, stride, dilation, is_causal, scale},
                  BackwardBuffers{q, k, v, bias, frame, out, lse, ct_out, ct_lse, *dq, *dk, *dv,
                                  *dbias, *delta});
}

// The unfused operations have one result and no scale.
template <typename Buffers>
ffi::Future two_operands(ffi::ThreadPool pool, In a, In b, In frame, Out result, Sizes kernel_size,
                         Sizes stride, Sizes dilation, Sizes is_causal) {
  return dispatch(a.element_type(), pool, {kernel_size, stride, dilation, is_causal, 1.0},
                  Buffers{a, b, frame, *result});
}

template <typename Buffers>
ffi::Future one_operand(ffi::ThreadPool pool, In a, In frame, Out result, Sizes kernel_size,
                        Sizes stride, Sizes dilation, Sizes is_causal) {
  return dispatch(a.element_type(), pool, {kernel_size, stride, dilation, is_causal, 1.0},
                  Buffers{a, frame, *result});
}

constexpr auto kQk = two_operands<QkBuffers>;
constexpr auto kAv = two_operands<AvBuffers>;
constexpr auto kInverse = two_operands<InverseBuffers>;
constexpr auto kSpread = one_operand<SpreadBuffers>;
constexpr auto kCollect = one_operand<CollectBuffers>;

template <typename Binding>
auto with_window(Binding binding) {
  return std::move(binding)
      .template Attr<Sizes>("kernel_size")
      .template Attr<Sizes>("stride")
      .template Attr<Sizes>("dilation")
      .template Attr<Sizes>("is_causal");
}

// A binding of so many operands and results.
template <int kOperands, int kResults>
auto bind() {
  if constexpr (kResults > 0) {
    return bind<kOperands, kResults - 1>().template Ret<In>();
  } else if constexpr (kOperands > 0) {
    return bind<kOperands - 1, 0>().template Arg<In>();
  } else {
    return ffi::Ffi::Bind().Ctx<ffi::ThreadPool>();
  }
}

template <int kOperands, int kResults>
auto fused_binding() {
  return with_window(bind<kOperands, kResults>()).template Attr<double>("scale");
}

template <int kOperands>
auto unfused_binding() {
  return with_window(bind<kOperands, 1>());
}

}  // namespace
}  // namespace jax_natten

XLA_FFI_DEFINE_HANDLER_SYMBOL(jax_natten_forward, jax_natten::forward,
                              (jax_natten::fused_binding<5, 2>()));
XLA_FFI_DEFINE_HANDLER_SYMBOL(jax_natten_tangent, jax_natten::tangent,
                              (jax_natten::fused_binding<11, 2>()));
XLA_FFI_DEFINE_HANDLER_SYMBOL(jax_natten_backward, jax_natten::backward,
                              (jax_natten::fused_binding<9, 5>()));
XLA_FFI_DEFINE_HANDLER_SYMBOL(jax_natten_qk, jax_natten::kQk, (jax_natten::unfused_binding<3>()));
XLA_FFI_DEFINE_HANDLER_SYMBOL(jax_natten_av, jax_natten::kAv, (jax_natten::unfused_binding<3>()));
XLA_FFI_DEFINE_HANDLER_SYMBOL(jax_natten_inverse, jax_natten::kInverse,
                              (jax_natten::unfused_binding<3>()));
XLA_FFI_DEFINE_HANDLER_SYMBOL(jax_natten_spread, jax_natten::kSpread,
                              (jax_natten::unfused_binding<2>()));
XLA_FFI_DEFINE_HANDLER_SYMBOL(jax_natten_collect, jax_natten::kCollect,
                              (jax_natten::unfused_binding<2>()));
