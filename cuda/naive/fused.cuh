// The naive fused kernels: attention over the neighborhood, its tangent and its gradients. The
// formulas are those of cpu/fused.h.
//
// A group of lanes owns a query, or a key for its gradients, and walks the neighborhood in
// batches; softmax is online. A query without a key (beyond its count, or all its logits -inf) has
// out 0, lse -inf and no derivative.
#pragma once

#include <cmath>

#include "cuda/naive/naive.h"
#include "cuda/naive/row.cuh"
#include "cuda/naive/table.cuh"

namespace jax_natten::naive {

template <typename T>
__device__ T nothing() {
  return static_cast<T>(-INFINITY);
}

template <typename Sum>
__device__ const Sum* table_of(const Tensor<const Sum>& tables, int64_t sample, int64_t head) {
  return tables.data == nullptr ? nullptr : tables.head(sample, head).data;
}

// The bias of a neighbor in a batch.
template <typename Sum, typename Walk>
__device__ Sum bias_of(const Sum* table, const Walk& walk, int b) {
  return table == nullptr || !walk.has(b) ? Sum{0} : table[walk.bias + b * walk.bias_step];
}

template <typename Group, typename Element, int Rank>
__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor)
    forward_kernel(const __grid_constant__ ForwardOperands<Element, Rank> op) {
  using Sum = Accumulator<Element>;
  constexpr int kB = kBatch<Element>;
  const Problem<Rank>& p = op.problem;
  const Sum scale = static_cast<Sum>(p.scale);
  for_each_row<Group>(p.samples, p.heads, p.queries(), p.value_dim, [&](const Row& row) {
    const auto keys = op.k.head(row.sample, row.head / p.group());
    const auto values = op.v.head(row.sample, row.head / p.group());
    const Sum* table = table_of(op.bias, row.sample, row.head);
    const Element* q_row = op.q.head(row.sample, row.head).row(row.token);
    const Piece<Sum> q = Group::load(q_row, p.dim);

    Sum largest = nothing<Sum>(), total = 0;
    Piece<Sum> out;
    out.clear();
    const Neighborhood<Rank> seen = Sample<Rank>(p, row.sample).keys_of(row.token);
    for (WalkOf<Element, Rank> walk(seen); walk.goes_on(); walk.advance()) {
      Piece<Sum> k[kB], v[kB];
      load_batch<Group>(k, walk, keys, p.dim);
      load_batch<Group>(v, walk, values, p.value_dim, row.begin);
      // s = scale q.k + bias
      Sum s[kB];
      Sum next = largest;
      for (int b = 0; b < kB; ++b) {
        const Element* k_row = walk.row(keys, b);
        s[b] = scale * Group::sum(Group::dot_share(q, q_row, k[b], k_row, p.dim, walk.has(b))) +
               bias_of(table, walk, b);
        if (!walk.has(b)) s[b] = nothing<Sum>();
        next = max(next, s[b]);
      }
      // out and total are sums of exp(s - shift); a NaN is never the largest, but enters both.
      const Sum shift = next == nothing<Sum>() ? Sum{0} : next;
      const Sum shrink = exp(largest - shift);
      total *= shrink;
      out.scale(shrink);
      for (int b = 0; b < kB; ++b) {
        const Sum weight = exp(s[b] - shift);
        total += weight;
        out.add_scaled(weight, v[b]);
      }
      largest = next;
    }

    const bool empty = total == 0;
    Group::store(op.out.head(row.sample, row.head).row(row.token), p.value_dim, row.begin,
                 empty ? Sum{0} : 1 / total, out);
    if (Group::lane() == 0 && row.begin == 0) {
      *op.lse.head(row.sample, row.head).row(row.token) =
          empty ? nothing<Sum>() : largest + log(total);
    }
  });
}

