// What the kernels of all operations share: the memory of a task, and the cost of a call.
#pragma once

#include <cstdint>

#include "cpu/blocks.h"
#include "cpu/kernels/rows.h"
#include "cpu/parallel.h"
#include "cpu/scratch.h"

namespace jax_natten::JAX_NATTEN_TARGET {

// The parts of a task's memory, as make(parts) takes them.
template <typename Make>
auto allocate(Scratch& scratch, Make&& make) {
  Parts counted(nullptr);
  make(counted);
  Parts parts(scratch.take(counted.size()));
  return make(parts);
}

// Packed, a key and its value.
template <typename Element>
int64_t bytes_per_key(const Problem<kAxes>& problem) {
  return (panels(problem.dim) + panels(problem.value_dim)) * kPanel *
         static_cast<int64_t>(sizeof(Accumulator<Element>));
}

// Operations of a call in one product of either kind, those of pairs that don't see each other
// included.
inline double products(const Problem<kAxes>& problem, const Blocks& blocks) {
  return blocks.tiling.pairs * static_cast<double>(problem.samples * problem.heads) *
         static_cast<double>(problem.dim + problem.value_dim);
}

// run(place, scratch) for all blocks, at any time.
template <typename Run>
Job over_blocks(const Problem<kAxes>& problem, const Blocks& blocks, double flops, Run run) {
  const Numbering numbering(problem, blocks, blocks.count);
  return {{numbering.count(), flops,
           [=](int64_t task, Scratch& scratch) { run(numbering.place(task), scratch); }}};
}

}  // namespace jax_natten::JAX_NATTEN_TARGET
