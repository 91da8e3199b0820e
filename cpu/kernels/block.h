// What the kernels of all operations share: the memory of a task, its heads, and the tasks of a
// call.
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

// Memory for a tile's rows transposed.
template <typename Sum>
Sum* make_transposed(Parts& parts, int64_t channels) {
  return parts.of<Sum>(panels(channels) * kPanel * kTileQueries);
}

// Calls run(head) for a task's heads; the stream brings the keys of each.
template <typename Element, typename Sum, typename Run>
void for_each_head(const Problem<kAxes>& problem, const Place& place,
                   KeyStream<Element, Sum>& stream, Run&& run) {
  const int64_t group = problem.group();
  for (int64_t head = place.heads_kv.begin * group; head < place.heads_kv.end * group; ++head) {
    if (head % group == 0) stream.next_head();
    run(head);
  }
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

// run(call, blocks, place, scratch) for all blocks, at any time: of so many bytes a key, in so many
// products.
template <typename Arrays, typename Run>
Job over_blocks(const Call<Arrays>& call, int64_t bytes, int count, Run run) {
  const Blocks blocks = choose_blocks(call.problem, call.rank, bytes);
  const Numbering numbering(call.problem, blocks, blocks.count);
  return {
      {numbering.count(), count * products(call.problem, blocks),
       [=](int64_t task, Scratch& scratch) { run(call, blocks, numbering.place(task), scratch); }}};
}

}  // namespace jax_natten::JAX_NATTEN_TARGET