template <typename Group, typename Element, int Rank>
__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor)
    tangent_kernel(const __grid_constant__ TangentOperands<Element, Rank> op) {
  using Sum = Accumulator<Element>;
  constexpr int kB = kBatch<Element>;
  const Problem<Rank>& p = op.problem;
  const Sum scale = static_cast<Sum>(p.scale);
  for_each_row<Group>(p.samples, p.heads, p.queries(), p.value_dim, [&](const Row& row) {
    const int64_t head_kv = row.head / p.group();
    const auto keys = op.k.head(row.sample, head_kv);
    const auto values = op.v.head(row.sample, head_kv);
    const auto key_tangents = op.dk.head(row.sample, head_kv);
    const auto value_tangents = op.dv.head(row.sample, head_kv);
    const Sum* table = table_of(op.bias, row.sample, row.head);
    const Sum* table_tangent = table_of(op.dbias, row.sample, row.head);
    const Element* q_row = op.q.head(row.sample, row.head).row(row.token);
    const Element* dq_row = op.dq.head(row.sample, row.head).row(row.token);
    const Sum lse = *op.lse.head(row.sample, row.head).row(row.token);
    const Piece<Sum> q = Group::load(q_row, p.dim);
    const Piece<Sum> dq = Group::load(dq_row, p.dim);

    // dout = sum (p ds v + p dv) - dlse sum p v
    Sum dlse = 0;
    Piece<Sum> changed, out;
    changed.clear();
    out.clear();
    const Neighborhood<Rank> seen = Sample<Rank>(p, row.sample).keys_of(row.token);
    const bool any = lse != nothing<Sum>();
    for (WalkOf<Element, Rank> walk(seen, any); walk.goes_on(); walk.advance()) {
      Piece<Sum> k[kB], dk[kB];
      load_batch<Group>(k, walk, keys, p.dim);
      load_batch<Group>(dk, walk, key_tangents, p.dim);
      Sum weight[kB], ds[kB];
      for (int b = 0; b < kB; ++b) {
        const bool has = walk.has(b);
        const Element* k_row = walk.row(keys, b);
        const Element* dk_row = walk.row(key_tangents, b);
        const Sum s = scale * Group::sum(Group::dot_share(q, q_row, k[b], k_row, p.dim, has)) +
                      bias_of(table, walk, b);
        ds[b] = scale * Group::sum(Group::dot_share(dq, dq_row, k[b], k_row, p.dim, has) +
                                   Group::dot_share(q, q_row, dk[b], dk_row, p.dim, has)) +
                bias_of(table_tangent, walk, b);
        weight[b] = has ? exp(s - lse) : Sum{0};
        if (!has) ds[b] = 0;
        dlse += weight[b] * ds[b];
      }
      Piece<Sum> v[kB], dv[kB];
      load_batch<Group>(v, walk, values, p.value_dim, row.begin);
      load_batch<Group>(dv, walk, value_tangents, p.value_dim, row.begin);
      for (int b = 0; b < kB; ++b) {
        changed.add_scaled(weight[b] * ds[b], v[b]);
        changed.add_scaled(weight[b], dv[b]);
        out.add_scaled(weight[b], v[b]);
      }
    }

    changed.add_scaled(-dlse, out);
    Group::store(op.dout.head(row.sample, row.head).row(row.token), p.value_dim, row.begin, Sum{1},
                 changed);
    if (Group::lane() == 0 && row.begin == 0) {
      *op.dlse.head(row.sample, row.head).row(row.token) = dlse;
    }
  });
}

