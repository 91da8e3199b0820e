// What the kernels of each operation are given, the same on CPU and GPU: the arrays as plain data,
// and with them the problem.
#pragma once

#include "cpu/number.h"
#include "cpu/problem.h"

namespace jax_natten {

// ---- fused

template <typename Element>
struct FusedArrays {
  Tensor<const Element> q;
  Tensor<const Element> k;
  Tensor<const Element> v;
  Tensor<const Accumulator<Element>> bias;  // a head is one table; data is null for no bias

  JAX_NATTEN_HOST_DEVICE bool has_bias() const { return bias.data != nullptr; }
};

template <typename Element>
struct ForwardArrays : FusedArrays<Element> {
  Tensor<Element> out;
  Tensor<Accumulator<Element>> lse;
};

template <typename Element>
struct TangentArrays : FusedArrays<Element> {
  Tensor<const Accumulator<Element>> lse;
  Tensor<const Element> dq;
  Tensor<const Element> dk;
  Tensor<const Element> dv;
  Tensor<const Accumulator<Element>> dbias;
  Tensor<Element> dout;
  Tensor<Accumulator<Element>> dlse;
};

template <typename Element>
struct BackwardArrays : FusedArrays<Element> {
  Tensor<const Element> out;
  Tensor<const Accumulator<Element>> lse;
  Tensor<const Element> ct_out;
  Tensor<const Accumulator<Element>> ct_lse;
  Tensor<Element> dq;
  Tensor<Element> dk;
  Tensor<Element> dv;
  Tensor<Accumulator<Element>> dbias;
  // Kernels that need delta again, or sums of dk and dv that Element cannot hold, keep them here.
  Tensor<Accumulator<Element>> delta;
  Tensor<Accumulator<Element>> dk_sums;
  Tensor<Accumulator<Element>> dv_sums;
  // Kernels that sum a table in parts, so many, put them here: a head is the parts of one table.
  Tensor<Accumulator<Element>> dbias_parts;
  int64_t parts;
};

// ---- unfused

template <typename Element>
struct QkArrays {
  Tensor<const Element> query;
  Tensor<const Element> key;
  Tensor<Element> attn;
};

template <typename Element>
struct AvArrays {
  Tensor<const Element> attn;
  Tensor<const Element> value;
  Tensor<Element> out;
};

template <typename Element>
struct InverseArrays {
  Tensor<const Element> attn;
  Tensor<const Element> x;
  Tensor<Element> out;
  Tensor<Accumulator<Element>> sums;  // of out, where a kernel keeps some that Element cannot hold
};

// A head of the table is one head's.
template <typename Element>
struct SpreadArrays {
  Tensor<const Element> table;
  Tensor<Element> attn;
};

template <typename Element>
struct CollectArrays {
  Tensor<const Element> attn;
  Tensor<Element> table;
};

// ---- with the problem

template <typename Arrays, int Rank>
struct OperandsOf : Arrays {
  Problem<Rank> problem;
};

template <typename Element, int Rank>
struct ForwardOperands : OperandsOf<ForwardArrays<Element>, Rank> {};
template <typename Element, int Rank>
struct TangentOperands : OperandsOf<TangentArrays<Element>, Rank> {};
template <typename Element, int Rank>
struct BackwardOperands : OperandsOf<BackwardArrays<Element>, Rank> {};
template <typename Element, int Rank>
struct QkOperands : OperandsOf<QkArrays<Element>, Rank> {};
template <typename Element, int Rank>
struct AvOperands : OperandsOf<AvArrays<Element>, Rank> {};
template <typename Element, int Rank>
struct InverseOperands : OperandsOf<InverseArrays<Element>, Rank> {};
template <typename Element, int Rank>
struct SpreadOperands : OperandsOf<SpreadArrays<Element>, Rank> {};
template <typename Element, int Rank>
struct CollectOperands : OperandsOf<CollectArrays<Element>, Rank> {};

}  // namespace jax_natten
