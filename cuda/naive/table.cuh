// Sums over pairs of a query and a key that it sees, by the offset between them: tables of one
// sample and head each.
//
// A block owns a slab of one table, and each of its warps has a copy of the slab in shared memory.
// A warp takes whole queries; a query's pairs have different offsets, so the groups of a warp never
// add to one entry at once. The copies are added in order at the end. So no sum depends on timing,
// and nothing is as large as the number of pairs.
#pragma once

#include "cuda/naive/rows.cuh"

namespace jax_natten::naive {

inline constexpr int kTableThreads = 512;  // of a block
inline constexpr int kTableWarps = kTableThreads / kWarp;
inline constexpr int64_t kLargestSlab = 256;
// Smaller slabs let more blocks share a table, of which each one walks all queries.
inline constexpr int64_t kSmallestSlab = 32;
inline constexpr int64_t kWantedBlocks = 256;

// Entries in a slab: as many as leave the device enough blocks.
template <int Rank>
JAX_NATTEN_HOST_DEVICE int64_t slab_size(const Problem<Rank>& problem) {
  const int64_t entries = problem.samples * problem.heads * problem.biases();
  return geometry::max(geometry::min(entries / kWantedBlocks, kLargestSlab), kSmallestSlab);
}

template <int Rank>
JAX_NATTEN_HOST_DEVICE int64_t slabs(const Problem<Rank>& problem) {
  return geometry::ceil_div(problem.biases(), slab_size(problem));
}

// Fills `tables`. of_head(sample, head) is what sums are of:
//   query(token)                        what all pairs of a query need, with has_pairs()
//   pair(query, key, slot, bias)        the term of a pair, the same in all lanes of the group
template <typename Group, typename T, int Rank, typename OfHead>
__device__ void sum_tables(const Problem<Rank>& problem, const Tensor<T>& tables,
                           OfHead&& of_head) {
  using Sum = Accumulator<T>;
  constexpr int kGroups = kWarp / Group::kCount;
  __shared__ Sum copies[kTableWarps][kLargestSlab];
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int group = lane / Group::kCount;
  Sum* copy = copies[warp];
  const int64_t size = slab_size(problem), slabs_of_table = slabs(problem);
  const int64_t tasks = problem.samples * problem.heads * slabs_of_table;
  for (int64_t task = blockIdx.x; task < tasks; task += gridDim.x) {
    const int64_t begin = task % slabs_of_table * size;
    const int64_t end = geometry::min(begin + size, problem.biases());
    const int64_t head = task / slabs_of_table % problem.heads;
    const int64_t sample_index = task / slabs_of_table / problem.heads;
    const auto terms = of_head(sample_index, head);
    const Sample<Rank> sample(problem, sample_index);
    for (int64_t entry = lane; entry < end - begin; entry += kWarp) copy[entry] = 0;
    __syncwarp();
    for (int64_t token = warp; token < problem.queries(); token += kTableWarps) {
      const Neighborhood<Rank> seen = sample.keys_of(token);
      if (!seen.empty()) {
        const auto query = terms.query(token);
        if (query.has_pairs()) {
          seen.for_each_run([&](const Run<Rank>& run) {
            // The offsets of a run grow by one.
            const int64_t first = geometry::max(begin - run.bias, 0);
            const int64_t last = geometry::min(end - run.bias, run.count);
            for (int64_t at = first; at < last; at += kGroups) {
              const int64_t m = geometry::min(at + group, last - 1);
              const Sum term =
                  terms.pair(query, run.token + m * run.token_step, run.slot + m, run.bias + m);
              if (at + group < last && Group::lane() == 0) copy[run.bias + m - begin] += term;
            }
          });
        }
      }
      __syncwarp();
    }
    __syncthreads();
    T* table = tables.head(sample_index, head).data;
    for (int64_t entry = threadIdx.x; entry < end - begin; entry += kTableThreads) {
      Sum total = 0;
      for (int w = 0; w < kTableWarps; ++w) total += copies[w][entry];
      table[begin + entry] = device::narrow(total, T{});
    }
    __syncthreads();
  }
}

// Launches a kernel that is one sum_tables.
template <int Rank, typename Operands>
cudaError_t launch_tables(cudaStream_t stream, void (*kernel)(Operands),
                          const Problem<Rank>& problem, const Operands& operands) {
  const int64_t tasks = problem.samples * problem.heads * slabs(problem);
  return launch(stream, kernel, tasks, 1, kTableThreads, operands);
}

}  // namespace jax_natten::naive
