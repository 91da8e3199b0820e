// The neighborhood's geometry, one axis at a time: which keys a query sees and which queries see a
// key. Every bound in the project comes from here; the CPU kernels, the CUDA kernels and the tests
// share this file.
//
// Coordinates are global: an array index plus its array's origin. A coordinate x belongs to the
// dilation group g = x mod d at position p = x div d; a group has n = ceil((s - g) / d) positions
// and windows never leave it. The window of p is the interval [start(p), end(p)) of positions of
// the same group. start and end never decrease as p grows, so the queries that see one key are an
// interval of positions too, which has a closed form.
//
// Frames come from the user and may hold any int32. All arithmetic is in int64, where it cannot
// overflow, and every result is intersected with the tokens that exist, so that the indices handed
// out always lie inside the arrays.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define JAX_NATTEN_HOST_DEVICE __host__ __device__
#else
#define JAX_NATTEN_HOST_DEVICE
#endif

// Before a template for host and device whose argument may be callable on one of them only.
#ifdef __CUDACC__
#define JAX_NATTEN_VISITS _Pragma("nv_exec_check_disable")
#else
#define JAX_NATTEN_VISITS
#endif

namespace jax_natten {

// The static window of one axis. 1 <= stride <= kernel_size and dilation >= 1.
struct AxisWindow {
  int64_t kernel_size;
  int64_t stride;
  int64_t dilation;
  bool is_causal;
};

// Where the arrays of one sample lie in the global axis, counts within the arrays' sizes.
struct AxisFrame {
  int64_t extent;        // length of the global axis
  int64_t query_origin;  // global coordinate of the first query
  int64_t query_count;   // queries that exist
  int64_t key_origin;    // global coordinate of the first key
  int64_t key_count;     // keys that exist
};

// The neighbors of one token, in the order of their coordinates: every member is that of the first
// neighbor, a `step` that of the one after it.
struct AxisNeighbors {
  int64_t count;      // how many there are, possibly none
  int64_t first;      // array index
  int64_t step;       // array index, step
  int64_t slot;       // position in the query's window, which grows by one; of queries always 0
  int64_t bias;       // index in the table of biases, key minus query position plus k - 1
  int64_t bias_step;  // index in the table of biases, step
};

namespace geometry {

struct Interval {
  int64_t begin;
  int64_t end;
};

// A coordinate within its dilation group.
struct Location {
  int64_t group;
  int64_t position;
  int64_t length;  // of the group
};

constexpr JAX_NATTEN_HOST_DEVICE int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr JAX_NATTEN_HOST_DEVICE int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }

// Most divisors are a dilation or stride of 1, and a division takes a GPU some 40 instructions.
constexpr JAX_NATTEN_HOST_DEVICE int64_t floor_div(int64_t a, int64_t b) {
  return b == 1 ? a : a / b - (a % b < 0 ? 1 : 0);
}

constexpr JAX_NATTEN_HOST_DEVICE int64_t ceil_div(int64_t a, int64_t b) {
  return b == 1 ? a : a / b + (a % b > 0 ? 1 : 0);
}

constexpr JAX_NATTEN_HOST_DEVICE Interval intersect(Interval a, Interval b) {
  return {max(a.begin, b.begin), min(a.end, b.end)};
}

// Requires 0 <= coordinate < extent.
constexpr JAX_NATTEN_HOST_DEVICE Location locate(const AxisWindow& window, int64_t extent,
                                                 int64_t coordinate) {
  const int64_t d = window.dilation;
  const int64_t position = floor_div(coordinate, d);
  const int64_t group = coordinate - position * d;
  return {group, position, ceil_div(extent - group, d)};
}

// Positions of a group whose tokens lie in the array [origin, origin + count).
constexpr JAX_NATTEN_HOST_DEVICE Interval existing(const AxisWindow& window, int64_t group,
                                                   int64_t origin, int64_t count) {
  return {ceil_div(origin - group, window.dilation),
          ceil_div(origin + count - group, window.dilation)};
}

// How far the window reaches to the left of the leader.
constexpr JAX_NATTEN_HOST_DEVICE int64_t reach(const AxisWindow& window) {
  return window.is_causal ? window.kernel_size - 1 : window.kernel_size / 2;
}

// The place within a stride group of its leader, the query whose window all of the group share.
constexpr JAX_NATTEN_HOST_DEVICE int64_t leader_offset(const AxisWindow& window) {
  return window.is_causal ? window.stride - 1 : window.stride / 2;
}

constexpr JAX_NATTEN_HOST_DEVICE int64_t leader(const AxisWindow& window, int64_t length,
                                                int64_t position) {
  const int64_t t = window.stride;
  return min(floor_div(position, t) * t + leader_offset(window), length - 1);
}

// [start(p), end(p)), the window of a query position.
constexpr JAX_NATTEN_HOST_DEVICE Interval window_of(const AxisWindow& window, int64_t length,
                                                    int64_t position) {
  const int64_t start = max(leader(window, length, position) - reach(window), 0);
  if (window.is_causal) return {start, position + 1};
  const int64_t shifted = min(start, max(length - window.kernel_size, 0));
  return {shifted, min(shifted + window.kernel_size, length)};
}

// {p : leader(p) <= bound} is [0, result).
constexpr JAX_NATTEN_HOST_DEVICE int64_t end_of_leaders_up_to(const AxisWindow& window,
                                                              int64_t length, int64_t bound) {
  if (bound >= length - 1) return length;
  const int64_t t = window.stride;
  return min((floor_div(bound - leader_offset(window), t) + 1) * t, length);
}

// {p : leader(p) >= bound} is [result, length), for bound <= length - 1.
constexpr JAX_NATTEN_HOST_DEVICE int64_t begin_of_leaders_from(const AxisWindow& window,
                                                               int64_t bound) {
  const int64_t t = window.stride;
  return max(ceil_div(bound - leader_offset(window), t) * t, 0);
}

// {p : start(p) <= key < end(p)}, the query positions whose windows hold a key position.
constexpr JAX_NATTEN_HOST_DEVICE Interval seen_by(const AxisWindow& window, int64_t length,
                                                  int64_t key) {
  const int64_t r = reach(window);
  // start(p) <= key <=> leader(p) - r <= key, or the key lies where no start can pass it.
  const int64_t last_start = max(length - window.kernel_size, 0);
  const bool passes_all_starts = !window.is_causal && key >= last_start;
  const int64_t end = passes_all_starts ? length : end_of_leaders_up_to(window, length, key + r);
  // Causal: key < end(p) <=> key <= p.
  if (window.is_causal) return {key, end};
  // Otherwise key < end(p) <=> start(p) > key - k, which all do while the key is one of the first
  // k.
  const int64_t earliest_start = key - window.kernel_size + 1;
  return {earliest_start <= 0 ? 0 : begin_of_leaders_from(window, earliest_start + r), end};
}

// Positions of the keys that a query sees and that exist; possibly none.
constexpr JAX_NATTEN_HOST_DEVICE Interval keys_seen(const AxisWindow& window,
                                                    const AxisFrame& frame, const Location& query) {
  return intersect(window_of(window, query.length, query.position),
                   existing(window, query.group, frame.key_origin, frame.key_count));
}

// Positions of the queries that see a key and that exist; possibly none.
constexpr JAX_NATTEN_HOST_DEVICE Interval queries_that_see(const AxisWindow& window,
                                                           const AxisFrame& frame,
                                                           const Location& key) {
  return intersect(seen_by(window, key.length, key.position),
                   existing(window, key.group, frame.query_origin, frame.query_count));
}

constexpr JAX_NATTEN_HOST_DEVICE bool exists(int64_t extent, int64_t origin, int64_t count,
                                             int64_t index) {
  const int64_t coordinate = origin + index;
  return 0 <= index && index < count && 0 <= coordinate && coordinate < extent;
}

constexpr JAX_NATTEN_HOST_DEVICE int64_t clamp_count(int64_t count, int64_t size) {
  return max(min(count, size), 0);
}

}  // namespace geometry

