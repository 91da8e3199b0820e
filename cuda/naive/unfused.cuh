// The naive unfused kernels: products with a query's window as a row of slots, their transposes,
// and the pair that spreads a table of biases over slots and collects it. The formulas are those
// of cpu/unfused.h.
//
// Slots without a key are written as 0 and never read.
#pragma once

#include "cuda/naive/naive.h"
#include "cuda/naive/row.cuh"
#include "cuda/naive/table.cuh"

namespace jax_natten::naive {

template <typename Group, typename Element, int Rank>
__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor)
    qk_kernel(const __grid_constant__ QkOperands<Element, Rank> op) {
  using Sum = Accumulator<Element>;
  constexpr int kB = kBatch<Element>;
  const Problem<Rank>& p = op.problem;
  const int64_t slots = p.slots();
  for_each_row<Group>(p.samples, p.heads, p.queries(), 1, [&](const Row& row) {
    const auto keys = op.key.head(row.sample, row.head / p.group());
    const Element* q_row = op.query.head(row.sample, row.head).row(row.token);
    const Piece<Sum> q = Group::load(q_row, p.dim);
    Element* attn = op.attn.head(row.sample, row.head).row(row.token);
    const Neighborhood<Rank> seen = Sample<Rank>(p, row.sample).keys_of(row.token);
    if (seen.count() < slots) {
      for (int64_t slot = Group::lane(); slot < slots; slot += Group::kCount) {
        attn[slot] = Element{};
      }
    }
    __syncwarp();  // before other lanes write some of them
    for (WalkOf<Element, Rank> walk(seen); walk.goes_on(); walk.advance()) {
      Piece<Sum> k[kB];
      load_batch<Group>(k, walk, keys, p.dim);
      for (int b = 0; b < kB; ++b) {
        const Element* k_row = walk.row(keys, b);
        const Sum product = Group::sum(Group::dot_share(q, q_row, k[b], k_row, p.dim, walk.has(b)));
        if (Group::lane() == b && walk.has(b)) {
          attn[walk.slot + b] = device::narrow(product, Element{});
        }
      }
    }
  });
}

template <typename Group, typename Element, int Rank>
__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor)
    av_kernel(const __grid_constant__ AvOperands<Element, Rank> op) {
  using Sum = Accumulator<Element>;
  constexpr int kB = kBatch<Element>;
  const Problem<Rank>& p = op.problem;
  for_each_row<Group>(p.samples, p.heads, p.queries(), p.value_dim, [&](const Row& row) {
    const auto values = op.value.head(row.sample, row.head / p.group());
    const Element* attn = op.attn.head(row.sample, row.head).row(row.token);
    Piece<Sum> out;
    out.clear();
    const Neighborhood<Rank> seen = Sample<Rank>(p, row.sample).keys_of(row.token);
    for (WalkOf<Element, Rank> walk(seen); walk.goes_on(); walk.advance()) {
      Piece<Sum> v[kB];
      load_batch<Group>(v, walk, values, p.value_dim, row.begin);
      Sum weights[kB];
      for (int b = 0; b < kB; ++b) {
        weights[b] = walk.has(b) ? device::widen(attn[walk.slot + b]) : Sum{0};
      }
      for (int b = 0; b < kB; ++b) out.add_scaled(weights[b], v[b]);
    }
    Group::store(op.out.head(row.sample, row.head).row(row.token), p.value_dim, row.begin, Sum{1},
                 out);
  });
}

template <typename Group, typename Element, int Rank>
__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor)
    inverse_kernel(const __grid_constant__ InverseOperands<Element, Rank> op) {
  using Sum = Accumulator<Element>;
  constexpr int kB = kBatch<Element>, kLast = Rank - 1;
  const Problem<Rank>& p = op.problem;
  for_each_row<Group>(p.samples, p.heads_kv, p.keys(), p.value_dim, [&](const Row& row) {
    const Sample<Rank> sample(p, row.sample);
    const Neighborhood<Rank> seen_by = sample.queries_of(row.token);
    Piece<Sum> out;
    out.clear();
    for (WalkOf<Element, Rank> walk(seen_by); walk.goes_on(); walk.advance()) {
      // The key's slot in each query's window; a lane computes that of one query.
      int64_t slot = 0;
      if (walk.left > 0) {
        for (int a = 0; a < kLast; ++a) {
          slot += sample.slot_in_axis(a, seen_by, walk.ordinal[a]);
        }
        const int own = static_cast<int>(geometry::min(Group::lane() % kB, walk.left - 1));
        const int64_t m = seen_by.axis[kLast].count - walk.left + own;
        slot += sample.slot_in_axis(kLast, seen_by, m);
      }
      int64_t slots[kB];
      for (int b = 0; b < kB; ++b) slots[b] = __shfl_sync(kAllLanes, slot, b, Group::kCount);
      for (int64_t of_group = 0; of_group < p.group(); ++of_group) {
        const int64_t head = row.head * p.group() + of_group;
        const auto attns = op.attn.head(row.sample, head);
        Piece<Sum> x[kB];
        load_batch<Group>(x, walk, op.x.head(row.sample, head), p.value_dim, row.begin);
        Sum weights[kB];
        for (int b = 0; b < kB; ++b) {
          weights[b] = walk.has(b) ? device::widen(walk.row(attns, b)[slots[b]]) : Sum{0};
        }
        for (int b = 0; b < kB; ++b) out.add_scaled(weights[b], x[b]);
      }
    }
    Group::store(op.out.head(row.sample, row.head).row(row.token), p.value_dim, row.begin, Sum{1},
                 out);
  });
}

