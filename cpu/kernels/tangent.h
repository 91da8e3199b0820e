// Tangent, with p = exp(s - lse) and ds = scale (dq.k + q.dk) + dbias:
//   dlse = sum p ds,  dout = sum p (ds - dlse) v + p dv.
#pragma once

#include <cstdint>

#include "cpu/kernels/bias.h"
#include "cpu/kernels/block.h"
#include "cpu/kernels/logits.h"
#include "cpu/kernels/products.h"
#include "cpu/kernels/rows.h"

namespace jax_natten::JAX_NATTEN_TARGET {

// dp = p (ds - dlse) of weights p, in the place of dq.k; gives dlse. `more` has q.dk in base 2,
// `dbias` is null or has an entry for each. All are 0 where a query does not see a key.
template <typename Sum>
__attribute__((noinline)) void tangents_of_weights(Sum* tangents, Sum* dlse, const Sum* weights,
                                                   const Sum* more, const Sum* dbias,
                                                   const Shape& shape) {
  const Vector<Sum> nothing{};
  for (int first = 0; first < kTileQueries; first += kWidth<Sum>) {
    Vector<Sum> total{};
    for_each_entry<Sum>(shape, first, [&](int64_t entry) JAX_NATTEN_LAMBDA {
      const Vector<Sum> p = load(weights + entry);
      const Vector<Sum> added = dbias == nullptr ? nothing : load(dbias + entry);
      const Vector<Sum> ds = load(tangents + entry) + load(more + entry) * kLn2<Sum> + added;
      const Vector<Sum> product = select(p == nothing, nothing, p * ds);
      total += product;
      store(tangents + entry, product);
    });
    for_each_entry<Sum>(shape, first, [&](int64_t entry) JAX_NATTEN_LAMBDA {
      const Vector<Sum> p = load(weights + entry);
      const Vector<Sum> dp = load(tangents + entry) - p * total;
      store(tangents + entry, select(p == nothing, nothing, dp));
    });
    store(dlse + first, total);
  }
}

template <typename Element>
class TangentBlock {
 public:
  using Sum = Accumulator<Element>;

  TangentBlock(const Call<TangentArrays<Element>>& call, const Blocks& blocks, const Place& place,
               Scratch& scratch)
      : call_(call),
        problem_(call.problem),
        place_(place),
        block_(call.problem, call.rank, blocks, place, place.part),
        dout_(call.dout, call.problem, call.problem.value_dim) {
    memory_ = allocate(scratch, [&](Parts& parts) {
      const int64_t dim = problem_.dim, value_dim = problem_.value_dim, keys = block_.keys();
      const int64_t entries = block_.most_keys() * kTileQueries;
      const int64_t biases = call.has_bias() ? entries : 0;
      return Memory{make_rows<Sum>(parts, keys, dim),
                    make_rows<Sum>(parts, keys, value_dim),
                    make_rows<Sum>(parts, keys, dim),
                    make_rows<Sum>(parts, keys, value_dim),
                    make_rows<Sum>(parts, kTileQueries, dim),
                    make_rows<Sum>(parts, kTileQueries, value_dim),
                    make_rows<Sum>(parts, kTileQueries, value_dim),
                    make_transposed<Sum>(parts, dim),
                    make_transposed<Sum>(parts, dim),
                    parts.of<Sum>(entries),
                    parts.of<Sum>(entries),
                    parts.of<Sum>(entries),
                    parts.of<Sum>(biases),
                    parts.of<Sum>(biases),
                    parts.of<Sum>(kTileQueries),
                    parts.of<Sum>(kTileQueries),
                    parts.of<Sum>(kTileQueries)};
    });
  }

