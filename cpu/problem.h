// One call's static problem as plain data, and the walk over a token's neighborhood.
//
// Tokens, window slots and bias table entries are numbered row-major over the axes. Kernels address
// arrays through Tensor, whose strides cover both layouts (fused: token-major, unfused: heads
// first), and visit neighborhoods as runs along the last axis, so no kernel knows its rank or
// derives a bound.
#pragma once

#include <cstdint>

#include "cpu/geometry.h"

namespace jax_natten {

inline constexpr int kFrameRows = 5;  // extent, query origin, query count, key origin, key count

template <int Rank>
constexpr JAX_NATTEN_HOST_DEVICE int64_t product(const int64_t (&sizes)[Rank]) {
  int64_t result = 1;
  for (int64_t size : sizes) result *= size;
  return result;
}

template <int Rank>
struct Problem {
  AxisWindow window[Rank];
  int64_t query_shape[Rank];
  int64_t key_shape[Rank];
  int64_t samples;       // product of the batch axes
  int64_t heads;         // of queries
  int64_t heads_kv;      // of keys and values; query head h reads h / group()
  int64_t dim;           // of queries and keys
  int64_t value_dim;     // of values
  double scale;          // of the logits
  bool tf32;             // float32 products may be rounded to TF32; ignored without matrix units
  const int32_t* frame;  // [samples, kFrameRows, Rank]

  JAX_NATTEN_HOST_DEVICE int64_t queries() const { return product(query_shape); }
  JAX_NATTEN_HOST_DEVICE int64_t keys() const { return product(key_shape); }
  JAX_NATTEN_HOST_DEVICE int64_t group() const { return heads_kv == 0 ? 0 : heads / heads_kv; }

  // Slots of a window.
  JAX_NATTEN_HOST_DEVICE int64_t slots() const {
    int64_t result = 1;
    for (const AxisWindow& axis : window) result *= axis.kernel_size;
    return result;
  }

  // Entries of a bias table.
  JAX_NATTEN_HOST_DEVICE int64_t biases() const {
    int64_t result = 1;
    for (const AxisWindow& axis : window) result *= 2 * axis.kernel_size - 1;
    return result;
  }

  // The most keys that a query can see: fewer than slots() where a window is longer than the axis.
  JAX_NATTEN_HOST_DEVICE int64_t most_keys() const {
    int64_t result = 1;
    for (int a = 0; a < Rank; ++a) {
      result *= geometry::min(window[a].kernel_size, key_shape[a]);
    }
    return result;
  }
};

// Strides of an array whose rows (the last axis) are contiguous.
struct Layout {
  int64_t sample;
  int64_t head;
  int64_t token;
};

constexpr JAX_NATTEN_HOST_DEVICE Layout token_major(int64_t heads, int64_t tokens, int64_t row) {
  return {tokens * heads * row, row, heads * row};
}

constexpr JAX_NATTEN_HOST_DEVICE Layout heads_first(int64_t heads, int64_t tokens, int64_t row) {
  return {heads * tokens * row, tokens * row, row};
}

template <typename T>
struct Tensor {
  T* data;  // may be null where there is no element
  Layout layout;

  // The rows of one head: row(token) of it is the token's.
  struct Head {
    T* data;
    int64_t stride;
    JAX_NATTEN_HOST_DEVICE T* row(int64_t token) const { return data + token * stride; }
  };

  JAX_NATTEN_HOST_DEVICE Head head(int64_t sample, int64_t head) const {
    return {data + sample * layout.sample + head * layout.head, layout.token};
  }
};

// Neighbors that follow each other along the last axis; members are those of the first one.
template <int Rank>
struct Run {
  int64_t count;
  int64_t token;          // row-major index of the token
  int64_t token_step;     // to the next neighbor's
  int64_t slot;           // row-major slot in the query's window, which grows by one
  int64_t bias;           // row-major index in the bias table
  int64_t bias_step;      // to the next neighbor's
  int64_t ordinal[Rank];  // which of the axis' neighbors it is, on every axis
};

// Row-major numbers of everything that a neighborhood is addressed by.
template <int Rank>
struct Strides {
  int64_t query[Rank];
  int64_t key[Rank];
  int64_t slot[Rank];
  int64_t bias[Rank];

  JAX_NATTEN_HOST_DEVICE explicit Strides(const Problem<Rank>& problem) {
    int64_t q = 1, k = 1, s = 1, b = 1;
    for (int a = Rank - 1; a >= 0; --a) {
      query[a] = q, key[a] = k, slot[a] = s, bias[a] = b;
      q *= problem.query_shape[a];
      k *= problem.key_shape[a];
      s *= problem.window[a].kernel_size;
      b *= 2 * problem.window[a].kernel_size - 1;
    }
  }
};

// The neighborhood of one token: the product of its axes' neighbors.
template <int Rank>
struct Neighborhood {
  AxisNeighbors axis[Rank];
  int64_t index[Rank];  // of the token itself
  int64_t token_stride[Rank];
  int64_t slot_stride[Rank];
  int64_t bias_stride[Rank];

