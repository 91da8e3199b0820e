// What the queries of a block and of its tiles see: boxes of keys, and of each query an interval of
// the box on every axis.
//
// Keys are counted along the dilation group, from the begin of the block's box, or in a tile's
// shape from the begin of the tile's.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <vector>

#include "cpu/blocks.h"

namespace jax_natten {

struct Range {
  int begin;
  int end;

  int count() const { return end - begin; }
};

struct Box {
  Range axis[kAxes];

  int64_t volume() const {
    int64_t result = 1;
    for (const Range& range : axis) result *= range.count();
    return result;
  }
};

// What one query sees on one axis, nothing where it does not exist.
struct AxisQuery {
  Range keys;
  int64_t bias;  // index in the table of biases of the key at 0
  int64_t slot;  // position in the query's window of the key at 0
};

// The queries that a tile has along an axis.
struct AxisTile {
  Range box;    // what they see together
  int pattern;  // equal for tiles whose queries see alike, each from the begin of its own box
};

// One axis of a block.
struct AxisBlock {
  int64_t query;  // array index of the first query
  int64_t key;    // array index of the first key
  int64_t step;   // from one to the next, the dilation
  int queries;    // in the array
  int keys;
  std::vector<AxisQuery> seen;  // by each query, of whole tiles
  std::vector<AxisTile> tiles;
  std::vector<int> patterns;  // of each the first tile
};

inline bool see_alike(const AxisBlock& axis, int size, int tile, int other) {
  const AxisTile &a = axis.tiles[tile], &b = axis.tiles[other];
  if (a.box.count() != b.box.count()) return false;
  for (int i = 0; i < size; ++i) {
    const AxisQuery &p = axis.seen[tile * size + i], &q = axis.seen[other * size + i];
    if (p.keys.count() != q.keys.count()) return false;
    if (p.keys.count() == 0) continue;
    const int from_p = a.box.begin, from_q = b.box.begin;
    if (p.keys.begin - from_p != q.keys.begin - from_q || p.bias + from_p != q.bias + from_q ||
        p.slot + from_p != q.slot + from_q) {
      return false;
    }
  }
  return true;
}

// Fills in what an axis' queries see.
inline void look(AxisBlock& axis, const AxisWindow& window, const AxisFrame& frame, int tile_size) {
  int64_t first = std::numeric_limits<int64_t>::max(), last = -1;
  const auto neighbors = [&](int i) {
    return i < axis.queries ? keys_of_query(window, frame, axis.query + i * axis.step)
                            : AxisNeighbors{};
  };
  const int tiles = (axis.queries + tile_size - 1) / tile_size;
  axis.tiles.resize(static_cast<size_t>(tiles));
  axis.seen.resize(static_cast<size_t>(tiles * tile_size));
  for (int i = 0; i < axis.queries; ++i) {
    const AxisNeighbors keys = neighbors(i);
    if (keys.count == 0) continue;
    first = std::min(first, keys.first);
    last = std::max(last, keys.first + (keys.count - 1) * axis.step);
  }
  axis.key = last < 0 ? 0 : first;
  axis.keys = last < 0 ? 0 : static_cast<int>((last - first) / axis.step) + 1;
  for (int t = 0; t < tiles; ++t) {
    AxisTile& tile = axis.tiles[t];
    tile.box = {axis.keys, 0};
    for (int i = t * tile_size; i < (t + 1) * tile_size; ++i) {
      AxisQuery& query = axis.seen[i];
      const AxisNeighbors keys = neighbors(i);
      query = {};
      if (keys.count == 0) continue;
      const auto begin = static_cast<int>((keys.first - axis.key) / axis.step);
      query.keys = {begin, begin + static_cast<int>(keys.count)};
      query.bias = keys.bias - begin;
      query.slot = keys.slot - begin;
      tile.box = {std::min(tile.box.begin, query.keys.begin),
                  std::max(tile.box.end, query.keys.end)};
    }
    if (tile.box.count() <= 0) tile.box = {0, 0};
    if (t == 0 || !see_alike(axis, tile_size, t, t - 1)) axis.patterns.push_back(t);
    tile.pattern = static_cast<int>(axis.patterns.size()) - 1;
  }
}

// Along an axis, in lanes of a tile.
struct Lanes {
  int begin[kTileQueries];
  int end[kTileQueries];
};

// What some lanes of a tile see together, and what each of them sees.
struct Strip {
  Box box;
  Box inner;

