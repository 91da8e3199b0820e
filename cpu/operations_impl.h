// Defines Operations: for each one its operands' axes, its tensors, and the start of its kernel.
//
// Included by the files of instantiate/ only.
#pragma once

#include <type_traits>

#include "cpu/decode.h"
#include "cpu/fused.h"
#include "cpu/number.h"
#include "cpu/operations.h"
#include "cpu/parallel.h"
#include "cpu/unfused.h"

namespace jax_natten {

template <typename T>
inline constexpr ffi::DataType kDataType = ffi::DataType::INVALID;
template <>
inline constexpr ffi::DataType kDataType<double> = ffi::DataType::F64;
template <>
inline constexpr ffi::DataType kDataType<float> = ffi::DataType::F32;
template <>
inline constexpr ffi::DataType kDataType<Float16> = ffi::DataType::F16;
template <>
inline constexpr ffi::DataType kDataType<BFloat16> = ffi::DataType::BF16;

template <typename T>
Tensor<T> tensor(const ffi::AnyBuffer& buffer, Layout layout) {
  return {static_cast<T*>(buffer.untyped_data()), layout};
}

// Calls start(rank) with the window's rank as a compile-time constant.
template <typename Start>
ffi::Future with_rank(const Decoder& decoder, Start&& start) {
  if (!decoder.failed()) {
    switch (decoder.rank()) {
      case 1:
        return start(std::integral_constant<int, 1>{});
      case 2:
        return start(std::integral_constant<int, 2>{});
      case 3:
        return start(std::integral_constant<int, 3>{});
    }
  }
  return failed(decoder.error());
}

// ---- fused

// The operands that all fused operations share.
template <typename Element, int Rank, typename Buffers>
void read_fused(Decoder& decoder, const Buffers& b, FusedOperands<Element, Rank>& op) {
  using Sum = Accumulator<Element>;
  constexpr ffi::DataType kType = kDataType<Element>;
  const bool has_bias = decoder.has_table(b.bias);
  decoder.expect("q", b.q, kType, {Axis::kBatch, Axis::kQueries, Axis::kHeads, Axis::kDim});
  decoder.expect("k", b.k, kType, {Axis::kBatch, Axis::kKeys, Axis::kHeadsKv, Axis::kDim});
  decoder.expect("v", b.v, kType, {Axis::kBatch, Axis::kKeys, Axis::kHeadsKv, Axis::kValueDim});
  decoder.expect("bias", b.bias, kDataType<Sum>, {Axis::kBatch, Axis::kHeads, Axis::kTable});
  op.problem = decoder.problem<Rank>(b.frame);
  const Problem<Rank>& p = op.problem;
  op.q = tensor<const Element>(b.q, token_major(p.heads, p.queries(), p.dim));
  op.k = tensor<const Element>(b.k, token_major(p.heads_kv, p.keys(), p.dim));
  op.v = tensor<const Element>(b.v, token_major(p.heads_kv, p.keys(), p.value_dim));
  op.bias = tensor<const Sum>(b.bias, heads_first(p.heads, p.biases(), 1));
  if (!has_bias) op.bias.data = nullptr;
}

template <typename Element>
ffi::Future Operations<Element>::run(ffi::ThreadPool& pool, const Attributes& attributes,
                                     const ForwardBuffers& b) {
  using Sum = Accumulator<Element>;
  Decoder decoder(attributes);
  return with_rank(decoder, [&](auto rank) {
    ForwardOperands<Element, rank> op;
    read_fused(decoder, b, op);
    decoder.expect("out", b.out, kDataType<Element>,
                   {Axis::kBatch, Axis::kQueries, Axis::kHeads, Axis::kValueDim});
    decoder.expect("lse", b.lse, kDataType<Sum>, {Axis::kBatch, Axis::kQueries, Axis::kHeads});
    if (decoder.failed()) return failed(decoder.error());
    const Problem<rank>& p = op.problem;
    op.out = tensor<Element>(b.out, token_major(p.heads, p.queries(), p.value_dim));
    op.lse = tensor<Sum>(b.lse, token_major(p.heads, p.queries(), 1));
    return start(pool, forward_job(op));
  });
}

template <typename Element>
ffi::Future Operations<Element>::run(ffi::ThreadPool& pool, const Attributes& attributes,
                                     const TangentBuffers& b) {
  using Sum = Accumulator<Element>;
  constexpr ffi::DataType kType = kDataType<Element>;
  Decoder decoder(attributes);
  return with_rank(decoder, [&](auto rank) {
    TangentOperands<Element, rank> op;
    read_fused(decoder, b, op);
    decoder.expect("lse", b.lse, kDataType<Sum>, {Axis::kBatch, Axis::kQueries, Axis::kHeads});
    decoder.expect("dq", b.dq, kType, {Axis::kBatch, Axis::kQueries, Axis::kHeads, Axis::kDim});
    decoder.expect("dk", b.dk, kType, {Axis::kBatch, Axis::kKeys, Axis::kHeadsKv, Axis::kDim});
    decoder.expect("dv", b.dv, kType, {Axis::kBatch, Axis::kKeys, Axis::kHeadsKv, Axis::kValueDim});
    decoder.expect("dbias", b.dbias, kDataType<Sum>, {Axis::kBatch, Axis::kHeads, Axis::kTable});
    decoder.expect("dout", b.dout, kType,
                   {Axis::kBatch, Axis::kQueries, Axis::kHeads, Axis::kValueDim});
    decoder.expect("dlse", b.dlse, kDataType<Sum>, {Axis::kBatch, Axis::kQueries, Axis::kHeads});
    if (decoder.failed()) return failed(decoder.error());
    const Problem<rank>& p = op.problem;
    op.lse = tensor<const Sum>(b.lse, token_major(p.heads, p.queries(), 1));
    op.dq = tensor<const Element>(b.dq, op.q.layout);
    op.dk = tensor<const Element>(b.dk, op.k.layout);
    op.dv = tensor<const Element>(b.dv, op.v.layout);
    op.dbias = tensor<const Sum>(b.dbias, op.bias.layout);
    if (!op.has_bias()) op.dbias.data = nullptr;
    op.dout = tensor<Element>(b.dout, token_major(p.heads, p.queries(), p.value_dim));
    op.dlse = tensor<Sum>(b.dlse, op.lse.layout);
    return start(pool, tangent_job(op));
  });
}

template <typename Element>
ffi::Future Operations<Element>::run(ffi::ThreadPool& pool, const Attributes& attributes,
                                     const BackwardBuffers& b) {
  using Sum = Accumulator<Element>;
  constexpr ffi::DataType kType = kDataType<Element>;
  Decoder decoder(attributes);
  return with_rank(decoder, [&](auto rank) {
    BackwardOperands<Element, rank> op;
    read_fused(decoder, b, op);
    const auto expect_rows = [&](const char* name, const ffi::AnyBuffer& buffer) {
      decoder.expect(name, buffer, kDataType<Sum>, {Axis::kBatch, Axis::kQueries, Axis::kHeads});
    };
    decoder.expect("out", b.out, kType,
                   {Axis::kBatch, Axis::kQueries, Axis::kHeads, Axis::kValueDim});
    decoder.expect("ct_out", b.ct_out, kType,
                   {Axis::kBatch, Axis::kQueries, Axis::kHeads, Axis::kValueDim});
    expect_rows("lse", b.lse);
    expect_rows("ct_lse", b.ct_lse);
    expect_rows("delta", b.delta);
    decoder.expect("dq", b.dq, kType, {Axis::kBatch, Axis::kQueries, Axis::kHeads, Axis::kDim});
    decoder.expect("dk", b.dk, kType, {Axis::kBatch, Axis::kKeys, Axis::kHeadsKv, Axis::kDim});
    decoder.expect("dv", b.dv, kType, {Axis::kBatch, Axis::kKeys, Axis::kHeadsKv, Axis::kValueDim});
    decoder.expect("dbias", b.dbias, kDataType<Sum>, {Axis::kBatch, Axis::kHeads, Axis::kTable});
    if (decoder.failed()) return failed(decoder.error());
    const Problem<rank>& p = op.problem;
    const Layout rows = token_major(p.heads, p.queries(), 1);
    const Layout outs = token_major(p.heads, p.queries(), p.value_dim);
    op.out = tensor<const Element>(b.out, outs);
    op.lse = tensor<const Sum>(b.lse, rows);
    op.ct_out = tensor<const Element>(b.ct_out, outs);
    op.ct_lse = tensor<const Sum>(b.ct_lse, rows);
    op.dq = tensor<Element>(b.dq, op.q.layout);
    op.dk = tensor<Element>(b.dk, op.k.layout);
    op.dv = tensor<Element>(b.dv, op.v.layout);
    op.dbias = tensor<Sum>(b.dbias, op.bias.layout);
    op.delta = tensor<Sum>(b.delta, rows);
    return start(pool, backward_job(op));
  });
}

// ---- unfused

template <typename Element>
ffi::Future Operations<Element>::run(ffi::ThreadPool& pool, const Attributes& attributes,
                                     const QkBuffers& b) {
  constexpr ffi::DataType kType = kDataType<Element>;
  Decoder decoder(attributes);
  return with_rank(decoder, [&](auto rank) {
    decoder.expect("query", b.query, kType,
                   {Axis::kBatch, Axis::kHeads, Axis::kQueries, Axis::kDim});
    decoder.expect("key", b.key, kType, {Axis::kBatch, Axis::kHeadsKv, Axis::kKeys, Axis::kDim});
    decoder.expect("attn", b.attn, kType,
                   {Axis::kBatch, Axis::kHeads, Axis::kQueries, Axis::kSlots});
    const auto p = decoder.problem<rank>(b.frame);
    if (decoder.failed()) return failed(decoder.error());
    return start(pool, qk_job(QkOperands<Element, rank>{
                           p,
                           tensor<const Element>(b.query, heads_first(p.heads, p.queries(), p.dim)),
                           tensor<const Element>(b.key, heads_first(p.heads_kv, p.keys(), p.dim)),
                           tensor<Element>(b.attn, heads_first(p.heads, p.queries(), p.slots())),
                       }));
  });
}

template <typename Element>
ffi::Future Operations<Element>::run(ffi::ThreadPool& pool, const Attributes& attributes,
                                     const AvBuffers& b) {
  constexpr ffi::DataType kType = kDataType<Element>;
  Decoder decoder(attributes);
  return with_rank(decoder, [&](auto rank) {
    decoder.expect("attn", b.attn, kType,
                   {Axis::kBatch, Axis::kHeads, Axis::kQueries, Axis::kSlots});
    decoder.expect("value", b.value, kType,
                   {Axis::kBatch, Axis::kHeadsKv, Axis::kKeys, Axis::kValueDim});
    decoder.expect("out", b.out, kType,
                   {Axis::kBatch, Axis::kHeads, Axis::kQueries, Axis::kValueDim});
    const auto p = decoder.problem<rank>(b.frame);
    if (decoder.failed()) return failed(decoder.error());
    return start(pool,
                 av_job(AvOperands<Element, rank>{
                     p,
                     tensor<const Element>(b.attn, heads_first(p.heads, p.queries(), p.slots())),
                     tensor<const Element>(b.value, heads_first(p.heads_kv, p.keys(), p.value_dim)),
                     tensor<Element>(b.out, heads_first(p.heads, p.queries(), p.value_dim)),
                 }));
  });
}

template <typename Element>
ffi::Future Operations<Element>::run(ffi::ThreadPool& pool, const Attributes& attributes,
                                     const InverseBuffers& b) {
  constexpr ffi::DataType kType = kDataType<Element>;
  Decoder decoder(attributes);
  return with_rank(decoder, [&](auto rank) {
    decoder.expect("attn", b.attn, kType,
                   {Axis::kBatch, Axis::kHeads, Axis::kQueries, Axis::kSlots});
    decoder.expect("x", b.x, kType, {Axis::kBatch, Axis::kHeads, Axis::kQueries, Axis::kValueDim});
    decoder.expect("out", b.out, kType,
                   {Axis::kBatch, Axis::kHeadsKv, Axis::kKeys, Axis::kValueDim});
    const auto p = decoder.problem<rank>(b.frame);
    if (decoder.failed()) return failed(decoder.error());
    return start(pool,
                 inverse_job(InverseOperands<Element, rank>{
                     p,
                     tensor<const Element>(b.attn, heads_first(p.heads, p.queries(), p.slots())),
                     tensor<const Element>(b.x, heads_first(p.heads, p.queries(), p.value_dim)),
                     tensor<Element>(b.out, heads_first(p.heads_kv, p.keys(), p.value_dim)),
                 }));
  });
}

template <typename Element>
ffi::Future Operations<Element>::run(ffi::ThreadPool& pool, const Attributes& attributes,
                                     const SpreadBuffers& b) {
  constexpr ffi::DataType kType = kDataType<Element>;
  Decoder decoder(attributes);
  return with_rank(decoder, [&](auto rank) {
    decoder.expect("table", b.table, kType, {Axis::kBatch, Axis::kHeads, Axis::kTable});
    decoder.expect("attn", b.attn, kType,
                   {Axis::kBatch, Axis::kHeads, Axis::kQueries, Axis::kSlots});
    const auto p = decoder.problem<rank>(b.frame);
    if (decoder.failed()) return failed(decoder.error());
    return start(pool, spread_job(SpreadOperands<Element, rank>{
                           p,
                           tensor<const Element>(b.table, heads_first(p.heads, p.biases(), 1)),
                           tensor<Element>(b.attn, heads_first(p.heads, p.queries(), p.slots())),
                       }));
  });
}

template <typename Element>
ffi::Future Operations<Element>::run(ffi::ThreadPool& pool, const Attributes& attributes,
                                     const CollectBuffers& b) {
  constexpr ffi::DataType kType = kDataType<Element>;
  Decoder decoder(attributes);
  return with_rank(decoder, [&](auto rank) {
    decoder.expect("attn", b.attn, kType,
                   {Axis::kBatch, Axis::kHeads, Axis::kQueries, Axis::kSlots});
    decoder.expect("table", b.table, kType, {Axis::kBatch, Axis::kHeads, Axis::kTable});
    const auto p = decoder.problem<rank>(b.frame);
    if (decoder.failed()) return failed(decoder.error());
    return start(pool,
                 collect_job(CollectOperands<Element, rank>{
                     p,
                     tensor<const Element>(b.attn, heads_first(p.heads, p.queries(), p.slots())),
                     tensor<Element>(b.table, heads_first(p.heads, p.biases(), 1)),
                 }));
  });
}

}  // namespace jax_natten
