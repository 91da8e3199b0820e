// Defines Operations: reads an operation's operands and starts its kernel.
//
// Included by the files of instantiate/ only.
#pragma once

#include "cpu/buffers.h"
#include "cpu/fused.h"
#include "cpu/operations.h"
#include "cpu/parallel.h"
#include "cpu/unfused.h"

namespace jax_natten {

template <typename Element>
ffi::Future Operations<Element>::run(ffi::ThreadPool& pool, const Attributes& attributes,
                                     const ForwardBuffers& b) {
  return with_operands<Element>(
      attributes, b, [&](const auto& op) { return start(pool, forward_job(op)); }, failed);
}

template <typename Element>
ffi::Future Operations<Element>::run(ffi::ThreadPool& pool, const Attributes& attributes,
                                     const TangentBuffers& b) {
  return with_operands<Element>(
      attributes, b, [&](const auto& op) { return start(pool, tangent_job(op)); }, failed);
}

template <typename Element>
ffi::Future Operations<Element>::run(ffi::ThreadPool& pool, const Attributes& attributes,
                                     const BackwardBuffers& b) {
  return with_operands<Element>(
      attributes, b, [&](const auto& op) { return start(pool, backward_job(op)); }, failed);
}

template <typename Element>
ffi::Future Operations<Element>::run(ffi::ThreadPool& pool, const Attributes& attributes,
                                     const QkBuffers& b) {
  return with_operands<Element>(
      attributes, b, [&](const auto& op) { return start(pool, qk_job(op)); }, failed);
}

template <typename Element>
ffi::Future Operations<Element>::run(ffi::ThreadPool& pool, const Attributes& attributes,
                                     const AvBuffers& b) {
  return with_operands<Element>(
      attributes, b, [&](const auto& op) { return start(pool, av_job(op)); }, failed);
}

template <typename Element>
ffi::Future Operations<Element>::run(ffi::ThreadPool& pool, const Attributes& attributes,
                                     const InverseBuffers& b) {
  return with_operands<Element>(
      attributes, b, [&](const auto& op) { return start(pool, inverse_job(op)); }, failed);
}

template <typename Element>
ffi::Future Operations<Element>::run(ffi::ThreadPool& pool, const Attributes& attributes,
                                     const SpreadBuffers& b) {
  return with_operands<Element>(
      attributes, b, [&](const auto& op) { return start(pool, spread_job(op)); }, failed);
}

template <typename Element>
ffi::Future Operations<Element>::run(ffi::ThreadPool& pool, const Attributes& attributes,
                                     const CollectBuffers& b) {
  return with_operands<Element>(
      attributes, b, [&](const auto& op) { return start(pool, collect_job(op)); }, failed);
}

}  // namespace jax_natten
