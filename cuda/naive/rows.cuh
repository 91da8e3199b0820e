// The rows that a group of lanes owns, the walk of all rows over the grid, and the walk over the
// neighbors of a group's rows.
//
// A group owns tokens that follow each other along the last axis in one dilation group. They differ
// there alone, so what they see is the same on every other axis and an interval on this one; the
// group walks over the hull of these intervals, takes each neighbor's row from memory once, and
// leaves out the pairs that do not see each other.
//
// All groups of a warp stay together: loops run until the last of them is done, so that lanes can
// exchange values without asking who is there.
#pragma once

#include <climits>
#include <cstdint>

#include "cpu/problem.h"
#include "cuda/common/launch.cuh"
#include "cuda/naive/lanes.cuh"

namespace jax_natten::naive {

inline constexpr int kThreads = 128;  // of a block

// ---- rows

// How many pieces there are in a row of `length` elements.
template <typename Group>
JAX_NATTEN_HOST_DEVICE int64_t pieces(int64_t length) {
  return geometry::max(geometry::ceil_div(length, Group::kWidth), 1);
}

// The tokens of an array in blocks of up to kRows.
template <int kRows>
struct Blocks {
  int64_t size;    // of the last axis
  int64_t step;    // between a block's tokens
  int64_t groups;  // of dilation that have tokens
  int64_t chunks;  // blocks of the largest group
  int64_t lines;   // along the last axis

  template <int Rank>
  JAX_NATTEN_HOST_DEVICE Blocks(const Problem<Rank>& problem, const int64_t (&shape)[Rank])
      : size(shape[Rank - 1]),
        step(problem.window[Rank - 1].dilation),
        groups(geometry::min(size, step)),
        chunks(geometry::ceil_div(geometry::ceil_div(size, step), kRows)),
        lines(1) {
    for (int a = 0; a < Rank - 1; ++a) lines *= shape[a];
  }

  JAX_NATTEN_HOST_DEVICE int64_t count() const { return lines * chunks * groups; }
};

// A piece of the rows of a block of tokens. A block with fewer tokens repeats its last one.
template <typename Group>
struct Rows {
  int64_t sample;
  int64_t head;
  int64_t begin;  // of the piece, a multiple of kWidth
  int64_t first;  // token
  int64_t step;   // to the next token
  int last;       // the last token's number

  // The place in the block of the lane's i-th row, and the row's token.
  __device__ int number(int i) const { return min(Group::row(i), last); }
  __device__ int64_t token(int i) const { return first + number(i) * step; }
};

// Calls visit(const Rows<Group>&) for every piece of the rows of all blocks; neighboring groups get
// neighboring blocks, which share most of their neighbors. Groups that the last warp has too many
// repeat the last piece.
template <typename Group, typename Visit>
__device__ void for_each_block(const Blocks<Group::kRows>& blocks, int64_t samples, int64_t heads,
                               int64_t length, Visit&& visit) {
  const int64_t pieces_of_row = pieces<Group>(length);
  const int64_t tasks = samples * heads * pieces_of_row * blocks.count();
  constexpr int kGroups = kWarp / Group::kCount;
  const int64_t step = static_cast<int64_t>(gridDim.x) * (kThreads / kWarp) * kGroups;
  int64_t first = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / kWarp * kGroups;
  for (; first < tasks; first += step) {
    int64_t rest = geometry::min(first + threadIdx.x % kWarp / Group::kCount, tasks - 1);
    const auto next = [&](int64_t count) {
      const int64_t quotient = rest / count, remainder = rest - quotient * count;
      rest = quotient;
      return remainder;
    };
    Rows<Group> rows;
    const int64_t group = blocks.groups == 1 ? 0 : next(blocks.groups);
    const int64_t tokens = geometry::ceil_div(blocks.size - group, blocks.step);
    // A group may have one block less than the largest.
    const int64_t chunk = geometry::min(next(blocks.chunks), (tokens - 1) / Group::kRows);
    const int64_t left = tokens - chunk * Group::kRows;
    rows.last = static_cast<int>(geometry::min(left, Group::kRows)) - 1;
    rows.step = blocks.step;
    rows.first = next(blocks.lines) * blocks.size + chunk * Group::kRows * blocks.step + group;
    rows.begin = Group::kHasLongRows ? next(pieces_of_row) * Group::kWidth : 0;
    rows.head = next(heads);
    rows.sample = rest;
    visit(rows);
  }
}

// Launches a kernel that is one for_each_block.
template <typename Group, typename Operands>
cudaError_t launch_rows(cudaStream_t stream, void (*kernel)(Operands),
                        const Blocks<Group::kRows>& blocks, int64_t samples, int64_t heads,
                        int64_t length, const Operands& operands) {
  const int64_t tasks = samples * heads * pieces<Group>(length) * blocks.count();
  return launch(stream, kernel, tasks, kThreads / Group::kCount, kThreads, operands);
}

// ---- neighbors

// The walk over the neighbors of a group's rows in batches of kBatch that follow each other along
// the last axis; the last batch of a run reaches past its end.
template <typename Group, int Rank>
class Walk {
 public:
  // `own` is what the lane's first row sees; nothing if not `any`.
  __device__ Walk(const Rows<Group>& rows, const Neighborhood<Rank>& own, bool any = true)
      : own_(own), step_(rows.step) {
    const AxisNeighbors& last = own.axis[kLast];
    const bool sees_any = any && !own.empty();
    // Positions on the last axis, counted from that of the block's first token.
    const int begin = static_cast<int>(last.bias * last.bias_step) + rows.number(0);
    const int count = sees_any ? static_cast<int>(last.count) : 0;
    int hull_begin = sees_any ? begin : kNowhere, hull_end = sees_any ? begin + count : -kNowhere;
    int first = sees_any ? static_cast<int>(last.first) : kNowhere;
    for (int offset = 1; offset < Group::kRows; offset *= 2) {
      hull_begin = min(hull_begin, __shfl_xor_sync(kAllLanes, hull_begin, offset));
      hull_end = max(hull_end, __shfl_xor_sync(kAllLanes, hull_end, offset));
      first = min(first, __shfl_xor_sync(kAllLanes, first, offset));
    }
    count_ = hull_begin == kNowhere ? 0 : hull_end - hull_begin;
    first_ = count_ > 0 ? first * own.token_stride[kLast] : 0;
    own_begin_ = sees_any ? begin - hull_begin : 0;
    own_count_ = count;
  }

