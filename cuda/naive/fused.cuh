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

// The bias of a batch's neighbor.
template <typename Sum, typename Batch>
__device__ Sum bias_of(const Sum* table, const Batch& batch, int b) {
  return table == nullptr || !batch.has(b) ? Sum{0} : table[batch.bias(b)];
}

template <typename Group, typename Element, int Rank>
__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor)
    forward_kernel(const __grid_constant__ ForwardOperands<Element, Rank> op) {
  using Sum = Accumulator<Element>;
  constexpr int kB = kBatch<Element>;
  const Problem<Rank>& problem = op.problem;
  const Sum scale = static_cast<Sum>(problem.scale);
  for_each_row<Group>(
      problem.samples, problem.heads, problem.queries(), problem.value_dim, [&](const Row& row) {
        const int64_t head_kv = row.head / problem.group();
        const auto keys = op.k.head(row.sample, head_kv);
        const auto values = op.v.head(row.sample, head_kv);
        const Sum* table = table_of(op.bias, row.sample, row.head);
        const Element* q_row = op.q.head(row.sample, row.head).row(row.token);
        const Neighborhood<Rank> seen = Sample<Rank>(problem, row.sample).keys_of(row.token);
        const Piece<Sum> q = Group::load(q_row, problem.dim);

        Sum largest = nothing<Sum>(), total = 0;
        Piece<Sum> out;
        out.clear();
        for_each_batch<Element>(seen, [&](const Batch<Element, Rank>& batch) {
          Piece<Sum> k[kB], v[kB];
          batch.template load<Group>(k, keys, problem.dim);
          batch.template load<Group>(v, values, problem.value_dim, row.begin);
          // s = scale q.k + bias
          Sum s[kB];
          Sum next = largest;
          for (int b = 0; b < kB; ++b) {
            s[b] = scale * Group::sum(Group::dot_share(q, q_row, k[b], batch.row(keys, b),
                                                       batch.length(problem.dim, b))) +
                   bias_of(table, batch, b);
            if (!batch.has(b)) s[b] = nothing<Sum>();
            next = max(next, s[b]);
          }
          // out and total are sums of exp(s - shift); a NaN is never the largest, but enters both.
          const Sum shift = next == nothing<Sum>() ? Sum{0} : next;
          const Sum shrink = exp(largest - shift);
          total *= shrink;
          out.scale(shrink);
          for (int b = 0; b < kB; ++b) {
            const Sum p = exp(s[b] - shift);
            total += p;
            out.add_scaled(p, v[b]);
          }
          largest = next;
        });

        const bool empty = total == 0;
        Group::store(op.out.head(row.sample, row.head).row(row.token), problem.value_dim, row.begin,
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
  const Problem<Rank>& problem = op.problem;
  const Sum scale = static_cast<Sum>(problem.scale);
  for_each_row<Group>(
      problem.samples, problem.heads, problem.queries(), problem.value_dim, [&](const Row& row) {
        const int64_t head_kv = row.head / problem.group();
        const auto keys = op.k.head(row.sample, head_kv);
        const auto values = op.v.head(row.sample, head_kv);
        const auto key_tangents = op.dk.head(row.sample, head_kv);
        const auto value_tangents = op.dv.head(row.sample, head_kv);
        const Sum* table = table_of(op.bias, row.sample, row.head);
        const Sum* table_tangent = table_of(op.dbias, row.sample, row.head);
        const Element* q_row = op.q.head(row.sample, row.head).row(row.token);
        const Element* dq_row = op.dq.head(row.sample, row.head).row(row.token);
        const Sum lse = *op.lse.head(row.sample, row.head).row(row.token);

        // dout = sum p ds v + p dv - dlse sum p v
        Piece<Sum> changed, out;
        changed.clear();
        out.clear();
        Sum dlse = 0;
        const Neighborhood<Rank> seen = Sample<Rank>(problem, row.sample).keys_of(row.token);
        if (lse != nothing<Sum>()) {
          const Piece<Sum> q = Group::load(q_row, problem.dim);
          const Piece<Sum> dq = Group::load(dq_row, problem.dim);
          for_each_batch<Element>(seen, [&](const Batch<Element, Rank>& batch) {
            Piece<Sum> k[kB], dk[kB];
            batch.template load<Group>(k, keys, problem.dim);
            batch.template load<Group>(dk, key_tangents, problem.dim);
            Sum p[kB], ds[kB];
            for (int b = 0; b < kB; ++b) {
              const Element* k_row = batch.row(keys, b);
              const Element* dk_row = batch.row(key_tangents, b);
              const int64_t dim = batch.length(problem.dim, b);
              const Sum s = scale * Group::sum(Group::dot_share(q, q_row, k[b], k_row, dim)) +
                            bias_of(table, batch, b);
              ds[b] = scale * Group::sum(Group::dot_share(dq, dq_row, k[b], k_row, dim) +
                                         Group::dot_share(q, q_row, dk[b], dk_row, dim)) +
                      bias_of(table_tangent, batch, b);
              p[b] = batch.has(b) ? exp(s - lse) : Sum{0};
              dlse += batch.has(b) ? p[b] * ds[b] : Sum{0};
            }
            Piece<Sum> v[kB], dv[kB];
            batch.template load<Group>(v, values, problem.value_dim, row.begin);
            batch.template load<Group>(dv, value_tangents, problem.value_dim, row.begin);
            for (int b = 0; b < kB; ++b) {
              changed.add_scaled(p[b] * ds[b], v[b]);
              changed.add_scaled(p[b], dv[b]);
              out.add_scaled(p[b], v[b]);
            }
          });
          changed.add_scaled(-dlse, out);
        }
        Group::store(op.dout.head(row.sample, row.head).row(row.token), problem.value_dim,
                     row.begin, Sum{1}, changed);
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
  const Problem<Rank>& problem = op.problem;
  const Sum scale = static_cast<Sum>(problem.scale);
  for_each_row<Group>(
      problem.samples, problem.heads, problem.queries(), problem.dim, [&](const Row& row) {
        const int64_t head_kv = row.head / problem.group();
        const auto keys = op.k.head(row.sample, head_kv);
        const auto values = op.v.head(row.sample, head_kv);
        const Sum* table = table_of(op.bias, row.sample, row.head);
        const Element* q_row = op.q.head(row.sample, row.head).row(row.token);
        const Element* out_row = op.out.head(row.sample, row.head).row(row.token);
        const Element* ct_row = op.ct_out.head(row.sample, row.head).row(row.token);
        const Sum lse = *op.lse.head(row.sample, row.head).row(row.token);

        Piece<Sum> dq;
        dq.clear();
        Sum delta = 0;
        const Neighborhood<Rank> seen = Sample<Rank>(problem, row.sample).keys_of(row.token);
        if (!seen.empty() && lse != nothing<Sum>()) {
          const Piece<Sum> q = Group::load(q_row, problem.dim);
          const Piece<Sum> ct = Group::load(ct_row, problem.value_dim);
          delta = *op.ct_lse.head(row.sample, row.head).row(row.token) -
                  Group::sum(Group::dot_share(ct, ct_row, Group::load(out_row, problem.value_dim),
                                              out_row, problem.value_dim));
          for_each_batch<Element>(seen, [&](const Batch<Element, Rank>& batch) {
            Piece<Sum> k[kB], v[kB];
            batch.template load<Group>(k, keys, problem.dim);
            batch.template load<Group>(v, values, problem.value_dim);
            for (int b = 0; b < kB; ++b) {
              const Element* k_row = batch.row(keys, b);
              const int64_t dim = batch.length(problem.dim, b);
              const int64_t value_dim = batch.length(problem.value_dim, b);
              const Sum s = scale * Group::sum(Group::dot_share(q, q_row, k[b], k_row, dim)) +
                            bias_of(table, batch, b);
              const Sum dp =
                  Group::sum(Group::dot_share(ct, ct_row, v[b], batch.row(values, b), value_dim));
              const Sum ds = batch.has(b) ? exp(s - lse) * (dp + delta) : Sum{0};
              dq.add_scaled(ds, Group::piece_at(row.begin, k[b], k_row, dim));
            }
          });
        }
        Group::store(op.dq.head(row.sample, row.head).row(row.token), problem.dim, row.begin, scale,
                     dq);
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
  const Problem<Rank>& problem = op.problem;
  const Sum scale = static_cast<Sum>(problem.scale);
  const int64_t longest = geometry::max(problem.dim, problem.value_dim);
  for_each_row<Group>(
      problem.samples, problem.heads_kv, problem.keys(), longest, [&](const Row& row) {
        const Element* k_row = op.k.head(row.sample, row.head).row(row.token);
        const Element* v_row = op.v.head(row.sample, row.head).row(row.token);
        Piece<Sum> dk, dv;
        dk.clear();
        dv.clear();
        const Neighborhood<Rank> seen_by = Sample<Rank>(problem, row.sample).queries_of(row.token);
        if (!seen_by.empty()) {
          const Piece<Sum> k = Group::load(k_row, problem.dim);
          const Piece<Sum> v = Group::load(v_row, problem.value_dim);
          const int64_t first_head = row.head * problem.group();
          for (int64_t head = first_head; head < first_head + problem.group(); ++head) {
            const auto queries = op.q.head(row.sample, head);
            const auto out_cotangents = op.ct_out.head(row.sample, head);
            const auto lses = op.lse.head(row.sample, head);
            const auto deltas = op.delta.head(row.sample, head);
            const Sum* table = table_of(op.bias, row.sample, head);
            for_each_batch<Element>(seen_by, [&](const Batch<Element, Rank>& batch) {
              Piece<Sum> q[kB], ct[kB];
              batch.template load<Group>(q, queries, problem.dim);
              batch.template load<Group>(ct, out_cotangents, problem.value_dim);
              for (int b = 0; b < kB; ++b) {
                const Element* q_row = batch.row(queries, b);
                const Element* ct_row = batch.row(out_cotangents, b);
                const int64_t dim = batch.length(problem.dim, b);
                const int64_t value_dim = batch.length(problem.value_dim, b);
                const Sum lse = batch.has(b) ? *lses.row(batch.token(b)) : nothing<Sum>();
                const Sum s = scale * Group::sum(Group::dot_share(k, k_row, q[b], q_row, dim)) +
                              bias_of(table, batch, b);
                const Sum dp = Group::sum(Group::dot_share(v, v_row, ct[b], ct_row, value_dim));
                if (lse == nothing<Sum>()) continue;
                const Sum p = exp(s - lse);
                const Sum ds = p * (dp + *deltas.row(batch.token(b)));
                dv.add_scaled(p, Group::piece_at(row.begin, ct[b], ct_row, value_dim));
                dk.add_scaled(ds, Group::piece_at(row.begin, q[b], q_row, dim));
              }
            });
          }
        }
        Group::store(op.dk.head(row.sample, row.head).row(row.token), problem.dim, row.begin, scale,
                     dk);
        Group::store(op.dv.head(row.sample, row.head).row(row.token), problem.value_dim, row.begin,
                     Sum{1}, dv);
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
    const Problem<Rank>& problem = op.problem;
    const Element* k_row = op.k.head(sample, head / problem.group()).row(key);
    const Element* v_row = op.v.head(sample, head / problem.group()).row(key);
    const Sum qk = Group::sum(Group::dot_share(
        query.q, query.q_row, Group::load(k_row, problem.dim), k_row, problem.dim));
    const Sum dp = Group::sum(Group::dot_share(
        query.ct, query.ct_row, Group::load(v_row, problem.value_dim), v_row, problem.value_dim));
    const Sum s = static_cast<Sum>(problem.scale) * qk + op.bias.head(sample, head).data[bias];
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
  return with_lanes<Element>(geometry::max(p.dim, p.value_dim), [&](auto group) {
    using Group = decltype(group);
    return launch_rows<Group>(stream, forward_kernel<Group, Element, Rank>, p.samples, p.heads,
                              p.queries(), p.value_dim, op);
  });
}

template <typename Element, int Rank>
cudaError_t run_operation(cudaStream_t stream, const TangentOperands<Element, Rank>& op) {
  const Problem<Rank>& p = op.problem;
  return with_lanes<Element>(geometry::max(p.dim, p.value_dim), [&](auto group) {
    using Group = decltype(group);
    return launch_rows<Group>(stream, tangent_kernel<Group, Element, Rank>, p.samples, p.heads,
                              p.queries(), p.value_dim, op);
  });
}

template <typename Element, int Rank>
cudaError_t run_operation(cudaStream_t stream, const BackwardOperands<Element, Rank>& op) {
  const Problem<Rank>& p = op.problem;
  const int64_t longest = geometry::max(p.dim, p.value_dim);
  return with_lanes<Element>(longest, [&](auto group) {
    using Group = decltype(group);
    cudaError_t error = launch_rows<Group>(stream, backward_queries_kernel<Group, Element, Rank>,
                                           p.samples, p.heads, p.queries(), p.dim, op);
    if (error != cudaSuccess) return error;
    error = launch_rows<Group>(stream, backward_keys_kernel<Group, Element, Rank>, p.samples,
                               p.heads_kv, p.keys(), longest, op);
    if (error != cudaSuccess || !op.has_bias()) return error;
    return launch_tables(stream, backward_bias_kernel<Group, Element, Rank>, p, op);
  });
}

}  // namespace jax_natten::naive
