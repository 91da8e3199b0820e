// What the kernels of each operation are given: the problem and its arrays as plain data, the same
// on CPU and GPU.
#pragma once

#include "cpu/number.h"
#include "cpu/problem.h"

namespace jax_natten {

// ---- fused

template <typename Element, int Rank>
struct FusedOperands {
  Problem<Rank> problem;
  Tensor<const Element> q;
  Tensor<const Element> k;
  Tensor<const Element> v;
  Tensor<const Accumulator<Element>> bias;  // a head is one table; data is null for no bias

  JAX_NATTEN_HOST_DEVICE bool has_bias() const { return bias.data != nullptr; }
};

template <typename Element, int Rank>
struct ForwardOperands : FusedOperands<Element, Rank> {
  Tensor<Element> out;
  Tensor<Accumulator<Element>> lse;
};

template <typename Element, int Rank>
struct TangentOperands : FusedOperands<Element, Rank> {
  Tensor<const Accumulator<Element>> lse;
  Tensor<const Element> dq;
  Tensor<const Element> dk;
  Tensor<const Element> dv;
  Tensor<const Accumulator<Element>> dbias;
  Tensor<Element> dout;
  Tensor<Accumulator<Element>> dlse;
};

template <typename Element, int Rank>
struct BackwardOperands : FusedOperands<Element, Rank> {
  Tensor<const Element> out;
  Tensor<const Accumulator<Element>> lse;
  Tensor<const Element> ct_out;
  Tensor<const Accumulator<Element>> ct_lse;
  Tensor<Element> dq;
  Tensor<Element> dk;
  Tensor<Element> dv;
  Tensor<Accumulator<Element>> dbias;
  Tensor<Accumulator<Element>> delta;
};

// ---- unfused

template <typename Element, int Rank>
struct QkOperands {
  Problem<Rank> problem;
  Tensor<const Element> query;
  Tensor<const Element> key;
  Tensor<Element> attn;
};

template <typename Element, int Rank>
struct AvOperands {
  Problem<Rank> problem;
  Tensor<const Element> attn;
  Tensor<const Element> value;
  Tensor<Element> out;
};

template <typename Element, int Rank>
struct InverseOperands {
  Problem<Rank> problem;
  Tensor<const Element> attn;
  Tensor<const Element> x;
  Tensor<Element> out;
};

// A head of the table is one head's.
template <typename Element, int Rank>
struct SpreadOperands {
  Problem<Rank> problem;
  Tensor<const Element> table;
  Tensor<Element> attn;
};

template <typename Element, int Rank>
struct CollectOperands {
  Problem<Rank> problem;
  Tensor<const Element> attn;
  Tensor<Element> table;
};

}  // namespace jax_natten