  // Whether the lane's first row sees anything.
  __device__ bool sees_any() const { return own_count_ > 0; }

  // Loads the rows of every batch and calls visit(), in all groups of the warp while any has one.
  template <typename Visit, typename... Batches>
  __device__ void for_each_batch(Visit&& visit, Batches&... batches) {
    for (int& ordinal : ordinal_) ordinal = 0;
    bool goes_on = count_ > 0;
    while (__any_sync(kAllLanes, goes_on)) {
      begin_run();
      at_ = goes_on ? 0 : count_;
      (batches.begin_run(), ...);
      for (; __any_sync(kAllLanes, at_ < count_); at_ += Group::kBatch) {
        (batches.load(), ...);
        visit();
      }
      int a = kLast - 1;
      for (; a >= 0 && ++ordinal_[a] >= own_.axis[a].count; --a) ordinal_[a] = 0;
      goes_on = goes_on && a >= 0;
    }
  }

  // Whether the lane's b-th neighbor is there, and its token.
  __device__ bool has(int b) const { return at_ + Group::neighbor(b) < count_; }
  __device__ int64_t token(int b) const { return token_ + (at_ + Group::neighbor(b)) * step_; }
  __device__ int64_t token_step() const { return step_; }

  // Of a pair of the lane's own: whether they see each other, the slot in the window of a query and
  // the bias.
  __device__ bool sees(int o) const {
    return static_cast<unsigned>(place(o)) < static_cast<unsigned>(own_count_);
  }
  __device__ int64_t slot(int o) const { return slot_ + own_.axis[kLast].slot + place(o); }
  __device__ int64_t bias(int o) const {
    return bias_ + own_.axis[kLast].bias + place(o) * own_.axis[kLast].bias_step;
  }
  // Which of the first row's neighbors on the last axis it is; and on another one all are.
  __device__ int place(int o) const { return at_ + Group::neighbor(Group::own(o)) - own_begin_; }
  __device__ int ordinal(int axis) const { return ordinal_[axis]; }

 private:
  static constexpr int kLast = Rank - 1;
  static constexpr int kNowhere = INT_MAX;  // beyond all positions; so is -kNowhere

  __device__ void begin_run() {
    token_ = first_;
    slot_ = bias_ = 0;
    for (int a = 0; a < kLast; ++a) {
      const AxisNeighbors& axis = own_.axis[a];
      const int64_t m = ordinal_[a];
      token_ += (axis.first + m * axis.step) * own_.token_stride[a];
      slot_ += (axis.slot + m) * own_.slot_stride[a];
      bias_ += (axis.bias + m * axis.bias_step) * own_.bias_stride[a];
    }
  }

  const Neighborhood<Rank>& own_;
  const int64_t step_;         // to the next token
  int at_, count_;             // on the last axis, in the hull
  int own_begin_, own_count_;  // of the lane's first row there
  int64_t first_;              // its share of the first neighbor's token
  int64_t token_;              // the run's first
  int64_t slot_, bias_;        // all other axes' share
  int ordinal_[Rank];          // of the run, on every axis but the last
};

// ---- arrays

// The group's rows of an array, of which it holds pieces, times a factor.
template <typename Group, typename Array>
struct Held {
  using Sum = typename Group::Sum;

  const Rows<Group>& rows;
  const Array array;
  const int64_t length;
  const Sum factor;
  Piece<Sum> piece[Group::kRows];

  __device__ Held(const Rows<Group>& rows, const Array& array, int64_t length, Sum factor = 1)
      : rows(rows), array(array), length(length), factor(factor) {
    for (int i = 0; i < Group::kRows; ++i) piece[i] = load(i, 0);
  }