// A warp has a row of slots.
template <typename Element, int Rank>
__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor)
    spread_kernel(const __grid_constant__ SpreadOperands<Element, Rank> op) {
  using Group = Lanes<Element, kWarp, 1>;
  const Problem<Rank>& problem = op.problem;
  const int64_t slots = problem.slots();
  for_each_row<Group>(problem.samples, problem.heads, problem.queries(), 1, [&](const Row& row) {
    const Element* table = op.table.head(row.sample, row.head).data;
    Element* attn = op.attn.head(row.sample, row.head).row(row.token);
    const Neighborhood<Rank> seen = Sample<Rank>(problem, row.sample).keys_of(row.token);
    for (int64_t slot = Group::lane(); slot < slots; slot += Group::kCount) {
      const int64_t bias = seen.bias_of_slot(problem, slot);
      attn[slot] = bias < 0 ? Element{} : table[bias];
    }
  });
}

// The weights of a query's pairs; every lane is a group.
template <typename Element, int Rank>
struct Weights {
  Tensor<const Element> attn;
  int64_t sample;
  int64_t head;

  struct Query {
    const Element* weights;
    __device__ bool has_pairs() const { return true; }
  };

  __device__ Query query(int64_t token) const { return {attn.head(sample, head).row(token)}; }
  __device__ Accumulator<Element> pair(const Query& query, int64_t /*key*/, int64_t slot,
                                       int64_t /*bias*/) const {
    return device::widen(query.weights[slot]);
  }
};

template <typename Element, int Rank>
__global__ void __launch_bounds__(kTableThreads)
    collect_kernel(const __grid_constant__ CollectOperands<Element, Rank> op) {
  sum_tables<Lanes<Element, 1, 1>>(op.problem, op.table, [&](int64_t sample, int64_t head) {
    return Weights<Element, Rank>{op.attn, sample, head};
  });
}

// ---- launches

template <typename Element, int Rank>
cudaError_t run_operation(cudaStream_t stream, const QkOperands<Element, Rank>& op) {
  const Problem<Rank>& p = op.problem;
  return with_lanes<Element>(p.dim, 0, [&](auto group) {
    using Group = decltype(group);
    return launch_rows<Group>(stream, qk_kernel<Group, Element, Rank>, p.samples, p.heads,
                              p.queries(), 1, op);
  });
}

template <typename Element, int Rank>
cudaError_t run_operation(cudaStream_t stream, const AvOperands<Element, Rank>& op) {
  const Problem<Rank>& p = op.problem;
  return with_lanes<Element>(p.value_dim, 0, [&](auto group) {
    using Group = decltype(group);
    return launch_rows<Group>(stream, av_kernel<Group, Element, Rank>, p.samples, p.heads,
                              p.queries(), p.value_dim, op);
  });
}

template <typename Element, int Rank>
cudaError_t run_operation(cudaStream_t stream, const InverseOperands<Element, Rank>& op) {
  const Problem<Rank>& p = op.problem;
  return with_lanes<Element>(p.value_dim, 0, [&](auto group) {
    using Group = decltype(group);
    return launch_rows<Group>(stream, inverse_kernel<Group, Element, Rank>, p.samples, p.heads_kv,
                              p.keys(), p.value_dim, op);
  });
}

template <typename Element, int Rank>
cudaError_t run_operation(cudaStream_t stream, const SpreadOperands<Element, Rank>& op) {
  const Problem<Rank>& p = op.problem;
  return launch_rows<Lanes<Element, kWarp, 1>>(stream, spread_kernel<Element, Rank>, p.samples,
                                               p.heads, p.queries(), 1, op);
}

template <typename Element, int Rank>
cudaError_t run_operation(cudaStream_t stream, const CollectOperands<Element, Rank>& op) {
  return launch_tables(stream, collect_kernel<Element, Rank>, op.problem, op);
}

}  // namespace jax_natten::naive
