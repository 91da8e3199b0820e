// The buffers of each operation, and how its operands are read out of them: the axes of every
// buffer and the layout of every tensor, the same on CPU and GPU.
#pragma once

#include <type_traits>

#include "cpu/decode.h"
#include "cpu/number.h"
#include "cpu/operands.h"
#include "xla/ffi/api/ffi.h"

namespace jax_natten {

struct ForwardBuffers {
  template <typename Element, int Rank>
  using Operands = ForwardOperands<Element, Rank>;

  ffi::AnyBuffer q, k, v, bias, frame;
  ffi::AnyBuffer out, lse;
};

struct TangentBuffers {
  template <typename Element, int Rank>
  using Operands = TangentOperands<Element, Rank>;

  ffi::AnyBuffer q, k, v, bias, frame, out, lse, dq, dk, dv, dbias;
  ffi::AnyBuffer dout, dlse;
};

struct BackwardBuffers {
  template <typename Element, int Rank>
  using Operands = BackwardOperands<Element, Rank>;

  ffi::AnyBuffer q, k, v, bias, frame, out, lse, ct_out, ct_lse;
  ffi::AnyBuffer dq, dk, dv, dbias, delta, dbias_parts, dk_sums, dv_sums;
};

struct QkBuffers {
  template <typename Element, int Rank>
  using Operands = QkOperands<Element, Rank>;

  ffi::AnyBuffer query, key, frame;
  ffi::AnyBuffer attn;
};

struct AvBuffers {
  template <typename Element, int Rank>
  using Operands = AvOperands<Element, Rank>;

  ffi::AnyBuffer attn, value, frame;
  ffi::AnyBuffer out;
};

struct InverseBuffers {
  template <typename Element, int Rank>
  using Operands = InverseOperands<Element, Rank>;

  ffi::AnyBuffer attn, x, frame;
  ffi::AnyBuffer out, sums;
};

struct SpreadBuffers {
  template <typename Element, int Rank>
  using Operands = SpreadOperands<Element, Rank>;

  ffi::AnyBuffer table, frame;
  ffi::AnyBuffer attn;
};

struct CollectBuffers {
  template <typename Element, int Rank>
  using Operands = CollectOperands<Element, Rank>;

