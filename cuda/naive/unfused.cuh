// The naive unfused kernels: products with a query's window as a row of slots, their transposes,
// and the pair that spreads a table of biases over slots and collects it. The formulas are those
// of cpu/unfused.h.
//
// Slots without a key are written as 0 and never read.
#pragma once

#include "cuda/naive/naive.h"
#include "cuda/naive/rows.cuh"
#include "cuda/naive/table.cuh"

namespace jax_natten::naive {

inline constexpr Shape kQk{2, 4, 3};
inline constexpr Shape kAv{4, 2, 3};
inline constexpr Shape kInverse{4, 4, 3};

template <typename Group, typename Element, int Rank>
__global__ void __launch_bounds__(kThreads, kQk.blocks)
    qk_kernel(const __grid_constant__ QkOperands<Element, Rank> op) {
  const Problem<Rank>& p = op.problem;
  const int64_t slots = p.slots();
  const Blocks<Group::kRows> blocks(p, p.query_shape);
  for_each_block<Group>(blocks, p.samples, p.heads, 1, [&](const Rows<Group>& rows) {
    const Held q(rows, op.query.head(rows.sample, rows.head), p.dim);
    Element* attn = op.attn.head(rows.sample, rows.head).row(rows.token(0));
    const Neighborhood<Rank> seen = Sample<Rank>(p, rows.sample).keys_of(rows.token(0));
    if (seen.count() < slots) {
      constexpr int kLanesOfRow = Group::kCount / Group::kRows;
      for (int64_t slot = Group::lane() / Group::kRows; slot < slots; slot += kLanesOfRow) {
        attn[slot] = Element{};
      }
    }
    __syncwarp();  // before other lanes write some of them
    Walk<Group, Rank> walk(rows, seen);
    Batch k(walk, op.key.head(rows.sample, rows.head / p.group()), p.dim);
    walk.for_each_batch(
        [&] {
          const typename Group::Own product = products(q, k);
          for (int o = 0; o < Group::kOwn; ++o) {
            if (walk.sees(o) && Group::lane() < Group::kOwners) {
              attn[walk.slot(o)] = device::narrow(product.value[o], Element{});
            }
          }
        },
        k);
  });
}

template <typename Group, typename Element, int Rank>
__global__ void __launch_bounds__(kThreads, kAv.blocks)
    av_kernel(const __grid_constant__ AvOperands<Element, Rank> op) {
  using Sum = Accumulator<Element>;
  const Problem<Rank>& p = op.problem;
  const Blocks<Group::kRows> blocks(p, p.query_shape);
  for_each_block<Group>(blocks, p.samples, p.heads, p.value_dim, [&](const Rows<Group>& rows) {
    const Element* attn = op.attn.head(rows.sample, rows.head).row(rows.token(0));
    Piece<Sum> out[Group::kRows]{};
    const Neighborhood<Rank> seen = Sample<Rank>(p, rows.sample).keys_of(rows.token(0));
    Walk<Group, Rank> walk(rows, seen);
    const auto values = op.value.head(rows.sample, rows.head / p.group());
    Batch v(walk, values, p.value_dim, rows.begin);
    walk.for_each_batch(
        [&] {
          typename Group::Own weight;
          for (int o = 0; o < Group::kOwn; ++o) {
            weight.value[o] = walk.sees(o) ? device::widen(attn[walk.slot(o)]) : Sum{0};
          }
          add_weighted(out, weight, v, rows.begin);
        },
        v);
    store(rows, op.out.head(rows.sample, rows.head), p.value_dim, walk.sees_any(), Sum{1}, out);
  });
}

// The slots of the lane's first key in the windows of a batch of queries.
template <typename Group, int Rank>
class KeySlots {
 public:
  __device__ KeySlots(const Sample<Rank>& sample, const Neighborhood<Rank>& seen_by,
                      const Walk<Group, Rank>& walk)
      : sample_(sample), seen_by_(seen_by), walk_(walk), key_(sample.key_of(kLast, seen_by)) {}

  __device__ void begin_run() {
    others_ = 0;
    for (int a = 0; a < kLast; ++a) {
      others_ += sample_.slot_in_axis(a, seen_by_, sample_.key_of(a, seen_by_), walk_.ordinal(a));
    }
  }
  __device__ void load() {}

  // That of a pair of the lane's own.
  __device__ int64_t slot(int o) const {
    return others_ + sample_.slot_in_axis(kLast, seen_by_, key_, walk_.place(o));
  }

 private:
  static constexpr int kLast = Rank - 1;

