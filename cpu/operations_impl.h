// Defines Operation: reads an operation's operands and starts its kernel.
//
// Included by the files of instantiate/ only.
#pragma once

#include "cpu/buffers.h"
#include "cpu/operations.h"
#include "cpu/parallel.h"
#include "cpu/tables.h"
#include "cpu/targets.h"

namespace jax_natten {

// Operations without a kernel of their own here have one for every instruction set.
template <typename Arrays, int Rank>
Job job(const OperandsOf<Arrays, Rank>& op) {
  return job_on_target(call_of(op));
}

template <typename Element, typename Buffers>
ffi::Future Operation<Element, Buffers>::run(ffi::ThreadPool& pool, const Attributes& attributes,
                                             const Buffers& buffers) {
  return with_operands<Element>(
      attributes, buffers, [&](const auto& op) { return start(pool, job(op)); }, failed);
}

}  // namespace jax_natten

// Compiles every operation for one element type.
#define JAX_NATTEN_INSTANTIATE(Element)                                        \
  template struct jax_natten::Operation<Element, jax_natten::ForwardBuffers>;  \
  template struct jax_natten::Operation<Element, jax_natten::TangentBuffers>;  \
  template struct jax_natten::Operation<Element, jax_natten::BackwardBuffers>; \
  template struct jax_natten::Operation<Element, jax_natten::QkBuffers>;       \
  template struct jax_natten::Operation<Element, jax_natten::AvBuffers>;       \
  template struct jax_natten::Operation<Element, jax_natten::InverseBuffers>;  \
  template struct jax_natten::Operation<Element, jax_natten::SpreadBuffers>;   \
  template struct jax_natten::Operation<Element, jax_natten::CollectBuffers>
