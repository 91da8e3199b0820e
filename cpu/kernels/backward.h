// Backward, with p = exp(s - lse) and ds = p (ct_out.v + delta), delta = ct_lse - ct_out.out:
//   dq = scale sum ds k,  dbias[offset] = sum ds,
//   dk = scale sum ds q,  dv = sum p ct_out  (over the queries that see the key)
//
// A tile adds to the sums of its block's keys, a block to those of all keys. Blocks that share keys
// take turns, in an order that is always the same.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/kernels/bias.h"
#include "cpu/kernels/block.h"
#include "cpu/kernels/key_sums.h"
#include "cpu/kernels/logits.h"
#include "cpu/kernels/products.h"
#include "cpu/kernels/rows.h"
#include "cpu/sums.h"

namespace jax_natten::JAX_NATTEN_TARGET {

// lane = a + sum_c b[c] d[c], of transposed queries.
template <typename Sum>
void add_dot(Sum* lanes, const Sum* a, const Sum* b, const Sum* d, int64_t channels) {
  for (int first = 0; first < kTileQueries; first += kWidth<Sum>) {
    Vector<Sum> sum = load(a + first);
    for (int64_t c = 0; c < channels; ++c) {
      const int64_t at = c * kTileQueries + first;
      sum += load(b + at) * load(d + at);
    }
    store(lanes + first, sum);
  }
}

// ds = p (dp + delta), 0 where a query does not see a key, whatever dp is there.
template <typename Sum>
__attribute__((noinline)) void gradients_of_logits(Sum* dp, const Sum* weights, const Sum* delta,
                                                   const Shape& shape) {
  for (int first = 0; first < kTileQueries; first += kWidth<Sum>) {
    const Vector<Sum> added = load(delta + first);
    for_each_entry<Sum>(shape, first, [&](int64_t entry) JAX_NATTEN_LAMBDA {
      const Vector<Sum> p = load(weights + entry);
      store(dp + entry, select(p == Vector<Sum>{}, p, p * (load(dp + entry) + added)));
    });
  }
}

template <typename Sum>
void add_entries(Sum* sums, const Sum* entries, const Shape& shape) {
  for (int first = 0; first < kTileQueries; first += kWidth<Sum>) {
    for_each_entry<Sum>(shape, first, [&](int64_t entry) JAX_NATTEN_LAMBDA {
      store(sums + entry, load(sums + entry) + load(entries + entry));
    });
  }
}

template <typename Element>
class BackwardBlock {
 public:
  using Sum = Accumulator<Element>;

  BackwardBlock(const Call<BackwardArrays<Element>>& call, const Blocks& blocks, const Place& place,
                Scratch& scratch)
      : call_(call),
        problem_(call.problem),
        place_(place),
        block_(call.problem, call.rank, blocks, place, place.part),
        dq_(call.dq, call.problem, call.problem.dim) {
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
                    make_rows<Sum>(parts, kTileQueries, dim),
                    make_transposed<Sum>(parts, dim),
                    make_transposed<Sum>(parts, value_dim),
                    make_transposed<Sum>(parts, value_dim),
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
    const int64_t group = problem_.group();
    KeyStream<Element, Sum> stream(block_, place_);
    stream.add(m.keys, call_.k);
    stream.add(m.values, call_.v);
    clear(m.query_sums);  // of padding channels too, which nothing else writes
    for (int64_t head_kv = place_.heads_kv.begin; head_kv < place_.heads_kv.end; ++head_kv) {
      stream.next_head();
      clear(m.key_sums);
      clear(m.value_sums);
      for (int64_t head = head_kv * group; head < (head_kv + 1) * group; ++head) {
        run_head(stream, head);
      }
      add_key_sums(head_kv);
    }
    dq_.finish();
  }

 private:
  struct Memory {
    Rows<Sum> keys, values, key_sums, value_sums;
    Rows<Sum> queries, ct_outs, outs, query_sums;
    Sum *queries_transposed, *ct_outs_transposed, *outs_transposed;
    Sum *weights, *gradients, *bias, *bias_sums;
    Sum *shifts, *delta, *maxima;
  };

  void run_head(KeyStream<Element, Sum>& stream, int64_t head) const {
    const Memory& m = memory_;
    Shape last{};
    block_.for_each_tile([&](const Tile& tile, const Tile& next, const Shape& shape, bool is_new) {
      if (call_.has_bias() && is_new) {
        add_bias_gradient(last, head);
        read_bias(m.bias, call_.bias.head(place_.sample, head).data, shape, problem_, kLog2E<Sum>);
        std::fill_n(m.bias_sums, shape.keys() * kTileQueries, Sum{0});
        last = shape;
      }
      stream.pack(block_.end_of(tile));
      run_tile(stream, tile, next, shape, head);
    });
    if (call_.has_bias()) add_bias_gradient(last, head);
  }