// delta and dq.
template <typename Group, typename Element, int Rank>
__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor)
    backward_queries_kernel(const __grid_constant__ BackwardOperands<Element, Rank> op) {
  using Sum = Accumulator<Element>;
  constexpr int kB = kBatch<Element>;
  const Problem<Rank>& p = op.problem;
  const Sum scale = static_cast<Sum>(p.scale);
  for_each_row<Group>(p.samples, p.heads, p.queries(), p.dim, [&](const Row& row) {
    const auto keys = op.k.head(row.sample, row.head / p.group());
    const auto values = op.v.head(row.sample, row.head / p.group());
    const Sum* table = table_of(op.bias, row.sample, row.head);
    const Element* q_row = op.q.head(row.sample, row.head).row(row.token);
    const Element* out_row = op.out.head(row.sample, row.head).row(row.token);
    const Element* ct_row = op.ct_out.head(row.sample, row.head).row(row.token);
    const Sum lse = *op.lse.head(row.sample, row.head).row(row.token);
    const Piece<Sum> q = Group::load(q_row, p.dim);
    const Piece<Sum> ct = Group::load(ct_row, p.value_dim);

    const Neighborhood<Rank> seen = Sample<Rank>(p, row.sample).keys_of(row.token);
    const bool any = !seen.empty() && lse != nothing<Sum>();
    const Sum product = Group::sum(
        Group::dot_share(ct, ct_row, Group::load(out_row, p.value_dim), out_row, p.value_dim));
    const Sum delta = any ? *op.ct_lse.head(row.sample, row.head).row(row.token) - product : Sum{0};
    Piece<Sum> dq;
    dq.clear();
    for (WalkOf<Element, Rank> walk(seen, any); walk.goes_on(); walk.advance()) {
      Piece<Sum> k[kB], v[kB];
      load_batch<Group>(k, walk, keys, p.dim);
      load_batch<Group>(v, walk, values, p.value_dim);
      for (int b = 0; b < kB; ++b) {
        const bool has = walk.has(b);
        const Element* k_row = walk.row(keys, b);
        const Element* v_row = walk.row(values, b);
        const Sum s = scale * Group::sum(Group::dot_share(q, q_row, k[b], k_row, p.dim, has)) +
                      bias_of(table, walk, b);
        const Sum dp = Group::sum(Group::dot_share(ct, ct_row, v[b], v_row, p.value_dim, has));
        const Sum ds = has ? exp(s - lse) * (dp + delta) : Sum{0};
        dq.add_scaled(ds, Group::piece_at(row.begin, k[b], k_row, p.dim, has));
      }
    }

    Group::store(op.dq.head(row.sample, row.head).row(row.token), p.dim, row.begin, scale, dq);
    if (Group::lane() == 0 && row.begin == 0) {
      *op.delta.head(row.sample, row.head).row(row.token) = delta;
    }
  });
}

// dk and dv of the keys. Reads delta.
template <typename Group, typename Element, int Rank>
__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor)
    backward_keys_kernel(const __grid_constant__ BackwardOperands<Element, Rank> op) {
  using Sum = Accumulator<Element>;
  constexpr int kB = kBatch<Element>;
  const Problem<Rank>& p = op.problem;
  const Sum scale = static_cast<Sum>(p.scale);
  const int64_t longest = geometry::max(p.dim, p.value_dim);
  for_each_row<Group>(p.samples, p.heads_kv, p.keys(), longest, [&](const Row& row) {
    const Element* k_row = op.k.head(row.sample, row.head).row(row.token);
    const Element* v_row = op.v.head(row.sample, row.head).row(row.token);
    const Piece<Sum> k = Group::load(k_row, p.dim);
    const Piece<Sum> v = Group::load(v_row, p.value_dim);
    Piece<Sum> dk, dv;
    dk.clear();
    dv.clear();
    const Neighborhood<Rank> seen_by = Sample<Rank>(p, row.sample).queries_of(row.token);
    for (int64_t of_group = 0; of_group < p.group(); ++of_group) {
      const int64_t head = row.head * p.group() + of_group;
      const auto queries = op.q.head(row.sample, head);
      const auto out_cotangents = op.ct_out.head(row.sample, head);
      const auto lses = op.lse.head(row.sample, head);
      const auto deltas = op.delta.head(row.sample, head);
      const Sum* table = table_of(op.bias, row.sample, head);
      for (WalkOf<Element, Rank> walk(seen_by); walk.goes_on(); walk.advance()) {
        Piece<Sum> q[kB], ct[kB];
        load_batch<Group>(q, walk, queries, p.dim);
        load_batch<Group>(ct, walk, out_cotangents, p.value_dim);
        Sum lse[kB], delta[kB];
        for (int b = 0; b < kB; ++b) {
          lse[b] = walk.has(b) ? *walk.row(lses, b) : nothing<Sum>();
          delta[b] = walk.has(b) ? *walk.row(deltas, b) : Sum{0};
        }
        for (int b = 0; b < kB; ++b) {
          const bool has = walk.has(b);
          const Element* q_row = walk.row(queries, b);
          const Element* ct_row = walk.row(out_cotangents, b);
          const Sum s = scale * Group::sum(Group::dot_share(k, k_row, q[b], q_row, p.dim, has)) +
                        bias_of(table, walk, b);
          const Sum dp = Group::sum(Group::dot_share(v, v_row, ct[b], ct_row, p.value_dim, has));
          if (lse[b] == nothing<Sum>()) continue;
          const Sum weight = exp(s - lse[b]);
          const Sum ds = weight * (dp + delta[b]);
          dv.add_scaled(weight, Group::piece_at(row.begin, ct[b], ct_row, p.value_dim, has));
          dk.add_scaled(ds, Group::piece_at(row.begin, q[b], q_row, p.dim, has));
        }
      }
    }
    Group::store(op.dk.head(row.sample, row.head).row(row.token), p.dim, row.begin, scale, dk);
    Group::store(op.dv.head(row.sample, row.head).row(row.token), p.value_dim, row.begin, Sum{1},
                 dv);
  });
}