  const Sample<Rank>& sample_;
  const Neighborhood<Rank>& seen_by_;
  const Walk<Group, Rank>& walk_;
  const geometry::Location key_;  // on the last axis
  int64_t others_;                // all other axes' share
};

template <typename Group, typename Element, int Rank>
__global__ void __launch_bounds__(kThreads, kInverse.blocks)
    inverse_kernel(const __grid_constant__ InverseOperands<Element, Rank> op) {
  using Sum = Accumulator<Element>;
  const Problem<Rank>& p = op.problem;
  const Blocks<Group::kRows> blocks(p, p.key_shape);
  for_each_block<Group>(blocks, p.samples, p.heads_kv, p.value_dim, [&](const Rows<Group>& rows) {
    const Sample<Rank> sample(p, rows.sample);
    const Neighborhood<Rank> seen_by = sample.queries_of(rows.token(0));
    Piece<Sum> out[Group::kRows]{};
    Walk<Group, Rank> walk(rows, seen_by);
    KeySlots<Group, Rank> slots(sample, seen_by, walk);
    for (int64_t of_group = 0; of_group < p.group(); ++of_group) {
      const int64_t head = rows.head * p.group() + of_group;
      const auto attns = op.attn.head(rows.sample, head);
      Batch x(walk, op.x.head(rows.sample, head), p.value_dim, rows.begin);
      walk.for_each_batch(
          [&] {
            typename Group::Own weight{};
            for (int o = 0; o < Group::kOwn; ++o) {
              if (!walk.sees(o)) continue;
              const Element* attn = attns.row(walk.token(Group::own(o)));
              weight.value[o] = device::widen(attn[slots.slot(o)]);
            }
            add_weighted(out, weight, x, rows.begin);
          },
          slots, x);
    }
    store(rows, op.out.head(rows.sample, rows.head), p.value_dim, walk.sees_any(), Sum{1}, out);
  });
}

// A warp has a row of slots.
template <typename Element, int Rank>
__global__ void __launch_bounds__(kThreads)
    spread_kernel(const __grid_constant__ SpreadOperands<Element, Rank> op) {
  using Group = Lanes<Element, kWarp, 1>;
  const Problem<Rank>& problem = op.problem;
  const int64_t slots = problem.slots();
  const Blocks<Group::kRows> blocks(problem, problem.query_shape);
  for_each_block<Group>(blocks, problem.samples, problem.heads, 1, [&](const Rows<Group>& rows) {
    const int64_t token = rows.token(0);
    const Element* table = op.table.head(rows.sample, rows.head).data;
    Element* attn = op.attn.head(rows.sample, rows.head).row(token);
    const Neighborhood<Rank> seen = Sample<Rank>(problem, rows.sample).keys_of(token);
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
  return with_lanes<Element, kQk>(p.dim, 0, [&](auto group) {
    using Group = decltype(group);
    return launch_rows<Group>(stream, qk_kernel<Group, Element, Rank>, {p, p.query_shape},
                              p.samples, p.heads, 1, op);
  });
}

template <typename Element, int Rank>
cudaError_t run_operation(cudaStream_t stream, const AvOperands<Element, Rank>& op) {
  const Problem<Rank>& p = op.problem;
  return with_lanes<Element, kAv>(p.value_dim, 0, [&](auto group) {
    using Group = decltype(group);
    return launch_rows<Group>(stream, av_kernel<Group, Element, Rank>, {p, p.query_shape},
                              p.samples, p.heads, p.value_dim, op);
  });
}

template <typename Element, int Rank>
cudaError_t run_operation(cudaStream_t stream, const InverseOperands<Element, Rank>& op) {
  const Problem<Rank>& p = op.problem;
  return with_lanes<Element, kInverse>(p.value_dim, 0, [&](auto group) {
    using Group = decltype(group);
    return launch_rows<Group>(stream, inverse_kernel<Group, Element, Rank>, {p, p.key_shape},
                              p.samples, p.heads_kv, p.value_dim, op);
  });
}

template <typename Element, int Rank>
cudaError_t run_operation(cudaStream_t stream, const SpreadOperands<Element, Rank>& op) {
  const Problem<Rank>& p = op.problem;
  return launch_rows<Lanes<Element, kWarp, 1>>(stream, spread_kernel<Element, Rank>,
                                               {p, p.query_shape}, p.samples, p.heads, 1, op);
}

template <typename Element, int Rank>
cudaError_t run_operation(cudaStream_t stream, const CollectOperands<Element, Rank>& op) {
  return launch_tables(stream, collect_kernel<Element, Rank>, op.problem, op);
}

}  // namespace jax_natten::naive
