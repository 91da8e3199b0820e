// The unfused kernels: products with a query's window as a row of slots, and their transposes.
//
//   qk       attn[i, slot of j] = query[i] . key[j]
//   av       out[i] = sum_j attn[i, slot of j] value[j]
//   inverse  out[j] = sum over the group's heads and the i that see j, attn[i, slot of j] x[i]
//   spread   attn[i, slot of j] = table[j - i]
//   collect  table[j - i] = sum_i attn[i, slot of j]
//
// Slots without a key are written as 0 and never read; nothing that a row holds matters where the
// frame excludes it. All sums are in Accumulator<Element>.
#pragma once

#include <vector>

#include "cpu/number.h"
#include "cpu/operands.h"
#include "cpu/parallel.h"
#include "cpu/problem.h"
#include "cpu/vector.h"

namespace jax_natten {

namespace unfused {

template <typename Element, int Rank>
void qk_tokens(const QkOperands<Element, Rank>& op, int64_t sample_index, int64_t head,
               int64_t begin, int64_t end) {
  const Problem<Rank>& problem = op.problem;
  const Sample<Rank> sample(problem, sample_index);
  const auto queries = op.query.head(sample_index, head);
  const auto keys = op.key.head(sample_index, head / problem.group());
  const auto attns = op.attn.head(sample_index, head);
  std::vector<Accumulator<Element>> query(static_cast<size_t>(problem.dim));
  for (int64_t i = begin; i < end; ++i) {
    Element* attn = attns.row(i);
    fill_row(attn, Element{}, problem.slots());
    load_row(query.data(), queries.row(i), problem.dim);
    sample.keys_of(i).for_each_run([&](const Run<Rank>& run) {
      for (int64_t m = 0; m < run.count; ++m) {
        const Element* key = keys.row(run.token + m * run.token_step);
        attn[run.slot + m] = narrow(dot(query.data(), key, problem.dim), Element{});
      }
    });
  }
}

template <typename Element, int Rank>
void av_tokens(const AvOperands<Element, Rank>& op, int64_t sample_index, int64_t head,
               int64_t begin, int64_t end) {
  using Sum = Accumulator<Element>;
  const Problem<Rank>& problem = op.problem;
  const Sample<Rank> sample(problem, sample_index);
  const auto attns = op.attn.head(sample_index, head);
  const auto values = op.value.head(sample_index, head / problem.group());
  const auto outs = op.out.head(sample_index, head);
  std::vector<Sum> out(static_cast<size_t>(problem.value_dim));
  for (int64_t i = begin; i < end; ++i) {
    const Element* attn = attns.row(i);
    fill_row(out.data(), Sum{0}, problem.value_dim);
    sample.keys_of(i).for_each_run([&](const Run<Rank>& run) {
      for (int64_t m = 0; m < run.count; ++m) {
        const Element* value = values.row(run.token + m * run.token_step);
        add_scaled(out.data(), widen(attn[run.slot + m]), value, problem.value_dim);
      }
    });
    store_scaled(outs.row(i), Sum{1}, out.data(), problem.value_dim);
  }
}

template <typename Element, int Rank>
void inverse_tokens(const InverseOperands<Element, Rank>& op, int64_t sample_index, int64_t head_kv,
                    int64_t begin, int64_t end) {
  using Sum = Accumulator<Element>;
  constexpr int kLast = Rank - 1;
  const Problem<Rank>& problem = op.problem;
  const Sample<Rank> sample(problem, sample_index);
  const auto outs = op.out.head(sample_index, head_kv);
  std::vector<Sum> out(static_cast<size_t>(problem.value_dim));
  std::vector<int64_t> last_slot;  // the last axis' share of the slot, by query
  for (int64_t j = begin; j < end; ++j) {
    fill_row(out.data(), Sum{0}, problem.value_dim);
    const Neighborhood<Rank> neighborhood = sample.queries_of(j);
    last_slot.resize(static_cast<size_t>(neighborhood.axis[kLast].count));
    for (size_t m = 0; m < last_slot.size(); ++m) {
      last_slot[m] = sample.slot_in_axis(kLast, neighborhood, static_cast<int64_t>(m));
    }
    for (int64_t head = head_kv * problem.group(); head < (head_kv + 1) * problem.group(); ++head) {
      const auto attns = op.attn.head(sample_index, head);
      const auto xs = op.x.head(sample_index, head);
      neighborhood.for_each_run([&](const Run<Rank>& run) {
        int64_t slot = 0;
        for (int a = 0; a < kLast; ++a) {
          slot += sample.slot_in_axis(a, neighborhood, run.ordinal[a]);
        }
        for (int64_t m = 0; m < run.count; ++m) {
          const int64_t i = run.token + m * run.token_step;
          const Element weight = attns.row(i)[slot + last_slot[m]];
          add_scaled(out.data(), widen(weight), xs.row(i), problem.value_dim);
        }
      });
    }
    store_scaled(outs.row(j), Sum{1}, out.data(), problem.value_dim);
  }
}

template <typename Element, int Rank>
void spread_tokens(const SpreadOperands<Element, Rank>& op, int64_t sample_index, int64_t head,
                   int64_t begin, int64_t end) {
  const Problem<Rank>& problem = op.problem;
  const Sample<Rank> sample(problem, sample_index);
  const Element* table = op.table.head(sample_index, head).data;
  const auto attns = op.attn.head(sample_index, head);
  for (int64_t i = begin; i < end; ++i) {
    Element* attn = attns.row(i);
    fill_row(attn, Element{}, problem.slots());
    sample.keys_of(i).for_each_run([&](const Run<Rank>& run) {
      for (int64_t m = 0; m < run.count; ++m) {
        attn[run.slot + m] = table[run.bias + m * run.bias_step];
      }
    });
  }
}

// One task owns the whole table, so `begin` and `end` span all tokens.
template <typename Element, int Rank>
void collect_tokens(const CollectOperands<Element, Rank>& op, int64_t sample_index, int64_t head,
                    int64_t begin, int64_t end) {
  using Sum = Accumulator<Element>;
  const Problem<Rank>& problem = op.problem;
  const Sample<Rank> sample(problem, sample_index);
  const auto attns = op.attn.head(sample_index, head);
  std::vector<Sum> table(static_cast<size_t>(problem.biases()));
  for (int64_t i = begin; i < end; ++i) {
    const Element* attn = attns.row(i);
    sample.keys_of(i).for_each_run([&](const Run<Rank>& run) {
      for (int64_t m = 0; m < run.count; ++m) {
        table[run.bias + m * run.bias_step] += widen(attn[run.slot + m]);
      }
    });
  }
  store_scaled(op.table.head(sample_index, head).data, Sum{1}, table.data(), problem.biases());
}

}  // namespace unfused

template <typename Element, int Rank>
Job job(const QkOperands<Element, Rank>& op) {
  const Problem<Rank>& p = op.problem;
  const double flops = 2 * static_cast<double>(p.slots()) * static_cast<double>(p.dim);
  return {over_tokens(p.samples, p.heads, p.queries(), flops, false,
                      [op](int64_t sample, int64_t head, int64_t begin, int64_t end) {
                        unfused::qk_tokens(op, sample, head, begin, end);
                      })};
}

template <typename Element, int Rank>
Job job(const AvOperands<Element, Rank>& op) {
  const Problem<Rank>& p = op.problem;
  const double flops = 2 * static_cast<double>(p.slots()) * static_cast<double>(p.value_dim);
  return {over_tokens(p.samples, p.heads, p.queries(), flops, false,
                      [op](int64_t sample, int64_t head, int64_t begin, int64_t end) {
                        unfused::av_tokens(op, sample, head, begin, end);
                      })};
}

template <typename Element, int Rank>
Job job(const InverseOperands<Element, Rank>& op) {
  const Problem<Rank>& p = op.problem;
  const double flops = 2 * static_cast<double>(p.slots()) * static_cast<double>(p.value_dim) *
                       static_cast<double>(p.group());
  return {over_tokens(p.samples, p.heads_kv, p.keys(), flops, false,
                      [op](int64_t sample, int64_t head, int64_t begin, int64_t end) {
                        unfused::inverse_tokens(op, sample, head, begin, end);
                      })};
}

template <typename Element, int Rank>
Job job(const SpreadOperands<Element, Rank>& op) {
  const Problem<Rank>& p = op.problem;
  return {over_tokens(p.samples, p.heads, p.queries(), static_cast<double>(p.slots()), false,
                      [op](int64_t sample, int64_t head, int64_t begin, int64_t end) {
                        unfused::spread_tokens(op, sample, head, begin, end);
                      })};
}

template <typename Element, int Rank>
Job job(const CollectOperands<Element, Rank>& op) {
  const Problem<Rank>& p = op.problem;
  return {over_tokens(p.samples, p.heads, p.queries(), static_cast<double>(p.slots()), true,
                      [op](int64_t sample, int64_t head, int64_t begin, int64_t end) {
                        unfused::collect_tokens(op, sample, head, begin, end);
                      })};
}

}  // namespace jax_natten