  void add(const Strip& other) {
    for (int a = 0; a < kAxes; ++a) {
      if (other.box.axis[a].count() > 0) {
        Range& range = box.axis[a];
        range = range.count() == 0 ? other.box.axis[a]
                                   : Range{std::min(range.begin, other.box.axis[a].begin),
                                           std::max(range.end, other.box.axis[a].end)};
      }
      inner.axis[a] = {std::max(inner.axis[a].begin, other.inner.axis[a].begin),
                       std::min(inner.axis[a].end, other.inner.axis[a].end)};
    }
  }
};

inline constexpr int kQuad = 4;  // lanes, the least that are summed over the same keys

// What a tile's queries see, from the begin of its box; a lane is a query.
struct Shape {
  int size[kAxes];             // of the box
  Lanes lanes[kAxes];          // empty on all axes for a query that sees nothing
  int64_t bias[kTileQueries];  // index in the table of the key at (0, 0, 0)
  int64_t slot[kTileQueries];
  bool sees[kTileQueries];
  Strip quads[kTileQueries / kQuad];

  int64_t keys() const { return int64_t{size[0]} * size[1] * size[2]; }

  // The row-major number of a key of the box.
  int64_t entry(int z, int y, int x) const { return (int64_t{z} * size[1] + y) * size[2] + x; }

  // What one lane sees.
  Box box_of(int lane) const {
    Box box;
    for (int a = 0; a < kAxes; ++a) box.axis[a] = {lanes[a].begin[lane], lanes[a].end[lane]};
    return box;
  }

  // Of whole quads of lanes.
  Strip strip(int first, int count) const {
    Strip result = quads[first / kQuad];
    for (int q = first / kQuad + 1; q * kQuad < first + count; ++q) result.add(quads[q]);
    return result;
  }
};

// Where a tile lies in its block, and its queries in the arrays.
struct Tile {
  int at[kAxes];                // its number along each axis
  int box[kAxes];               // begin of its box
  int64_t token[kTileQueries];  // row-major number of the query, -1 outside the array

  bool is_first() const { return at[0] == 0 && at[1] == 0 && at[2] == 0; }
};

// A block of queries and the box of keys that they see, of one sample.
class BlockView {
 public:
  BlockView(const Problem<kAxes>& problem, int rank, const Blocks& blocks, const Place& place,
            const int64_t (&block)[kAxes])
      : problem_(problem), tiling_(blocks.tiling) {
    for (int a = 0; a < kAxes; ++a) {
      AxisBlock& axis = axis_[a];
      const AxisWindow& window = problem.window[a];
      const int64_t in_group =
          geometry::ceil_div(problem.query_shape[a] - place.group[a], window.dilation);
      const int64_t first = block[a] * blocks.size[a];
      const int64_t queries = geometry::min(blocks.size[a], in_group - first);
      axis.query = place.group[a] + first * window.dilation;
      axis.step = window.dilation;
      axis.queries = static_cast<int>(geometry::max(queries, 0));
      look(axis, window, frame_of(problem, rank, place.sample, a), tiling_.size(a));
    }
    number_keys();
    for (int l = 0; l < kTileQueries; ++l) {
      int rest = l;
      for (int a = kAxes - 1; a >= 0; --a) {
        step_[a][l] = rest & (tiling_.size(a) - 1);
        rest >>= tiling_.log_size[a];
      }
      lane_token_[l] = 0;
      for (int a = 0; a < kAxes; ++a) {
        lane_token_[l] = lane_token_[l] * problem.query_shape[a] + step_[a][l] * axis_[a].step;
      }
    }
    for (int z : axis_[0].patterns) {
      for (int y : axis_[1].patterns) {
        for (int x : axis_[2].patterns) shapes_.push_back(shape_of({z, y, x}));
      }
    }
  }

  const AxisBlock& axis(int a) const { return axis_[a]; }

  int64_t keys() const { return int64_t{axis_[0].keys} * axis_[1].keys * axis_[2].keys; }

  int64_t tiles() const {
    return static_cast<int64_t>(axis_[0].tiles.size() * axis_[1].tiles.size() *
                                axis_[2].tiles.size());
  }

  // How many keys of the box, in its order, end with a tile's.
  int64_t end_of(const Tile& tile) const {
    int64_t last = 0;
    for (int a = 0; a < kAxes; ++a) {
      const int end = axis_[a].tiles[tile.at[a]].box.end;
      if (end == 0) return 0;
      last = last * axis_[a].keys + end - 1;
    }
    return last + 1;
  }

  // The most keys that a tile sees.
  int64_t most_keys() const {
    int64_t result = 1;
    for (int a = 0; a < kAxes; ++a) {
      int most = 0;
      for (const AxisTile& tile : axis_[a].tiles) most = std::max(most, tile.box.count());
      result *= most;
    }
    return result;
  }

  // Row-major numbers of the keys in their array, in the order of the box.
  const std::vector<int64_t>& key_tokens() const { return key_tokens_; }

