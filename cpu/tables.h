// Tables of biases and rows of slots: a bias for every pair, and its transpose. They only move
// memory, one query at a time.
//
//   spread   attn[i, slot of j] = table[j - i]
//   collect  table[j - i] = sum_i attn[i, slot of j]
//
// Slots without a key are written as 0 and never read; nothing that a row holds matters where the
// frame excludes it. All sums are in Accumulator<Element>.
#pragma once

#include <algorithm>
#include <vector>

#include "cpu/number.h"
#include "cpu/operands.h"
#include "cpu/parallel.h"
#include "cpu/problem.h"

namespace jax_natten {

namespace tables {

template <typename Element, int Rank>
void spread_tokens(const SpreadOperands<Element, Rank>& op, int64_t sample_index, int64_t head,
                   int64_t begin, int64_t end) {
  const Problem<Rank>& problem = op.problem;
  const Sample<Rank> sample(problem, sample_index);
  const Element* table = op.table.head(sample_index, head).data;
  const auto attns = op.attn.head(sample_index, head);
  for (int64_t i = begin; i < end; ++i) {
    Element* attn = attns.row(i);
    std::fill_n(attn, problem.slots(), Element{});
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
  Element* result = op.table.head(sample_index, head).data;
  for (const Sum& sum : table) *result++ = narrow(sum, Element{});
}

}  // namespace tables

template <typename Element, int Rank>
Job job(const SpreadOperands<Element, Rank>& op) {
  const Problem<Rank>& p = op.problem;
  return {over_tokens(p.samples, p.heads, p.queries(), static_cast<double>(p.slots()), false,
                      [op](int64_t sample, int64_t head, int64_t begin, int64_t end) {
                        tables::spread_tokens(op, sample, head, begin, end);
                      })};
}

template <typename Element, int Rank>
Job job(const CollectOperands<Element, Rank>& op) {
  const Problem<Rank>& p = op.problem;
  return {over_tokens(p.samples, p.heads, p.queries(), static_cast<double>(p.slots()), true,
                      [op](int64_t sample, int64_t head, int64_t begin, int64_t end) {
                        tables::collect_tokens(op, sample, head, begin, end);
                      })};
}

}  // namespace jax_natten
