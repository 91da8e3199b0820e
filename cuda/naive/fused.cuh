// The naive fused kernels: attention over the neighborhood, its tangent and its gradients. The
// formulas are those of cpu/fused.h.
//
// A group of lanes owns a few queries, or keys for their gradients, and walks over their neighbors
// in batches; softmax is online. A query without a key (beyond its count, or all its logits -inf)
// has out 0, lse -inf and no derivative.
#pragma once

#include "cuda/naive/naive.h"
#include "cuda/naive/rows.cuh"
#include "cuda/naive/softmax.cuh"
#include "cuda/naive/table.cuh"

namespace jax_natten::naive {

inline constexpr Shape kForward{4, 4, 2};
inline constexpr Shape kTangent{4, 2, 2};
inline constexpr Shape kBackwardQueries{4, 2, 2};
inline constexpr Shape kBackwardKeys{2, 4, 2};
inline constexpr Shape kBackwardBias{1, 1, 1};

// The biases of the lane's own pairs.
template <typename Group, int Rank>
__device__ typename Group::Own biases_of(const Tensor<const typename Group::Sum>& tables,
                                         int64_t sample, int64_t head,
                                         const Walk<Group, Rank>& walk) {
  typename Group::Own biases{};
  if (tables.data == nullptr) return biases;
  for (int o = 0; o < Group::kOwn; ++o) {
    if (walk.sees(o)) biases.value[o] = tables.head(sample, head).data[walk.bias(o)];
  }
  return biases;
}

template <typename Group, typename Element, int Rank>
__global__ void __launch_bounds__(kThreads, kForward.blocks)
    forward_kernel(const __grid_constant__ ForwardOperands<Element, Rank> op) {
  using Sum = Accumulator<Element>;
  const Problem<Rank>& p = op.problem;
  const Sum scale = static_cast<Sum>(p.scale);
  const Blocks<Group::kRows> blocks(p, p.query_shape);
  for_each_block<Group>(blocks, p.samples, p.heads, p.value_dim, [&](const Rows<Group>& rows) {
    const int64_t head_kv = rows.head / p.group();
    const Held q(rows, op.q.head(rows.sample, rows.head), p.dim, scale);
    Softmax<Group> softmax;
    Piece<Sum> out[Group::kRows]{};
    const Neighborhood<Rank> seen = Sample<Rank>(p, rows.sample).keys_of(rows.token(0));
    Walk<Group, Rank> walk(rows, seen);
    Batch k(walk, op.k.head(rows.sample, head_kv), p.dim);
    Batch v(walk, op.v.head(rows.sample, head_kv), p.value_dim, rows.begin);
    walk.for_each_batch(
        [&] {
          const typename Group::Own bias = biases_of(op.bias, rows.sample, rows.head, walk);
          // s = scale q.k + bias
          typename Group::Own s = products(q, k);
          for (int o = 0; o < Group::kOwn; ++o) {
            s.value[o] = walk.sees(o) ? s.value[o] + bias.value[o] : nothing<Sum>();
          }
          add_weighted(out, softmax.weights(s, out), v, rows.begin);
        },
        k, v);

    const Sum total = softmax.sum();
    const bool any = total != 0;
    store(rows, op.out.head(rows.sample, rows.head), p.value_dim, any, 1 / total, out);
    if (Group::lane() < Group::kRows && rows.begin == 0) {
      *op.lse.head(rows.sample, rows.head).row(rows.token(0)) =
          any ? softmax.shift() + log(total) : nothing<Sum>();
    }
  });
}

template <typename Group, typename Element, int Rank>
__global__ void __launch_bounds__(kThreads, kTangent.blocks)
    tangent_kernel(const __grid_constant__ TangentOperands<Element, Rank> op) {
  using Sum = Accumulator<Element>;
  const Problem<Rank>& p = op.problem;
  const Sum scale = static_cast<Sum>(p.scale);
  const Blocks<Group::kRows> blocks(p, p.query_shape);
  for_each_block<Group>(blocks, p.samples, p.heads, p.value_dim, [&](const Rows<Group>& rows) {
    const int64_t head_kv = rows.head / p.group();
    const Held q(rows, op.q.head(rows.sample, rows.head), p.dim, scale);
    const Held dq(rows, op.dq.head(rows.sample, rows.head), p.dim, scale);
    const Sum lse = *op.lse.head(rows.sample, rows.head).row(rows.token(0));

    // dout = sum (p ds v + p dv) - dlse sum p v
    Sum dlse = 0;
    Piece<Sum> changed[Group::kRows]{}, out[Group::kRows]{};
    const Neighborhood<Rank> seen = Sample<Rank>(p, rows.sample).keys_of(rows.token(0));
    Walk<Group, Rank> walk(rows, seen, lse != nothing<Sum>());
    Batch k(walk, op.k.head(rows.sample, head_kv), p.dim);
    Batch dk(walk, op.dk.head(rows.sample, head_kv), p.dim);
    Batch v(walk, op.v.head(rows.sample, head_kv), p.value_dim, rows.begin);
    Batch dv(walk, op.dv.head(rows.sample, head_kv), p.value_dim, rows.begin);
    walk.for_each_batch(
        [&] {
          const typename Group::Own bias = biases_of(op.bias, rows.sample, rows.head, walk);
          const typename Group::Own dbias = biases_of(op.dbias, rows.sample, rows.head, walk);
          typename Group::Own weight = products(q, k);
          typename Group::Pairs shares{};
          add_products(shares, dq, k);
          add_products(shares, q, dk);
          typename Group::Own change = Group::sum(shares);
          for (int o = 0; o < Group::kOwn; ++o) {
            const Sum s = weight.value[o] + bias.value[o];
            const Sum ds = change.value[o] + dbias.value[o];
            weight.value[o] = walk.sees(o) ? exp(s - lse) : Sum{0};
            change.value[o] = walk.sees(o) ? weight.value[o] * ds : Sum{0};
            dlse += change.value[o];
          }
          add_weighted(changed, change, v, rows.begin);
          add_weighted(out, weight, v, rows.begin);
          add_weighted(changed, weight, dv, rows.begin);
        },
        k, dk, v, dv);

    dlse = Group::over_row(dlse, [](Sum a, Sum b) { return a + b; });
    for (int i = 0; i < Group::kRows; ++i) {
      changed[i].add_scaled(-Group::of_row(dlse, i), out[i]);
    }
    store(rows, op.dout.head(rows.sample, rows.head), p.value_dim, walk.sees_any(), Sum{1},
          changed);
    if (Group::lane() < Group::kRows && rows.begin == 0) {
      *op.dlse.head(rows.sample, rows.head).row(rows.token(0)) = dlse;
    }
  });
}

// delta and dq.
template <typename Group, typename Element, int Rank>
__global__ void __launch_bounds__(kThreads, kBackwardQueries.blocks)
    backward_queries_kernel(const __grid_constant__ BackwardOperands<Element, Rank> op) {
  using Sum = Accumulator<Element>;
  const Problem<Rank>& p = op.problem;
  const Sum scale = static_cast<Sum>(p.scale);
  const Blocks<Group::kRows> blocks(p, p.query_shape);
  for_each_block<Group>(blocks, p.samples, p.heads, p.dim, [&](const Rows<Group>& rows) {
    const int64_t head_kv = rows.head / p.group();
    const Held q(rows, op.q.head(rows.sample, rows.head), p.dim, scale);
    const Held ct(rows, op.ct_out.head(rows.sample, rows.head), p.value_dim);
    const Sum lse = *op.lse.head(rows.sample, rows.head).row(rows.token(0));
    const Neighborhood<Rank> seen = Sample<Rank>(p, rows.sample).keys_of(rows.token(0));
    Walk<Group, Rank> walk(rows, seen, lse != nothing<Sum>());

    const Sum product = product_with(ct, op.out.head(rows.sample, rows.head));
    const Sum delta = walk.sees_any()
                          ? *op.ct_lse.head(rows.sample, rows.head).row(rows.token(0)) - product
                          : Sum{0};
    Piece<Sum> dq[Group::kRows]{};
    Batch k(walk, op.k.head(rows.sample, head_kv), p.dim);
    Batch v(walk, op.v.head(rows.sample, head_kv), p.value_dim);
    walk.for_each_batch(
        [&] {
          const typename Group::Own bias = biases_of(op.bias, rows.sample, rows.head, walk);
          typename Group::Own ds = products(q, k);
          const typename Group::Own dp = products(ct, v);
          for (int o = 0; o < Group::kOwn; ++o) {
            const Sum s = ds.value[o] + bias.value[o];
            ds.value[o] = walk.sees(o) ? exp(s - lse) * (dp.value[o] + delta) : Sum{0};
          }
          add_weighted(dq, ds, k, rows.begin);
        },
        k, v);

    store(rows, op.dq.head(rows.sample, rows.head), p.dim, walk.sees_any(), scale, dq);
    if (Group::lane() < Group::kRows && rows.begin == 0) {
      *op.delta.head(rows.sample, rows.head).row(rows.token(0)) = delta;
    }
  });
}

// dk and dv of the keys. Reads delta.
template <typename Group, typename Element, int Rank>
__global__ void __launch_bounds__(kThreads, kBackwardKeys.blocks)
    backward_keys_kernel(const __grid_constant__ BackwardOperands<Element, Rank> op) {
  using Sum = Accumulator<Element>;
  const Problem<Rank>& p = op.problem;
  const Sum scale = static_cast<Sum>(p.scale);
  const Blocks<Group::kRows> blocks(p, p.key_shape);
  const int64_t longest = geometry::max(p.dim, p.value_dim);
  for_each_block<Group>(blocks, p.samples, p.heads_kv, longest, [&](const Rows<Group>& rows) {
    const Held k(rows, op.k.head(rows.sample, rows.head), p.dim, scale);
    const Held v(rows, op.v.head(rows.sample, rows.head), p.value_dim);
    Piece<Sum> dk[Group::kRows]{}, dv[Group::kRows]{};
    const Neighborhood<Rank> seen_by = Sample<Rank>(p, rows.sample).queries_of(rows.token(0));
    Walk<Group, Rank> walk(rows, seen_by);
    for (int64_t of_group = 0; of_group < p.group(); ++of_group) {
      const int64_t head = rows.head * p.group() + of_group;
      const auto lses = op.lse.head(rows.sample, head);
      const auto deltas = op.delta.head(rows.sample, head);
      Batch q(walk, op.q.head(rows.sample, head), p.dim);
      Batch ct(walk, op.ct_out.head(rows.sample, head), p.value_dim);
      walk.for_each_batch(
          [&] {
            const typename Group::Own bias = biases_of(op.bias, rows.sample, head, walk);
            typename Group::Own lse, delta;
            for (int o = 0; o < Group::kOwn; ++o) {
              const int64_t token = walk.token(Group::own(o));
              lse.value[o] = walk.sees(o) ? *lses.row(token) : nothing<Sum>();
              delta.value[o] = walk.sees(o) ? *deltas.row(token) : Sum{0};
            }
            typename Group::Own ds = products(v, ct);
            typename Group::Own weight = products(k, q);
            for (int o = 0; o < Group::kOwn; ++o) {
              const bool counts = lse.value[o] != nothing<Sum>();
              const Sum s = weight.value[o] + bias.value[o];
              weight.value[o] = counts ? exp(s - lse.value[o]) : Sum{0};
              ds.value[o] = counts ? weight.value[o] * (ds.value[o] + delta.value[o]) : Sum{0};
            }
            add_weighted(dv, weight, ct, rows.begin);
            add_weighted(dk, ds, q, rows.begin);
          },
          q, ct);
    }
    store(rows, op.dk.head(rows.sample, rows.head), p.dim, walk.sees_any(), scale, dk);
    store(rows, op.dv.head(rows.sample, rows.head), p.value_dim, walk.sees_any(), Sum{1}, dv);
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
  return with_lanes<Element, kForward>(p.dim, p.value_dim, [&](auto group) {
    using Group = decltype(group);
    return launch_rows<Group>(stream, forward_kernel<Group, Element, Rank>, {p, p.query_shape},
                              p.samples, p.heads, p.value_dim, op);
  });
}

template <typename Element, int Rank>
cudaError_t run_operation(cudaStream_t stream, const TangentOperands<Element, Rank>& op) {
  const Problem<Rank>& p = op.problem;
  return with_lanes<Element, kTangent>(p.dim, p.value_dim, [&](auto group) {
    using Group = decltype(group);
    return launch_rows<Group>(stream, tangent_kernel<Group, Element, Rank>, {p, p.query_shape},
                              p.samples, p.heads, p.value_dim, op);
  });
}

template <typename Element, int Rank>
cudaError_t run_operation(cudaStream_t stream, const BackwardOperands<Element, Rank>& op) {
  const Problem<Rank>& p = op.problem;
  cudaError_t error = with_lanes<Element, kBackwardQueries>(p.dim, p.value_dim, [&](auto group) {
    using Group = decltype(group);
    return launch_rows<Group>(stream, backward_queries_kernel<Group, Element, Rank>,
                              {p, p.query_shape}, p.samples, p.heads, p.dim, op);
  });
  if (error != cudaSuccess) return error;
  error = with_lanes<Element, kBackwardKeys>(p.dim, p.value_dim, [&](auto group) {
    using Group = decltype(group);
    return launch_rows<Group>(stream, backward_keys_kernel<Group, Element, Rank>, {p, p.key_shape},
                              p.samples, p.heads_kv, geometry::max(p.dim, p.value_dim), op);
  });
  if (error != cudaSuccess || !op.has_bias()) return error;
  return with_lanes<Element, kBackwardBias>(p.dim, p.value_dim, [&](auto group) {
    return launch_tables(stream, backward_bias_kernel<decltype(group), Element, Rank>, p, op);
  });
}

}  // namespace jax_natten::naive