  // Calls visit(tile, next tile, shape, is_new) for every tile with a query in the array; after the
  // last the first is next, perhaps of another head. `is_new` tells whether the shape is not that
  // of the tile before.
  template <typename Visit>
  void for_each_tile(Visit&& visit) const {
    const Shape* last = nullptr;
    const int64_t count = tiles();
    if (count == 0) return;
    Tile tiles[2];
    find(tiles[0], 0);
    for (int64_t n = 0; n < count; ++n) {
      const Tile &tile = tiles[n % 2], &next = tiles[(n + 1) % 2];
      find(tiles[(n + 1) % 2], (n + 1) % count);
      size_t number = 0;
      for (int a = 0; a < kAxes; ++a) {
        number = number * axis_[a].patterns.size() +
                 static_cast<size_t>(axis_[a].tiles[tile.at[a]].pattern);
      }
      const Shape& shape = shapes_[number];
      visit(tile, next, shape, &shape != last);
      last = &shape;
    }
  }

 private:
  void number_keys() {
    const auto& [z, y, x] = axis_;
    key_tokens_.reserve(static_cast<size_t>(keys()));
    for (int i = 0; i < z.keys; ++i) {
      for (int j = 0; j < y.keys; ++j) {
        const int64_t row = (z.key + i * z.step) * problem_.key_shape[1] + y.key + j * y.step;
        const int64_t first = row * problem_.key_shape[2] + x.key;
        for (int k = 0; k < x.keys; ++k) key_tokens_.push_back(first + k * x.step);
      }
    }
  }

  void find(Tile& tile, int64_t number) const {
    for (int a = kAxes - 1; a >= 0; --a) {
      const auto tiles = static_cast<int64_t>(axis_[a].tiles.size());
      tile.at[a] = static_cast<int>(number % tiles);
      tile.box[a] = axis_[a].tiles[tile.at[a]].box.begin;
      number /= tiles;
    }
    int64_t first = 0;
    bool is_whole = true;
    for (int a = 0; a < kAxes; ++a) {
      const int begin = tile.at[a] * tiling_.size(a);
      first = first * problem_.query_shape[a] + axis_[a].query + begin * axis_[a].step;
      is_whole = is_whole && begin + tiling_.size(a) <= axis_[a].queries;
    }
    for (int l = 0; l < kTileQueries; ++l) tile.token[l] = first + lane_token_[l];
    if (is_whole) return;
    for (int l = 0; l < kTileQueries; ++l) {
      for (int a = 0; a < kAxes; ++a) {
        if (tile.at[a] * tiling_.size(a) + step_[a][l] >= axis_[a].queries) tile.token[l] = -1;
      }
    }
  }

  // Of the tile with these numbers along the axes.
  Shape shape_of(const int (&at)[kAxes]) const {
    Shape shape{};
    for (int a = 0; a < kAxes; ++a) shape.size[a] = axis_[a].tiles[at[a]].box.count();
    for (int l = 0; l < kTileQueries; ++l) {
      const AxisQuery* query[kAxes];
      bool sees = true;
      for (int a = 0; a < kAxes; ++a) {
        query[a] = &axis_[a].seen[at[a] * tiling_.size(a) + step_[a][l]];
        sees = sees && query[a]->keys.count() > 0;
      }
      shape.sees[l] = sees;
      if (!sees) continue;
      for (int a = 0; a < kAxes; ++a) {
        const int64_t kernel_size = problem_.window[a].kernel_size;
        const int begin = axis_[a].tiles[at[a]].box.begin;
        shape.lanes[a].begin[l] = query[a]->keys.begin - begin;
        shape.lanes[a].end[l] = query[a]->keys.end - begin;
        shape.bias[l] = shape.bias[l] * (2 * kernel_size - 1) + query[a]->bias + begin;
        shape.slot[l] = shape.slot[l] * kernel_size + query[a]->slot + begin;
      }
    }
    for (int l = 0; l < kTileQueries; ++l) {
      const Box box = shape.box_of(l);
      const Strip lane{box, box};
      Strip& quad = shape.quads[l / kQuad];
      if (l % kQuad == 0) {
        quad = lane;
      } else {
        quad.add(lane);
      }
    }
    return shape;
  }

  const Problem<kAxes>& problem_;
  const Tiling& tiling_;
  AxisBlock axis_[kAxes];
  std::vector<int64_t> key_tokens_;
  std::vector<Shape> shapes_;         // of all combinations of the axes' patterns
  int step_[kAxes][kTileQueries];     // along an axis from a tile's first query to each
  int64_t lane_token_[kTileQueries];  // row-major, the same
};

}  // namespace jax_natten
