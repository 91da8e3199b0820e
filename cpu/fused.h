// The fused kernels: attention over the neighborhood, its tangent and its gradients.
//
// With s = scale q.k + bias and p = exp(s - lse), per query over the keys it sees:
//   forward   lse = log sum exp(s),  out = sum p v
//   tangent   ds = scale (dq.k + q.dk) + dbias,  dlse = sum p ds,
//             dout = sum p (ds - dlse) v + p dv
//   backward  ds = p (ct_out.v + delta),  delta = ct_lse - ct_out.out,
//             dq = scale sum ds k,  dbias[offset] = sum ds,
//             dk = scale sum ds q,  dv = sum p ct_out  (over the queries that see the key)
//
// A query without a key (beyond its count, or all its logits -inf) has out 0, lse -inf and no
// derivative. Nothing that a row holds matters where the frame excludes it. All sums are in
// Accumulator<Element>.
#pragma once

#include <cmath>
#include <limits>
#include <vector>

#include "cpu/number.h"
#include "cpu/operands.h"
#include "cpu/parallel.h"
#include "cpu/problem.h"
#include "cpu/targets.h"
#include "cpu/vector.h"

namespace jax_natten {

namespace fused {

template <typename T>
inline constexpr T kNothing = -std::numeric_limits<T>::infinity();

template <typename T>
std::vector<T> row_buffer(int64_t size) {
  return std::vector<T>(static_cast<size_t>(size));
}

// The bias of a run's m-th neighbor.
template <typename Sum, int Rank>
Sum bias_of(const Sum* table, const Run<Rank>& run, int64_t m) {
  return table == nullptr ? Sum{0} : table[run.bias + m * run.bias_step];
}

template <typename Sum>
const Sum* table_of(const Tensor<const Sum>& tables, int64_t sample, int64_t head) {
  return tables.data == nullptr ? nullptr : tables.head(sample, head).data;
}

template <typename Element, int Rank>
void tangent_tokens(const TangentOperands<Element, Rank>& op, int64_t sample_index, int64_t head,
                    int64_t begin, int64_t end) {
  using Sum = Accumulator<Element>;
  const Problem<Rank>& problem = op.problem;
  const Sample<Rank> sample(problem, sample_index);
  const int64_t head_kv = head / problem.group();
  const auto queries = op.q.head(sample_index, head);
  const auto keys = op.k.head(sample_index, head_kv);
  const auto values = op.v.head(sample_index, head_kv);
  const Sum* table = table_of(op.bias, sample_index, head);
  const auto lses = op.lse.head(sample_index, head);
  const auto query_tangents = op.dq.head(sample_index, head);
  const auto key_tangents = op.dk.head(sample_index, head_kv);
  const auto value_tangents = op.dv.head(sample_index, head_kv);
  const Sum* table_tangent = table_of(op.dbias, sample_index, head);
  const auto out_tangents = op.dout.head(sample_index, head);
  const auto lse_tangents = op.dlse.head(sample_index, head);
  const Sum scale = static_cast<Sum>(problem.scale);

  auto q = row_buffer<Sum>(problem.dim);
  auto dq = row_buffer<Sum>(problem.dim);
  auto dout = row_buffer<Sum>(problem.value_dim);
  auto weights = row_buffer<Sum>(problem.most_keys());
  auto tangents = row_buffer<Sum>(problem.most_keys());
  for (int64_t i = begin; i < end; ++i) {
    fill_row(dout.data(), Sum{0}, problem.value_dim);
    Sum dlse = 0;
    const Neighborhood<Rank> neighborhood = sample.keys_of(i);
    const Sum lse = *lses.row(i);
    if (!neighborhood.empty() && lse != kNothing<Sum>) {
      load_row(q.data(), queries.row(i), problem.dim);
      load_row(dq.data(), query_tangents.row(i), problem.dim);
      int64_t n = 0;
      neighborhood.for_each_run([&](const Run<Rank>& run) {
        for (int64_t m = 0; m < run.count; ++m, ++n) {
          const int64_t j = run.token + m * run.token_step;
          const Sum s = scale * dot(q.data(), keys.row(j), problem.dim) + bias_of(table, run, m);
          weights[n] = std::exp(s - lse);
          tangents[n] = scale * (dot(dq.data(), keys.row(j), problem.dim) +
                                 dot(q.data(), key_tangents.row(j), problem.dim)) +
                        bias_of(table_tangent, run, m);
          dlse += weights[n] * tangents[n];
        }
      });
      n = 0;
      neighborhood.for_each_run([&](const Run<Rank>& run) {
        for (int64_t m = 0; m < run.count; ++m, ++n) {
          const int64_t j = run.token + m * run.token_step;
          const Sum p = weights[n];
          add_scaled(dout.data(), p * (tangents[n] - dlse), values.row(j), problem.value_dim);
          add_scaled(dout.data(), p, value_tangents.row(j), problem.value_dim);
        }
      });
    }
    store_scaled(out_tangents.row(i), Sum{1}, dout.data(), problem.value_dim);
    *lse_tangents.row(i) = dlse;
  }
}

// Useful operations of one query in one matrix product of each kind, q.k and p v.
template <int Rank>
double product_flops(const Problem<Rank>& problem) {
  const auto pairs = static_cast<double>(problem.most_keys());
  return 2 * pairs * static_cast<double>(problem.dim + problem.value_dim);
}

}  // namespace fused

template <typename Element, int Rank>
Job job(const ForwardOperands<Element, Rank>& op) {
  return job_on_target<ForwardArrays<Element>>(call_of(op));
}

template <typename Element, int Rank>
Job job(const TangentOperands<Element, Rank>& op) {
  const Problem<Rank>& p = op.problem;
  return {over_tokens(p.samples, p.heads, p.queries(), 2.5 * fused::product_flops(p), false,
                      [op](int64_t sample, int64_t head, int64_t begin, int64_t end) {
                        fused::tangent_tokens(op, sample, head, begin, end);
                      })};
}

template <typename Element, int Rank>
Job job(const BackwardOperands<Element, Rank>& op) {
  return job_on_target<BackwardArrays<Element>>(call_of(op));
}

}  // namespace jax_natten