// ds of a query's pairs, which dbias sums.
template <typename Group, typename Element, int Rank>
struct LogitGradient {
  using Sum = Accumulator<Element>;
  const BackwardOperands<Element, Rank>& op;
  int64_t sample;
  int64_t head;

  struct Query {
    const Element* q_row;
    const Element* ct_row;
    Piece<Sum> q, ct;
    Sum lse, delta;
    __device__ bool has_pairs() const { return lse != nothing<Sum>(); }
  };

  __device__ Query query(int64_t token) const {
    const Element* q_row = op.q.head(sample, head).row(token);
    const Element* ct_row = op.ct_out.head(sample, head).row(token);
    return {q_row,
            ct_row,
            Group::load(q_row, op.problem.dim),
            Group::load(ct_row, op.problem.value_dim),
            *op.lse.head(sample, head).row(token),
            *op.delta.head(sample, head).row(token)};
  }

  __device__ Sum pair(const Query& query, int64_t key, int64_t /*slot*/, int64_t bias) const {
    const Problem<Rank>& p = op.problem;
    const Element* k_row = op.k.head(sample, head / p.group()).row(key);
    const Element* v_row = op.v.head(sample, head / p.group()).row(key);
    const Piece<Sum> k = Group::load(k_row, p.dim), v = Group::load(v_row, p.value_dim);
    const Sum qk = Group::sum(Group::dot_share(query.q, query.q_row, k, k_row, p.dim));
    const Sum dp = Group::sum(Group::dot_share(query.ct, query.ct_row, v, v_row, p.value_dim));
    const Sum s = static_cast<Sum>(p.scale) * qk + op.bias.head(sample, head).data[bias];
    return exp(s - query.lse) * (dp + query.delta);
  }
};

template <typename Group, typename Element, int Rank>
__global__ void __launch_bounds__(kTableThreads)
    backward_bias_kernel(const __grid_constant__ BackwardOperands<Element, Rank> op) {
  sum_tables<Group>(op.problem, op.dbias, [&](int64_t sample, int64_t head) {
    return LogitGradient<Group, Element, Rank>{op, sample, head};
  });
}

// ---- launches

template <typename Element, int Rank>
cudaError_t run_operation(cudaStream_t stream, const ForwardOperands<Element, Rank>& op) {
  const Problem<Rank>& p = op.problem;
  return with_lanes<Element>(p.dim, p.value_dim, [&](auto group) {
    using Group = decltype(group);
    return launch_rows<Group>(stream, forward_kernel<Group, Element, Rank>, p.samples, p.heads,
                              p.queries(), p.value_dim, op);
  });
}

template <typename Element, int Rank>
cudaError_t run_operation(cudaStream_t stream, const TangentOperands<Element, Rank>& op) {
  const Problem<Rank>& p = op.problem;
  return with_lanes<Element>(p.dim, p.value_dim, [&](auto group) {
    using Group = decltype(group);
    return launch_rows<Group>(stream, tangent_kernel<Group, Element, Rank>, p.samples, p.heads,
                              p.queries(), p.value_dim, op);
  });
}

template <typename Element, int Rank>
cudaError_t run_operation(cudaStream_t stream, const BackwardOperands<Element, Rank>& op) {
  const Problem<Rank>& p = op.problem;
  return with_lanes<Element>(p.dim, p.value_dim, [&](auto group) {
    using Group = decltype(group);
    cudaError_t error = launch_rows<Group>(stream, backward_queries_kernel<Group, Element, Rank>,
                                           p.samples, p.heads, p.queries(), p.dim, op);
    if (error != cudaSuccess) return error;
    error = launch_rows<Group>(stream, backward_keys_kernel<Group, Element, Rank>, p.samples,
                               p.heads_kv, p.keys(), geometry::max(p.dim, p.value_dim), op);
    if (error != cudaSuccess || !op.has_bias()) return error;
    return launch_tables(stream, backward_bias_kernel<Group, Element, Rank>, p, op);
  });
}

}  // namespace jax_natten::naive