  __device__ Piece<Sum> load(int i, int64_t begin) const {
    Piece<Sum> loaded = Group::load(array.row(rows.token(i)), length, begin);
    loaded.scale(factor);
    return loaded;
  }
};

// Products of rows with the same tokens' rows of another array: that of the lane's first row.
template <typename Group, typename Array>
__device__ typename Group::Sum product_with(const Held<Group, Array>& rows, const Array& array) {
  typename Group::Sum shares[Group::kRows];
  for (int i = 0; i < Group::kRows; ++i) {
    const auto* other = array.row(rows.rows.token(i));
    shares[i] = rows.piece[i].dot(Group::load(other, rows.length));
    for (int64_t at = Group::kWidth; Group::kHasLongRows && at < rows.length; at += Group::kWidth) {
      shares[i] = rows.load(i, at).dot(Group::load(other, rows.length, at), shares[i]);
    }
  }
  return Group::first_sum(shares);
}

// A batch of neighbors' rows of an array. Rows that are not there are as those before, no pair of
// which counts.
template <typename Group, int Rank, typename Array>
class Batch {
 public:
  using Sum = typename Group::Sum;

  __device__ Batch(const Walk<Group, Rank>& walk, const Array& array, int64_t length,
                   int64_t begin = 0)
      : walk_(walk),
        array_(array),
        length_(length),
        begin_(begin),
        left_(Group::left(length, begin)),
        loaded_{} {}

  __device__ void begin_run() {
    for (int b = 0; b < Group::kBatch; ++b) {
      first_[b] = Group::first_unit(array_.row(walk_.token(b)), begin_);
    }
  }

  __device__ void load() {
    for (int b = 0; b < Group::kBatch; ++b) {
      Group::load_into(loaded_[b], first_[b], left_, walk_.has(b));
      // From the token it would take a multiplication. Rows are whole units apart.
      first_[b] += Group::kBatch * walk_.token_step() * (array_.stride / Group::kUnit);
    }
  }

  __device__ Piece<Sum> piece(int b) const { return Group::widen(loaded_[b]); }

  // The piece that begins at `begin`, not that which was loaded.
  __device__ Piece<Sum> piece(int b, int64_t begin) const {
    if constexpr (Group::kHasLongRows) {
      if (begin != begin_) {
        return Group::load(array_.row(walk_.token(b)), length_, begin, walk_.has(b));
      }
    }
    return piece(b);
  }

 private:
  const Walk<Group, Rank>& walk_;
  const Array array_;
  const int64_t length_, begin_;
  const int left_;
  decltype(Group::first_unit(nullptr, 0)) first_[Group::kBatch];  // of the next batch
  typename Group::Loaded loaded_[Group::kBatch];
};

// Adds this lane's shares of the products of rows with neighbors.
template <typename Group, int Rank, typename Array>
__device__ void add_products(typename Group::Pairs& products, const Held<Group, Array>& rows,
                             const Batch<Group, Rank, Array>& batch) {
  for (int b = 0; b < Group::kBatch; ++b) {
    const auto piece = batch.piece(b);
    for (int i = 0; i < Group::kRows; ++i)
      products.at(i, b) = rows.piece[i].dot(piece, products.at(i, b));
  }
  if constexpr (Group::kHasLongRows) {
    for (int64_t at = Group::kWidth; at < rows.length; at += Group::kWidth) {
      for (int b = 0; b < Group::kBatch; ++b) {
        const auto piece = batch.piece(b, at);
        for (int i = 0; i < Group::kRows; ++i)
          products.at(i, b) = rows.load(i, at).dot(piece, products.at(i, b));
      }
    }
  }
}

// Products of rows with neighbors: of the lane's own pairs.
template <typename Group, int Rank, typename Array>
__device__ typename Group::Own products(const Held<Group, Array>& rows,
                                        const Batch<Group, Rank, Array>& batch) {
  typename Group::Pairs shares{};
  add_products(shares, rows, batch);
  return Group::sum(shares);
}

// Adds the neighbors' rows, weighted, to sums of which every row has one.
template <typename Group, int Rank, typename Array>
__device__ void add_weighted(Piece<typename Group::Sum> (&sums)[Group::kRows],
                             const typename Group::Own& weights,
                             const Batch<Group, Rank, Array>& batch, int64_t begin) {
  for (int b = 0; b < Group::kBatch; ++b) {
    const auto piece = batch.piece(b, begin);
    for (int i = 0; i < Group::kRows; ++i) sums[i].add_scaled(weights.at(i, b), piece);
  }
}

// Stores scale times a sum of every row, and zeros for rows with nothing; both are given of the
// lane's first row.
template <typename Group, typename Array>
__device__ void store(const Rows<Group>& rows, const Array& array, int64_t length, bool any,
                      typename Group::Sum scale, Piece<typename Group::Sum> (&sums)[Group::kRows]) {
  if (!any) scale = 0;
  for (int i = 0; i < Group::kRows; ++i) {
    if (!Group::of_row(any, i)) sums[i].clear();
    Group::store(array.row(rows.token(i)), length, rows.begin, Group::of_row(scale, i), sums[i]);
  }
}

}  // namespace jax_natten::naive