  void run() {
    const Memory& m = memory_;
    KeyStream<Element, Sum> stream(block_, place_);
    stream.add(m.keys, call_.k);
    stream.add(m.values, call_.v);
    stream.add(m.key_tangents, call_.dk);
    stream.add(m.value_tangents, call_.dv);
    clear(m.outs);  // of padding channels too, which nothing else writes
    clear(m.more_outs);
    for_each_head(problem_, place_, stream, [&](int64_t head) {
      block_.for_each_tile([&](const Tile& tile, const Tile&, const Shape& shape, bool is_new) {
        if (call_.has_bias() && is_new) {
          const auto read = [&](Sum* entries, const Tensor<const Sum>& tables, Sum factor) {
            read_bias(entries, tables.head(place_.sample, head).data, shape, problem_, factor);
          };
          read(m.bias, call_.bias, kLog2E<Sum>);
          read(m.dbias, call_.dbias, Sum{1});
        }
        stream.pack(block_.end_of(tile));
        stream.fetch_some();
        run_tile(tile, shape, head);
        stream.fetch_some();
      });
    });
    dout_.finish();
  }

 private:
  struct Memory {
    Rows<Sum> keys, values, key_tangents, value_tangents;
    Rows<Sum> queries, outs, more_outs;
    Sum *queries_transposed, *tangents_transposed;
    Sum *weights, *tangents, *more, *bias, *dbias;
    Sum *shifts, *dlse, *maxima;
  };

  void run_tile(const Tile& tile, const Shape& shape, int64_t head) const {
    const Memory& m = memory_;
    bool has_derivative[kTileQueries];
    read_shifts(m.shifts, has_derivative, call_.lse.head(place_.sample, head), tile, shape);
    const Sum scale = static_cast<Sum>(problem_.scale);
    const auto pack = [&](Sum* transposed, const Tensor<const Element>& from, Sum factor) {
      pack_queries<Element>(m.queries, tile, has_derivative, from.head(place_.sample, head),
                            factor);
      transpose_queries(transposed, m.queries);
    };
    pack(m.queries_transposed, call_.q, scale * kLog2E<Sum>);
    pack(m.tangents_transposed, call_.dq, scale);

    const Keys<Sum> keys(m.keys, block_, tile), key_tangents(m.key_tangents, block_, tile);
    tile_logits(m.weights, m.maxima, keys, m.queries_transposed,
                call_.has_bias() ? m.bias : nullptr, shape);
    exponentials(m.weights, m.shifts, shape);
    tile_products(m.tangents, keys, m.tangents_transposed, shape);
    tile_products(m.more, key_tangents, m.queries_transposed, shape);
    tangents_of_weights(m.tangents, m.dlse, m.weights, m.more, call_.has_bias() ? m.dbias : nullptr,
                        shape);

    combine(m.outs, m.tangents, Keys<Sum>(m.values, block_, tile), shape);
    combine(m.more_outs, m.weights, Keys<Sum>(m.value_tangents, block_, tile), shape);
    for (int64_t i = 0; i < m.outs.size(); ++i) m.outs.data[i] += m.more_outs.data[i];
    Sum scales[kTileQueries];
    for (int l = 0; l < kTileQueries; ++l) {
      scales[l] = 1;
      if (!has_derivative[l]) clear_row(m.outs, l);
    }
    dout_.write(place_.sample, head, tile, m.outs, scales);
    const auto dlses = call_.dlse.head(place_.sample, head);
    for (int l = 0; l < kTileQueries; ++l) {
      if (tile.token[l] >= 0) *dlses.row(tile.token[l]) = has_derivative[l] ? m.dlse[l] : Sum{0};
    }
  }

  const Call<TangentArrays<Element>>& call_;
  const Problem<kAxes>& problem_;
  const Place& place_;
  const BlockView block_;
  const QueryResult<Element> dout_;
  Memory memory_;
};

template <typename Element>
Job make_job(const Call<TangentArrays<Element>>& call) {
  // A key and its value, and the tangents of both.
  const int64_t bytes = 2 * bytes_per_key<Element>(call.problem);
  return over_blocks(
      call, bytes, 5,
      [](const Call<TangentArrays<Element>>& call, const Blocks& blocks, const Place& place,
         Scratch& scratch) { TangentBlock<Element>(call, blocks, place, scratch).run(); });
}

}  // namespace jax_natten::JAX_NATTEN_TARGET