  void run_tile(KeyStream<Element, Sum>& stream, const Tile& tile, const Tile& next,
                const Shape& shape, int64_t head) const {
    const Memory& m = memory_;
    const auto fetch = [&](const Tensor<const Element>& from, int64_t channels) {
      prefetch_queries<Fetch::kSoon>(from, place_.sample, head, next, channels);
    };
    bool has_derivative[kTileQueries];
    read_shifts(m.shifts, has_derivative, call_.lse.head(place_.sample, head), tile, shape);
    const auto ct_lses = call_.ct_lse.head(place_.sample, head);
    for (int l = 0; l < kTileQueries; ++l) {
      m.delta[l] = has_derivative[l] ? *ct_lses.row(tile.token[l]) : Sum{0};
    }
    const Sum scale = static_cast<Sum>(problem_.scale) * kLog2E<Sum>;
    const auto pack = [&](const Rows<Sum>& rows, Sum* transposed, const Tensor<const Element>& from,
                          Sum factor) {
      pack_queries<Element>(rows, tile, has_derivative, from.head(place_.sample, head), factor);
      transpose_queries(transposed, rows);
    };
    pack(m.queries, m.queries_transposed, call_.q, scale);
    pack(m.ct_outs, m.ct_outs_transposed, call_.ct_out, 1);
    pack(m.outs, m.outs_transposed, call_.out, -1);
    fetch(call_.q, problem_.dim);
    add_dot(m.delta, m.delta, m.ct_outs_transposed, m.outs_transposed, problem_.value_dim);

    const Keys<Sum> keys(m.keys, block_, tile), values(m.values, block_, tile);
    tile_logits(m.weights, m.maxima, keys, m.queries_transposed,
                call_.has_bias() ? m.bias : nullptr, shape);
    fetch(call_.ct_out, problem_.value_dim);
    exponentials(m.weights, m.shifts, shape);
    tile_products(m.gradients, values, m.ct_outs_transposed, shape);
    stream.fetch_some();
    gradients_of_logits(m.gradients, m.weights, m.delta, shape);
    if (call_.has_bias()) add_entries(m.bias_sums, m.gradients, shape);

    combine(m.query_sums, m.gradients, keys, shape);
    fetch(call_.out, problem_.value_dim);
    Sum scales[kTileQueries];
    for (int l = 0; l < kTileQueries; ++l) {
      scales[l] = static_cast<Sum>(problem_.scale);
      if (!has_derivative[l]) clear_row(m.query_sums, l);
    }
    dq_.write(place_.sample, head, tile, m.query_sums, scales);
    spread(Keys<Sum>(m.value_sums, block_, tile), m.weights, m.ct_outs, shape);
    stream.fetch_some();
    dq_.prefetch(place_.sample, head, next);
    spread(Keys<Sum>(m.key_sums, block_, tile), m.gradients, m.queries, shape);
  }

  void add_bias_gradient(const Shape& shape, int64_t head) const {
    add_to_bias(call_.dbias.head(place_.sample, head).data, memory_.bias_sums, shape, problem_);
  }

  // The packed queries' scale has a factor that the gradient's has not.
  void add_key_sums(int64_t head_kv) const {
    add_keys(sums_of(call_.dk, call_.dk_sums).head(place_.sample, head_kv), memory_.key_sums,
             block_, kLn2<Sum>);
    add_keys(sums_of(call_.dv, call_.dv_sums).head(place_.sample, head_kv), memory_.value_sums,
             block_, Sum{1});
  }

  const Call<BackwardArrays<Element>>& call_;
  const Problem<kAxes>& problem_;
  const Place& place_;
  const BlockView block_;
  const QueryResult<Element> dq_;
  Memory memory_;
};

// The tables' gradients are sums over all queries of a head, which one task then has.
template <typename Element>
Job make_job(const Call<BackwardArrays<Element>>& call) {
  using Sum = Accumulator<Element>;
  const Problem<kAxes>& problem = call.problem;
  const Blocks blocks = choose_blocks(problem, call.rank, bytes_per_key<Element>(problem));
  const double flops = 5 * products(problem, blocks);
  const auto clear_tables = [=](int64_t sample, int64_t head_kv) {
    const int64_t group = call.problem.group();
    for (int64_t head = head_kv * group; head < (head_kv + 1) * group; ++head) {
      std::fill_n(call.dbias.head(sample, head).data, call.problem.biases(), Sum{0});
    }
  };
  const auto run = [=](const Place& place, Scratch& scratch) {
    BackwardBlock<Element>(call, blocks, place, scratch).run();
  };
  Job job{clear_keys(problem, sums_of(call.dk, call.dk_sums), problem.dim),
          clear_keys(problem, sums_of(call.dv, call.dv_sums), problem.value_dim)};
  append(job, call.has_bias() ? over_heads(problem, blocks, flops, clear_tables, run)
                              : over_slabs(problem, blocks, flops, run));
  append(job, narrow_keys(problem, call.dk, call.dk_sums, problem.dim));
  append(job, narrow_keys(problem, call.dv, call.dv_sums, problem.value_dim));
  return job;
}

}  // namespace jax_natten::JAX_NATTEN_TARGET
