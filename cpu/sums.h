// Phases of kernels that sum over queries into arrays of keys: no two tasks of a phase add to the
// same key, and the order in which phases add does not depend on the threads.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>

#include "cpu/blocks.h"
#include "cpu/parallel.h"

namespace jax_natten {

inline void append(Job& job, Job more) {
  for (Phase& phase : more) job.push_back(std::move(phase));
}

// Calls run(begin, end) for parts of [0, size).
template <typename Run>
Phase over_range(int64_t size, Run run) {
  constexpr int64_t kPart = 1 << 16;
  return {geometry::ceil_div(size, kPart), static_cast<double>(size),
          [=](int64_t task, Scratch&) { run(task * kPart, std::min((task + 1) * kPart, size)); }};
}

// Elements of an array of keys.
inline int64_t size_of_keys(const Problem<kAxes>& problem, int64_t channels) {
  return problem.samples * problem.keys() * problem.heads_kv * channels;
}

// Calls run(place) for blocks of one sample and some heads, in order.
template <typename Run>
void for_each_block(int64_t sample, const geometry::Interval& heads_kv,
                    const geometry::Interval (&groups)[kAxes],
                    const geometry::Interval (&parts)[kAxes], Run&& run) {
  Place place{sample, heads_kv, {}, {}};
  auto& [gz, gy, gx] = place.group;
  auto& [z, y, x] = place.part;
  for (gz = groups[0].begin; gz < groups[0].end; ++gz) {
    for (gy = groups[1].begin; gy < groups[1].end; ++gy) {
      for (gx = groups[2].begin; gx < groups[2].end; ++gx) {
        for (z = parts[0].begin; z < parts[0].end; ++z) {
          for (y = parts[1].begin; y < parts[1].end; ++y) {
            for (x = parts[2].begin; x < parts[2].end; ++x) run(place);
          }
        }
      }
    }
  }
}

// run(place, scratch) for all blocks, those that share keys never at the same time.
template <typename Run>
Job over_slabs(const Problem<kAxes>& problem, const Blocks& blocks, double flops, Run run) {
  const Slabs slabs = choose_slabs(problem, blocks);
  Job job;
  for (int64_t parity = 0; parity < 2; ++parity) {
    int64_t counts[kAxes];
    slabs.parts(parity, counts);
    const Numbering numbering(problem, blocks, counts);
    job.push_back({numbering.count(), flops / 2, [=](int64_t task, Scratch& scratch) {
                     const Place slab = numbering.place(task);
                     geometry::Interval groups[kAxes], parts[kAxes];
                     for (int a = 0; a < kAxes; ++a) {
                       groups[a] = {slab.group[a], slab.group[a] + 1};
                       parts[a] = {0, blocks.count[a]};
                     }
                     const int64_t first = (2 * slab.part[slabs.axis] + parity) * slabs.blocks;
                     parts[slabs.axis] = {first,
                                          std::min(first + slabs.blocks, blocks.count[slabs.axis])};
                     for_each_block(slab.sample, slab.heads_kv, groups, parts,
                                    [&](const Place& place) { run(place, scratch); });
                   }});
  }
  return job;
}

// run(place, scratch) for all blocks, those of a sample and head by one task, which first calls
// begin(sample, head).
template <typename Begin, typename Run>
Job over_heads(const Problem<kAxes>& problem, const Blocks& blocks, double flops, Begin begin,
               Run run) {
  const int64_t heads = problem.heads_kv;
  return {{problem.samples * heads, flops, [=](int64_t task, Scratch& scratch) {
             begin(task / heads, task % heads);
             geometry::Interval groups[kAxes], parts[kAxes];
             for (int a = 0; a < kAxes; ++a) {
               groups[a] = {0, blocks.groups[a]};
               parts[a] = {0, blocks.count[a]};
             }
             for_each_block(task / heads, {task % heads, task % heads + 1}, groups, parts,
                            [&](const Place& place) { run(place, scratch); });
           }}};
}

}  // namespace jax_natten
