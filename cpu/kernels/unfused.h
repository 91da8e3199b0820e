// The unfused products: with a query's window as a row of slots, and their transposes.
//
//   qk       attn[i, slot of j] = query[i] . key[j]
//   av       out[i] = sum_j attn[i, slot of j] value[j]
//   inverse  out[j] = sum over the group's heads and the i that see j, attn[i, slot of j] x[i]
//
// Slots without a key are written as 0 and never read.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/kernels/block.h"
#include "cpu/kernels/logits.h"
#include "cpu/kernels/products.h"
#include "cpu/kernels/rows.h"
#include "cpu/sums.h"

namespace jax_natten::JAX_NATTEN_TARGET {

// Calls visit(entry, first slot, count) for runs of keys along the last axis that a lane sees;
// the entries of a run are kTileQueries apart, the slots follow each other.
template <typename Visit>
JAX_NATTEN_INLINE void for_each_slots(const Shape& shape, const Problem<kAxes>& problem, int lane,
                                      Visit&& visit) {
  const int64_t y_stride = problem.window[2].kernel_size;
  const int64_t z_stride = y_stride * problem.window[1].kernel_size;
  const Box box = shape.box_of(lane);
  const auto& [z_range, y_range, x_range] = box.axis;
  for (int z = z_range.begin; z < z_range.end; ++z) {
    for (int y = y_range.begin; y < y_range.end; ++y) {
      visit(shape.entry(z, y, x_range.begin) * kTileQueries + lane,
            shape.slot[lane] + z * z_stride + y * y_stride + x_range.begin, x_range.count());
    }
  }
}

// The tile's rows of slots, from a table.
template <typename Element, typename Sum>
void write_slots(const typename Tensor<Element>::Head& to, const Sum* entries, const Tile& tile,
                 const Shape& shape, const Problem<kAxes>& problem) {
  const int64_t slots = problem.slots();
  for (int l = 0; l < kTileQueries; ++l) {
    if (tile.token[l] < 0) continue;
    Element* row = to.row(tile.token[l]);
    if (shape.box_of(l).volume() < slots) std::fill_n(row, slots, Element{});
    for_each_slots(shape, problem, l, [&](int64_t entry, int64_t slot, int count) {
      for (int i = 0; i < count; ++i) {
        row[slot + i] = narrow(entries[entry + i * kTileQueries], Element{});
      }
    });
  }
}

// A table from the tile's rows of slots, 0 where a query does not see a key.
template <typename Element, typename Sum>
void read_slots(Sum* entries, const typename Tensor<const Element>::Head& from, const Tile& tile,
                const Shape& shape, const Problem<kAxes>& problem) {
  std::fill_n(entries, shape.keys() * kTileQueries, Sum{0});
  for (int l = 0; l < kTileQueries; ++l) {
    if (!shape.sees[l]) continue;
    const Element* row = from.row(tile.token[l]);
    for_each_slots(shape, problem, l, [&](int64_t entry, int64_t slot, int count) {
      for (int i = 0; i < count; ++i) entries[entry + i * kTileQueries] = widen(row[slot + i]);
    });
  }
}

template <typename Element>
void qk_block(const Call<QkArrays<Element>>& call, const Blocks& blocks, const Place& place,
              Scratch& scratch) {
  using Sum = Accumulator<Element>;
  const Problem<kAxes>& problem = call.problem;
  const BlockView block(problem, call.rank, blocks, place, place.part);
  struct Memory {
    Rows<Sum> keys, queries;
    Sum *transposed, *products;
  };
  const Memory m = allocate(scratch, [&](Parts& parts) {
    return Memory{make_rows<Sum>(parts, block.keys(), problem.dim),
                  make_rows<Sum>(parts, kTileQueries, problem.dim),
                  make_transposed<Sum>(parts, problem.dim),
                  parts.of<Sum>(block.most_keys() * kTileQueries)};
  });
  KeyStream<Element, Sum> stream(block, place);
  stream.add(m.keys, call.key);
  for_each_head(problem, place, stream, [&](int64_t head) {
    block.for_each_tile([&](const Tile& tile, const Tile&, const Shape& shape, bool) {
      stream.pack(block.end_of(tile));
      pack_queries<Element>(m.queries, tile, shape.sees, call.query.head(place.sample, head),
                            Sum{1});
      transpose_queries(m.transposed, m.queries);
      tile_products(m.products, Keys<Sum>(m.keys, block, tile), m.transposed, shape);
      stream.fetch_some();
      write_slots<Element>(call.attn.head(place.sample, head), m.products, tile, shape, problem);
    });
  });
}

// Of a product with weights: the rows of a block's keys, those of a tile's queries.
template <typename Sum>
struct Weighted {
  Rows<Sum> keys, queries;
  Sum* weights;

