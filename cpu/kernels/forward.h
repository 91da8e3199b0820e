// Forward: lse = log sum exp(s), out = sum exp(s - lse) v, with s = scale q.k + bias, per query
// over the keys that it sees. A query without a key, or all of whose logits are -infinity, has out
// 0 and lse -infinity.
#pragma once

#include <cstdint>

#include "cpu/kernels/block.h"
#include "cpu/kernels/logits.h"
#include "cpu/kernels/products.h"
#include "cpu/kernels/rows.h"

namespace jax_natten::JAX_NATTEN_TARGET {

// Makes weights of logits: 2 to the power of what they lie below their maximum. Gives each query's
// lse, and the factor that normalises its weights.
template <typename Sum>
__attribute__((noinline)) void softmax(Sum* logits, Sum* lse, Sum* factors, const Sum* maxima,
                                       const Shape& shape) {
  const Vector<Sum> nothing = splat<Sum>(-kInfinity<Sum>);
  for (int first = 0; first < kTileQueries; first += kWidth<Sum>) {
    const Vector<Sum> most = load(maxima + first);
    const Vector<Sum> shift = select(most == nothing, Vector<Sum>{}, most);
    Vector<Sum> total{};
    for_each_entry<Sum>(shape, first, [&](int64_t entry) JAX_NATTEN_LAMBDA {
      const Vector<Sum> weight = exp2<Sum>(load(logits + entry) - shift);
      total += weight;
      store(logits + entry, weight);
    });
    const Vector<Sum> one = splat<Sum>(1);
    store(lse + first, shift * kLn2<Sum> + log<Sum>(total));
    store(factors + first, select(total == Vector<Sum>{}, Vector<Sum>{}, one / total));
  }
}

template <typename Element>
void forward_block(const Call<ForwardArrays<Element>>& call, const Blocks& blocks,
                   const Place& place, Scratch& scratch) {
  using Sum = Accumulator<Element>;
  const Problem<kAxes>& problem = call.problem;
  const BlockView block(problem, call.rank, blocks, place, place.part);
  struct Memory {
    Rows<Sum> keys, values, queries, outs;
    Sum *transposed, *logits, *bias, *maxima, *lse, *factors;
  };
  const auto memory = allocate(scratch, [&](Parts& parts) {
    const int64_t entries = block.most_keys() * kTileQueries;
    return Memory{make_rows<Sum>(parts, block.keys(), problem.dim),
                  make_rows<Sum>(parts, block.keys(), problem.value_dim),
                  make_rows<Sum>(parts, kTileQueries, problem.dim),
                  make_rows<Sum>(parts, kTileQueries, problem.value_dim),
                  make_transposed<Sum>(parts, problem.dim),
                  parts.of<Sum>(entries),
                  parts.of<Sum>(call.has_bias() ? entries : 0),
                  parts.of<Sum>(kTileQueries),
                  parts.of<Sum>(kTileQueries),
                  parts.of<Sum>(kTileQueries)};
  });
  const auto& m = memory;
  KeyStream<Element, Sum> stream(block, place);
  stream.add(m.keys, call.k);
  stream.add(m.values, call.v);
  const QueryResult outs(call.out, problem, problem.value_dim);
  clear(m.outs);  // of padding channels too, which nothing else writes
  const Sum scale = static_cast<Sum>(problem.scale) * kLog2E<Sum>;

  for_each_head(problem, place, stream, [&](int64_t head) {
    const auto queries = call.q.head(place.sample, head);
    const auto lses = call.lse.head(place.sample, head);
    block.for_each_tile([&](const Tile& tile, const Tile& next, const Shape& shape, bool is_new) {
      stream.pack(block.end_of(tile));
      pack_queries<Element>(m.queries, tile, shape.sees, queries, scale);
      transpose_queries(m.transposed, m.queries);
      prefetch_queries<Fetch::kSoon>(call.q, place.sample, head, next, problem.dim);
      if (call.has_bias() && is_new) {
        const Sum* table = call.bias.head(place.sample, head).data;
        read_bias(m.bias, table, shape, problem, kLog2E<Sum>);
      }
      const Sum* bias = call.has_bias() ? m.bias : nullptr;
      tile_logits(m.logits, m.maxima, Keys<Sum>(m.keys, block, tile), m.transposed, bias, shape);
      stream.fetch_some();
      softmax(m.logits, m.lse, m.factors, m.maxima, shape);
      stream.fetch_some();
      combine(m.outs, m.logits, Keys<Sum>(m.values, block, tile), shape);
      outs.write(place.sample, head, tile, m.outs, m.factors);
      outs.prefetch(place.sample, head, next);
      for (int l = 0; l < kTileQueries; ++l) {
        if (tile.token[l] >= 0) *lses.row(tile.token[l]) = m.lse[l];
      }
    });
  });
  outs.finish();
}

template <typename Element>
Job make_job(const Call<ForwardArrays<Element>>& call) {
  return over_blocks(call, bytes_per_key<Element>(call.problem), 2, forward_block<Element>);
}

}  // namespace jax_natten::JAX_NATTEN_TARGET