  JAX_NATTEN_HOST_DEVICE bool empty() const {
    for (const AxisNeighbors& neighbors : axis) {
      if (neighbors.count == 0) return true;
    }
    return false;
  }

  // How many neighbors there are.
  JAX_NATTEN_HOST_DEVICE int64_t count() const {
    int64_t result = 1;
    for (const AxisNeighbors& neighbors : axis) result *= neighbors.count;
    return result;
  }

  // The index in the bias table of the key in a slot of the query's window, -1 where there is none.
  JAX_NATTEN_HOST_DEVICE int64_t bias_of_slot(const Problem<Rank>& problem, int64_t slot) const {
    int64_t bias = 0;
    for (int a = 0; a < Rank; ++a) {
      const int64_t in_axis = slot / slot_stride[a] % problem.window[a].kernel_size;
      const int64_t m = in_axis - axis[a].slot;
      if (m < 0 || m >= axis[a].count) return -1;
      bias += (axis[a].bias + m * axis[a].bias_step) * bias_stride[a];
    }
    return bias;
  }

  // Calls visit(const Run<Rank>&) for every run, in row-major order.
  JAX_NATTEN_VISITS
  template <typename Visit>
  JAX_NATTEN_HOST_DEVICE void for_each_run(Visit&& visit) const {
    if (empty()) return;
    constexpr int kLast = Rank - 1;
    Run<Rank> run{};
    run.count = axis[kLast].count;
    run.token_step = axis[kLast].step * token_stride[kLast];
    run.bias_step = axis[kLast].bias_step * bias_stride[kLast];
    while (true) {
      run.token = run.slot = run.bias = 0;
      for (int a = 0; a < Rank; ++a) {
        const int64_t m = run.ordinal[a];
        run.token += (axis[a].first + m * axis[a].step) * token_stride[a];
        run.slot += (axis[a].slot + m) * slot_stride[a];
        run.bias += (axis[a].bias + m * axis[a].bias_step) * bias_stride[a];
      }
      visit(run);
      int a = kLast - 1;
      for (; a >= 0 && ++run.ordinal[a] == axis[a].count; --a) run.ordinal[a] = 0;
      if (a < 0) return;
    }
  }
};

// One sample's frame, read once, and the neighborhoods in it.
template <int Rank>
class Sample {
 public:
  JAX_NATTEN_HOST_DEVICE Sample(const Problem<Rank>& problem, int64_t sample)
      : problem_(problem), strides_(problem) {
    const int32_t* row = problem.frame + sample * kFrameRows * Rank;
    for (int a = 0; a < Rank; ++a) {
      frame_[a] = make_axis_frame(row[a], row[Rank + a], row[2 * Rank + a], row[3 * Rank + a],
                                  row[4 * Rank + a], problem.query_shape[a], problem.key_shape[a]);
    }
  }

  // The keys that a query sees.
  JAX_NATTEN_HOST_DEVICE Neighborhood<Rank> keys_of(int64_t query) const {
    Neighborhood<Rank> result = with_strides(strides_.key);
    for (int a = 0; a < Rank; ++a) {
      result.index[a] = query / strides_.query[a] % problem_.query_shape[a];
      result.axis[a] = keys_of_query(problem_.window[a], frame_[a], result.index[a]);
    }
    return result;
  }

  // The queries that see a key. Their slots are not linear: see slot_in_axis.
  JAX_NATTEN_HOST_DEVICE Neighborhood<Rank> queries_of(int64_t key) const {
    Neighborhood<Rank> result = with_strides(strides_.query);
    for (int a = 0; a < Rank; ++a) {
      result.index[a] = key / strides_.key[a] % problem_.key_shape[a];
      result.axis[a] = queries_of_key(problem_.window[a], frame_[a], result.index[a]);
    }
    return result;
  }

  // Where the key lies on an axis that queries_of was asked for.
  JAX_NATTEN_HOST_DEVICE geometry::Location key_of(int a, const Neighborhood<Rank>& queries) const {
    const AxisFrame& frame = frame_[a];
    return geometry::locate(problem_.window[a], frame.extent, frame.key_origin + queries.index[a]);
  }

  // An axis' share of the slot that this key has in the window of the m-th query that sees it.
  JAX_NATTEN_HOST_DEVICE int64_t slot_in_axis(int a, const Neighborhood<Rank>& queries,
                                              const geometry::Location& key, int64_t m) const {
    return slot_of_key(problem_.window[a], key, queries.axis[a], m) * strides_.slot[a];
  }

 private:
  JAX_NATTEN_HOST_DEVICE Neighborhood<Rank> with_strides(const int64_t (&token)[Rank]) const {
    Neighborhood<Rank> result{};
    for (int a = 0; a < Rank; ++a) {
      result.token_stride[a] = token[a];
      result.slot_stride[a] = strides_.slot[a];
      result.bias_stride[a] = strides_.bias[a];
    }
    return result;
  }

  const Problem<Rank>& problem_;
  const Strides<Rank> strides_;
  AxisFrame frame_[Rank];
};

}  // namespace jax_natten