  ffi::AnyBuffer attn, frame;
  ffi::AnyBuffer table;
};

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

// ---- fused

// The operands that all fused operations share.
template <typename Element, int Rank, typename Buffers, typename Operands>
void read_fused(Decoder& decoder, const Buffers& b, Operands& op) {
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

template <typename Element, int Rank>
void read(Decoder& decoder, const ForwardBuffers& b, ForwardOperands<Element, Rank>& op) {
  using Sum = Accumulator<Element>;
  read_fused<Element, Rank>(decoder, b, op);
  decoder.expect("out", b.out, kDataType<Element>,
                 {Axis::kBatch, Axis::kQueries, Axis::kHeads, Axis::kValueDim});
  decoder.expect("lse", b.lse, kDataType<Sum>, {Axis::kBatch, Axis::kQueries, Axis::kHeads});
  const Problem<Rank>& p = op.problem;
  op.out = tensor<Element>(b.out, token_major(p.heads, p.queries(), p.value_dim));
  op.lse = tensor<Sum>(b.lse, token_major(p.heads, p.queries(), 1));
}

template <typename Element, int Rank>
void read(Decoder& decoder, const TangentBuffers& b, TangentOperands<Element, Rank>& op) {
  using Sum = Accumulator<Element>;
  constexpr ffi::DataType kType = kDataType<Element>;
  read_fused<Element, Rank>(decoder, b, op);
  decoder.expect("lse", b.lse, kDataType<Sum>, {Axis::kBatch, Axis::kQueries, Axis::kHeads});
  decoder.expect("dq", b.dq, kType, {Axis::kBatch, Axis::kQueries, Axis::kHeads, Axis::kDim});
  decoder.expect("dk", b.dk, kType, {Axis::kBatch, Axis::kKeys, Axis::kHeadsKv, Axis::kDim});
  decoder.expect("dv", b.dv, kType, {Axis::kBatch, Axis::kKeys, Axis::kHeadsKv, Axis::kValueDim});
  decoder.expect("dbias", b.dbias, kDataType<Sum>, {Axis::kBatch, Axis::kHeads, Axis::kTable});
  decoder.expect("dout", b.dout, kType,
                 {Axis::kBatch, Axis::kQueries, Axis::kHeads, Axis::kValueDim});
  decoder.expect("dlse", b.dlse, kDataType<Sum>, {Axis::kBatch, Axis::kQueries, Axis::kHeads});
  const Problem<Rank>& p = op.problem;
  op.lse = tensor<const Sum>(b.lse, token_major(p.heads, p.queries(), 1));
  op.dq = tensor<const Element>(b.dq, op.q.layout);
  op.dk = tensor<const Element>(b.dk, op.k.layout);
  op.dv = tensor<const Element>(b.dv, op.v.layout);
  op.dbias = tensor<const Sum>(b.dbias, op.bias.layout);
  if (!op.has_bias()) op.dbias.data = nullptr;
  op.dout = tensor<Element>(b.dout, token_major(p.heads, p.queries(), p.value_dim));
  op.dlse = tensor<Sum>(b.dlse, op.lse.layout);
}

template <typename Element, int Rank>
void read(Decoder& decoder, const BackwardBuffers& b, BackwardOperands<Element, Rank>& op) {
  using Sum = Accumulator<Element>;
  constexpr ffi::DataType kType = kDataType<Element>;
  read_fused<Element, Rank>(decoder, b, op);
  const auto expect_rows = [&](const char* name, const ffi::AnyBuffer& buffer) {
    decoder.expect(name, buffer, kDataType<Sum>, {Axis::kBatch, Axis::kQueries, Axis::kHeads});
  };
  decoder.expect("out", b.out, kType,
                 {Axis::kBatch, Axis::kQueries, Axis::kHeads, Axis::kValueDim});
  decoder.expect("ct_out", b.ct_out, kType,
                 {Axis::kBatch, Axis::kQueries, Axis::kHeads, Axis::kValueDim});
  expect_rows("lse", b.lse);
  expect_rows("ct_lse", b.ct_lse);
  decoder.expect("delta", b.delta, kDataType<Sum>,
                 {Axis::kBatch, Axis::kDeltas, Axis::kQueries, Axis::kHeads});
  decoder.expect("dq", b.dq, kType, {Axis::kBatch, Axis::kQueries, Axis::kHeads, Axis::kDim});
  decoder.expect("dk", b.dk, kType, {Axis::kBatch, Axis::kKeys, Axis::kHeadsKv, Axis::kDim});
  decoder.expect("dv", b.dv, kType, {Axis::kBatch, Axis::kKeys, Axis::kHeadsKv, Axis::kValueDim});
  decoder.expect("dbias", b.dbias, kDataType<Sum>, {Axis::kBatch, Axis::kHeads, Axis::kTable});
  decoder.expect("dbias_parts", b.dbias_parts, kDataType<Sum>,
                 {Axis::kBatch, Axis::kHeads, Axis::kParts, Axis::kTable});
  decoder.expect("dk_sums", b.dk_sums, kDataType<Sum>,
                 {Axis::kBatch, Axis::kSums, Axis::kKeys, Axis::kHeadsKv, Axis::kDim});
  decoder.expect("dv_sums", b.dv_sums, kDataType<Sum>,
                 {Axis::kBatch, Axis::kSums, Axis::kKeys, Axis::kHeadsKv, Axis::kValueDim});
  const Problem<Rank>& p = op.problem;
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
  op.dk_sums = tensor<Sum>(b.dk_sums, op.k.layout);
  op.dv_sums = tensor<Sum>(b.dv_sums, op.v.layout);
  op.parts = decoder.parts();
  op.dbias_parts = tensor<Sum>(b.dbias_parts, heads_first(p.heads, op.parts, p.biases()));
}

// ---- unfused

template <typename Element, int Rank>
void read(Decoder& decoder, const QkBuffers& b, QkOperands<Element, Rank>& op) {
  constexpr ffi::DataType kType = kDataType<Element>;
  decoder.expect("query", b.query, kType, {Axis::kBatch, Axis::kHeads, Axis::kQueries, Axis::kDim});
  decoder.expect("key", b.key, kType, {Axis::kBatch, Axis::kHeadsKv, Axis::kKeys, Axis::kDim});
  decoder.expect("attn", b.attn, kType, {Axis::kBatch, Axis::kHeads, Axis::kQueries, Axis::kSlots});
  op.problem = decoder.problem<Rank>(b.frame);
  const Problem<Rank>& p = op.problem;
  op.query = tensor<const Element>(b.query, heads_first(p.heads, p.queries(), p.dim));
  op.key = tensor<const Element>(b.key, heads_first(p.heads_kv, p.keys(), p.dim));
  op.attn = tensor<Element>(b.attn, heads_first(p.heads, p.queries(), p.slots()));
}

template <typename Element, int Rank>
void read(Decoder& decoder, const AvBuffers& b, AvOperands<Element, Rank>& op) {
  constexpr ffi::DataType kType = kDataType<Element>;
  decoder.expect("attn", b.attn, kType, {Axis::kBatch, Axis::kHeads, Axis::kQueries, Axis::kSlots});
  decoder.expect("value", b.value, kType,
                 {Axis::kBatch, Axis::kHeadsKv, Axis::kKeys, Axis::kValueDim});
  decoder.expect("out", b.out, kType,
                 {Axis::kBatch, Axis::kHeads, Axis::kQueries, Axis::kValueDim});
  op.problem = decoder.problem<Rank>(b.frame);
  const Problem<Rank>& p = op.problem;
  op.attn = tensor<const Element>(b.attn, heads_first(p.heads, p.queries(), p.slots()));
  op.value = tensor<const Element>(b.value, heads_first(p.heads_kv, p.keys(), p.value_dim));
  op.out = tensor<Element>(b.out, heads_first(p.heads, p.queries(), p.value_dim));
}

template <typename Element, int Rank>
void read(Decoder& decoder, const InverseBuffers& b, InverseOperands<Element, Rank>& op) {
  constexpr ffi::DataType kType = kDataType<Element>;
  decoder.expect("attn", b.attn, kType, {Axis::kBatch, Axis::kHeads, Axis::kQueries, Axis::kSlots});
  decoder.expect("x", b.x, kType, {Axis::kBatch, Axis::kHeads, Axis::kQueries, Axis::kValueDim});
  decoder.expect("out", b.out, kType, {Axis::kBatch, Axis::kHeadsKv, Axis::kKeys, Axis::kValueDim});
  decoder.expect("sums", b.sums, kDataType<Accumulator<Element>>,
                 {Axis::kBatch, Axis::kSums, Axis::kHeadsKv, Axis::kKeys, Axis::kValueDim});
  op.problem = decoder.problem<Rank>(b.frame);
  const Problem<Rank>& p = op.problem;
  op.attn = tensor<const Element>(b.attn, heads_first(p.heads, p.queries(), p.slots()));
  op.x = tensor<const Element>(b.x, heads_first(p.heads, p.queries(), p.value_dim));
  op.out = tensor<Element>(b.out, heads_first(p.heads_kv, p.keys(), p.value_dim));
  op.sums = tensor<Accumulator<Element>>(b.sums, op.out.layout);
}

template <typename Element, int Rank>
void read(Decoder& decoder, const SpreadBuffers& b, SpreadOperands<Element, Rank>& op) {
  constexpr ffi::DataType kType = kDataType<Element>;
  decoder.expect("table", b.table, kType, {Axis::kBatch, Axis::kHeads, Axis::kTable});
  decoder.expect("attn", b.attn, kType, {Axis::kBatch, Axis::kHeads, Axis::kQueries, Axis::kSlots});
  op.problem = decoder.problem<Rank>(b.frame);
  const Problem<Rank>& p = op.problem;
  op.table = tensor<const Element>(b.table, heads_first(p.heads, p.biases(), 1));
  op.attn = tensor<Element>(b.attn, heads_first(p.heads, p.queries(), p.slots()));
}

template <typename Element, int Rank>
void read(Decoder& decoder, const CollectBuffers& b, CollectOperands<Element, Rank>& op) {
  constexpr ffi::DataType kType = kDataType<Element>;
  decoder.expect("attn", b.attn, kType, {Axis::kBatch, Axis::kHeads, Axis::kQueries, Axis::kSlots});
  decoder.expect("table", b.table, kType, {Axis::kBatch, Axis::kHeads, Axis::kTable});
  op.problem = decoder.problem<Rank>(b.frame);
  const Problem<Rank>& p = op.problem;
  op.attn = tensor<const Element>(b.attn, heads_first(p.heads, p.queries(), p.slots()));
  op.table = tensor<Element>(b.table, heads_first(p.heads, p.biases(), 1));
}

// ---- any operation

// run(operands) of a call, or fail(error) where it is malformed; both of one result type.
template <typename Element, int Rank, typename Buffers, typename Run, typename Fail>
auto with_operands_of_rank(Decoder& decoder, const Buffers& buffers, Run&& run, Fail&& fail) {
  typename Buffers::template Operands<Element, Rank> operands{};
  read(decoder, buffers, operands);
  return decoder.failed() ? fail(decoder.error()) : run(operands);
}

// The same, with the window's rank as a compile-time constant.
template <typename Element, typename Buffers, typename Run, typename Fail>
auto with_operands(const Attributes& attributes, const Buffers& buffers, Run&& run, Fail&& fail) {
  Decoder decoder(attributes);
  if (!decoder.failed()) {
    switch (decoder.rank()) {
      case 1:
        return with_operands_of_rank<Element, 1>(decoder, buffers, run, fail);
      case 2:
        return with_operands_of_rank<Element, 2>(decoder, buffers, run, fail);
      case 3:
        return with_operands_of_rank<Element, 3>(decoder, buffers, run, fail);
    }
  }
  return fail(decoder.error());
}

}  // namespace jax_natten