// A frame as it came, its counts clamped to the arrays' sizes.
constexpr JAX_NATTEN_HOST_DEVICE AxisFrame make_axis_frame(int64_t extent, int64_t query_origin,
                                                           int64_t query_count, int64_t key_origin,
                                                           int64_t key_count, int64_t query_size,
                                                           int64_t key_size) {
  return {extent, query_origin, geometry::clamp_count(query_count, query_size), key_origin,
          geometry::clamp_count(key_count, key_size)};
}

// The keys that the query at an array index sees.
constexpr JAX_NATTEN_HOST_DEVICE AxisNeighbors keys_of_query(const AxisWindow& window,
                                                             const AxisFrame& frame,
                                                             int64_t query) {
  if (!geometry::exists(frame.extent, frame.query_origin, frame.query_count, query)) return {};
  const geometry::Location at = geometry::locate(window, frame.extent, frame.query_origin + query);
  const auto [begin, end] = geometry::keys_seen(window, frame, at);
  if (begin >= end) return {};
  return {end - begin,
          begin * window.dilation + at.group - frame.key_origin,
          window.dilation,
          begin - geometry::window_of(window, at.length, at.position).begin,
          begin - at.position + window.kernel_size - 1,
          1};
}

// The queries that see the key at an array index.
constexpr JAX_NATTEN_HOST_DEVICE AxisNeighbors queries_of_key(const AxisWindow& window,
                                                              const AxisFrame& frame, int64_t key) {
  if (!geometry::exists(frame.extent, frame.key_origin, frame.key_count, key)) return {};
  const geometry::Location at = geometry::locate(window, frame.extent, frame.key_origin + key);
  const auto [begin, end] = geometry::queries_that_see(window, frame, at);
  if (begin >= end) return {};
  return {end - begin,
          begin * window.dilation + at.group - frame.query_origin,
          window.dilation,
          0,
          at.position - begin + window.kernel_size - 1,
          -1};
}

// The slot that a key has in the window of the m-th of the queries that see it.
constexpr JAX_NATTEN_HOST_DEVICE int64_t slot_of_key(const AxisWindow& window,
                                                     const geometry::Location& key,
                                                     const AxisNeighbors& queries, int64_t m) {
  const int64_t query = key.position + window.kernel_size - 1 - (queries.bias - m);
  return key.position - geometry::window_of(window, key.length, query).begin;
}

}  // namespace jax_natten
