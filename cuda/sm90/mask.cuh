// Which logits of a tile count: those of keys that the query sees.
//
// Of each run of 8 keys a lane has keys 2c and 2c + 1, c = lane mod 4, for two queries. For each
// query a word has a bit for every run of the tile, of keys 2c in its lower half, of keys 2c + 1 in
// its upper one. It is the conjunction of a word an axis, since a window is an interval on every
// axis; these are few, and a helping warp writes them beside the keys.
#pragma once

#include "cuda/sm90/config.cuh"

namespace jax_natten::sm90 {

inline constexpr int kLaneRows = 2;   // a lane's queries, 8 rows apart
inline constexpr int kHalfWord = 16;  // runs of a tile, at most

__device__ __forceinline__ int lane_id() { return static_cast<int>(threadIdx.x) % kWarp; }
__device__ __forceinline__ int warp_of_warpgroup() {
  return static_cast<int>(threadIdx.x) / kWarp % (kWarpgroup / kWarp);
}
// The consumer's row that the lane has, of 0 to 63.
__device__ __forceinline__ int lane_row(int r) {
  return warp_of_warpgroup() * 16 + r * 8 + lane_id() / 4;
}
// The step of a consumer's row along an axis of the block's box of queries.
__device__ __forceinline__ int step_of_row(const Shape& shape, int consumer, int row, int axis) {
  int shift = 0;
  for (int a = kAxes - 1; a > axis; --a) shift += shape.log_rows[a];
  const int within = row >> shift & ((1 << shape.log_rows[axis]) - 1);
  return within + (axis == shape.consumers_axis ? consumer << shape.log_rows[axis] : 0);
}

// Where a lane finds what its queries see.
struct LaneMask {
  int at[kLaneRows][kAxes];  // words of a tile's mask

  __device__ __forceinline__ LaneMask(const Shape& shape, int consumer) {
#pragma unroll
    for (int r = 0; r < kLaneRows; ++r) {
      int before = 0;
#pragma unroll
      for (int a = 0; a < kAxes; before += shape.queries[a++]) {
        const int step = step_of_row(shape, consumer, lane_row(r), a);
        at[r][a] = before + (a < kAxes - 1 ? step : 4 * step + lane_id() % 4);
      }
    }
  }

  template <int kQueries>
  __device__ __forceinline__ void read(const TileMask<kQueries>& mask,
                                       uint32_t (&words)[kLaneRows]) const {
#pragma unroll
    for (int r = 0; r < kLaneRows; ++r) {
      const auto& [x, y, z] = at[r];
      words[r] = conjunction(mask.words[x], mask.words[y], mask.words[z]);
    }
  }
};

// Whether a query, or a step of the block's queries along each axis, sees any key.
template <int kQueries>
__device__ __forceinline__ bool sees_any(const Plan<kQueries>& plan, const Shape& shape,
                                         const int (&step)[kAxes]) {
  const Span* axis = plan.seen;
  bool result = true;
#pragma unroll
  for (int a = 0; a < kAxes; axis += shape.queries[a++]) {
    result = result && axis[step[a]].begin < axis[step[a]].end;
  }
  return result;
}

// Logits of keys that a query does not see become -inf.
template <int kCount>
__device__ __forceinline__ void apply_mask(float (&s)[kCount], const uint32_t (&words)[kLaneRows]) {
#pragma unroll
  for (int r = 0; r < kLaneRows; ++r) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
#pragma unroll
      for (int run = 0; run < kCount / 4; ++run) {
        float& x = s[4 * run + 2 * r + e];
        x = words[r] & 1u << (e * kHalfWord + run) ? x : -INFINITY;
      }
    }
  }
}

// Whether the lane's queries see any of the lane's keys, of a tile of so many.
template <int kKeys>
__device__ __forceinline__ void sees_any_key(const uint32_t (&words)[kLaneRows],
                                             bool (&sees)[kLaneRows]) {
  constexpr uint32_t kRuns = (1u << kKeys / 8) - 1;
#pragma unroll
  for (int r = 0; r < kLaneRows; ++r) sees[r] = words[r] & (kRuns | kRuns << kHalfWord);
}

// Values of keys that do not exist, but have a place in the array, become 0: they may hold
// anything, and 0 times NaN is NaN. All threads of a warpgroup; each does it for itself.
template <typename Config, int kQueries>
__device__ __noinline__ void clear_missing_values(unsigned char* values, const Plan<kQueries>& plan,
                                                  const Shape& shape, const int (&first_key)[kAxes],
                                                  int barrier) {
  using Row = typename Config::ValueRow;
  constexpr int kUnits = Row::kChunkBytes / 16;
  const auto thread = static_cast<int>(threadIdx.x) % kWarpgroup;
  int left[kAxes];  // existing keys, from the tile's first
  for (int a = 0; a < kAxes; ++a) left[a] = plan.existing[a] - first_key[a];
  for (int i = thread; i < Config::kKeys * kUnits; i += kWarpgroup) {
    const int key = i / kUnits;
    const int x = key % shape.keys[2], y = key / shape.keys[2] % shape.keys[1];
    const int z = key / shape.keys[2] / shape.keys[1];
    if (z < left[0] && y < left[1] && x < left[2]) continue;
    for (int chunk = 0; chunk < Row::kChunks; ++chunk) {
      store_zeros(shared_address(values) + chunk * Config::kKeys * Row::kChunkBytes + i * 16);
    }
  }
  publish_writes();
  synchronize_warpgroup(barrier);
}

}  // namespace jax_natten::sm90
