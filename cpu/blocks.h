// How the queries of a call are cut on CPUs: into tiles, whose logits are computed at once, tiles
// into blocks, which read their keys and values once, and blocks into slabs, for sums over queries.
//
// Nothing here depends on the number of threads, and so no result does.
#pragma once

#include <cstdint>

#include "cpu/call.h"
#include "cpu/geometry.h"
#include "cpu/tiling.h"

namespace jax_natten {

inline constexpr int kTileQueries = 16;

// What a block's keys and values may take, about a second-level cache. A tile that sees
// more is a block of its own.
inline constexpr int64_t kBlockBytes = 768 << 10;

// Enough for the threads of most machines; a task takes more heads where there are more.
inline constexpr int64_t kTasks = 16;

// Queries along an axis are counted within a dilation group.
struct Blocks {
  Tiling tiling;
  int64_t size[kAxes];    // queries of a block along an axis, whole tiles
  int64_t count[kAxes];   // blocks along a dilation group
  int64_t groups[kAxes];  // dilation groups that have a query
};

// Where a task's part of the queries lies.
struct Place {
  int64_t sample;
  geometry::Interval heads_kv;
  int64_t group[kAxes];  // array index of the dilation group's first query
  int64_t part[kAxes];   // along the group
};

// Tasks are numbered so that those next to each other read memory that is.
struct Numbering {
  int64_t parts[kAxes];
  int64_t groups[kAxes];
  int64_t heads;  // of a task, one after the other as they lie in memory; perhaps fewer of the last
  int64_t heads_kv;
  int64_t samples;

  Numbering(const Problem<kAxes>& problem, const Blocks& blocks,
            const int64_t (&part_counts)[kAxes])
      : heads_kv(problem.heads_kv), samples(problem.samples) {
    for (int a = 0; a < kAxes; ++a) {
      parts[a] = part_counts[a];
      groups[a] = blocks.groups[a];
    }
    const int64_t tasks = product(parts) * product(groups) * heads_kv * samples;
    heads = geometry::max(geometry::min(tasks / kTasks, heads_kv), 1);
  }

  int64_t count() const {
    return product(parts) * product(groups) * geometry::ceil_div(heads_kv, heads) * samples;
  }

  Place place(int64_t task) const {
    Place result;
    const auto next = [&](int64_t size) {
      const int64_t digit = task % size;
      task /= size;
      return digit;
    };
    const int64_t head = next(geometry::ceil_div(heads_kv, heads)) * heads;
    result.heads_kv = {head, geometry::min(head + heads, heads_kv)};
    for (int a = kAxes - 1; a >= 0; --a) result.group[a] = next(groups[a]);
    for (int a = kAxes - 1; a >= 0; --a) result.part[a] = next(parts[a]);
    result.sample = task;
    return result;
  }
};

// Blocks grow from a tile, each time along the axis that saves most keys a query, while their
// keys of so many bytes fit.
inline Blocks choose_blocks(const Problem<kAxes>& problem, int rank, int64_t bytes_per_key) {
  Blocks blocks{};
  blocks.tiling = choose_tiling<Side::kQueries>(problem, rank, kTileQueries, 1);
  // Keys of a block along an axis, for one in the middle.
  const auto keys = [&](int a, int64_t size) {
    const int64_t first = geometry::max((row_positions<Side::kQueries>(problem, a) - size) / 2, 0);
    return seen_together<Side::kQueries>(problem, a, first * problem.window[a].dilation, size);
  };
  for (int a = 0; a < kAxes; ++a) {
    blocks.size[a] = blocks.tiling.size(a);
    blocks.groups[a] = row_groups<Side::kQueries>(problem, a);
  }
  while (true) {
    int64_t box = 1;
    for (int a = 0; a < kAxes; ++a) box *= keys(a, blocks.size[a]);
    int best = -1;
    double least = 2;  // how many times the keys grow where the queries double
    for (int a = 0; a < kAxes; ++a) {
      const int64_t now = geometry::max(keys(a, blocks.size[a]), 1);
      const int64_t then = keys(a, 2 * blocks.size[a]);
      const double growth = static_cast<double>(then) / static_cast<double>(now);
      const bool fits = box / now * then * bytes_per_key <= kBlockBytes;
      const bool has_more = blocks.size[a] < row_positions<Side::kQueries>(problem, a);
      if (has_more && fits && growth < least) best = a, least = growth;
    }
    if (best < 0) break;
    blocks.size[best] *= 2;
  }
  for (int a = 0; a < kAxes; ++a) {
    const int64_t positions = row_positions<Side::kQueries>(problem, a);
    const int64_t tile = blocks.tiling.size(a);
    blocks.count[a] = geometry::ceil_div(positions, blocks.size[a]);
    if (blocks.count[a] == 0) continue;
    // Of equal size.
    blocks.size[a] =
        geometry::ceil_div(geometry::ceil_div(positions, blocks.count[a]), tile) * tile;
    blocks.count[a] = geometry::ceil_div(positions, blocks.size[a]);
  }
  return blocks;
}

// Runs of blocks along one axis, so long that the keys which every other one sees are apart: sums
// over queries may add to the arrays of keys, first those of even slabs, then those of odd ones.
struct Slabs {
  int axis;
  int64_t blocks;  // of a slab, along the axis
  int64_t count;

  // Slabs of a parity, along every axis.
  void parts(int64_t parity, int64_t (&result)[kAxes]) const {
    for (int a = 0; a < kAxes; ++a) result[a] = a == axis ? (count + 1 - parity) / 2 : 1;
  }
};

inline Slabs choose_slabs(const Problem<kAxes>& problem, const Blocks& blocks) {
  Slabs best{0, geometry::max(blocks.count[0], 1), 1};
  for (int a = 0; a < kAxes; ++a) {
    // A window passes its query by less than kernel_size + stride on either side, or else is
    // pushed inward by a border.
    const int64_t least = 2 * (problem.window[a].kernel_size + problem.window[a].stride);
    const int64_t length = geometry::ceil_div(least, blocks.size[a]);
    const int64_t count = blocks.count[a] / length;
    if (count > best.count) best = {a, geometry::ceil_div(blocks.count[a], count), count};
  }
  best.count = geometry::ceil_div(blocks.count[best.axis], best.blocks);
  return best;
}

}  // namespace jax_natten