  Weighted(Parts& parts, const BlockView& block, int64_t channels)
      : keys(make_rows<Sum>(parts, block.keys(), channels)),
        queries(make_rows<Sum>(parts, kTileQueries, channels)),
        weights(parts.of<Sum>(block.most_keys() * kTileQueries)) {}
};

template <typename Element>
void av_block(const Call<AvArrays<Element>>& call, const Blocks& blocks, const Place& place,
              Scratch& scratch) {
  using Sum = Accumulator<Element>;
  const Problem<kAxes>& problem = call.problem;
  const BlockView block(problem, call.rank, blocks, place, place.part);
  const auto m = allocate(
      scratch, [&](Parts& parts) { return Weighted<Sum>(parts, block, problem.value_dim); });
  const QueryResult outs(call.out, problem, problem.value_dim);
  clear(m.queries);  // of padding channels too, which nothing else writes
  Sum ones[kTileQueries];
  std::fill_n(ones, kTileQueries, Sum{1});
  KeyStream<Element, Sum> stream(block, place);
  stream.add(m.keys, call.value);
  for_each_head(problem, place, stream, [&](int64_t head) {
    block.for_each_tile([&](const Tile& tile, const Tile&, const Shape& shape, bool) {
      stream.pack(block.end_of(tile));
      read_slots<Element>(m.weights, call.attn.head(place.sample, head), tile, shape, problem);
      stream.fetch_some();
      combine(m.queries, m.weights, Keys<Sum>(m.keys, block, tile), shape);
      outs.write(place.sample, head, tile, m.queries, ones);
    });
  });
  outs.finish();
}

template <typename Element>
void inverse_block(const Call<InverseArrays<Element>>& call, const Blocks& blocks,
                   const Place& place, Scratch& scratch) {
  using Sum = Accumulator<Element>;
  const Problem<kAxes>& problem = call.problem;
  const BlockView block(problem, call.rank, blocks, place, place.part);
  const auto m = allocate(
      scratch, [&](Parts& parts) { return Weighted<Sum>(parts, block, problem.value_dim); });
  const int64_t group = problem.group();
  for (int64_t head_kv = place.heads_kv.begin; head_kv < place.heads_kv.end; ++head_kv) {
    clear(m.keys);
    for (int64_t head = head_kv * group; head < (head_kv + 1) * group; ++head) {
      block.for_each_tile([&](const Tile& tile, const Tile&, const Shape& shape, bool) {
        read_slots<Element>(m.weights, call.attn.head(place.sample, head), tile, shape, problem);
        pack_queries<Element>(m.queries, tile, shape.sees, call.x.head(place.sample, head), Sum{1});
        spread(Keys<Sum>(m.keys, block, tile), m.weights, m.queries, shape);
      });
    }
    add_keys(sums_of(call.out, call.sums).head(place.sample, head_kv), m.keys, block, Sum{1});
  }
}

template <typename Element>
Job make_job(const Call<QkArrays<Element>>& call) {
  return over_blocks(call, bytes_per_key<Element>(call.problem), 2, qk_block<Element>);
}

template <typename Element>
Job make_job(const Call<AvArrays<Element>>& call) {
  return over_blocks(call, bytes_per_key<Element>(call.problem), 2, av_block<Element>);
}

template <typename Element>
Job make_job(const Call<InverseArrays<Element>>& call) {
  const Problem<kAxes>& problem = call.problem;
  const Blocks blocks = choose_blocks(problem, call.rank, bytes_per_key<Element>(problem));
  Job job{clear_keys(problem, sums_of(call.out, call.sums), problem.value_dim)};
  append(job, over_slabs(problem, blocks, 2 * products(problem, blocks),
                         [=](const Place& place, Scratch& scratch) {
                           inverse_block(call, blocks, place, scratch);
                         }));
  append(job, narrow_keys(problem, call.out, call.sums, problem.value_dim));
  return job;
}

}  // namespace jax_natten::JAX_NATTEN_TARGET
