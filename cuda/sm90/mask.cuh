// Which logits of a tile count: those of keys that the query sees.
//
// Of each run of 8 keys a lane has keys 2c and 2c + 1, c = lane mod 4, for two queries. For each
// query and each of the two a word has a bit for every run of the tile: the product of one pattern
// an axis, an interval of it, since a window is an interval on every axis.
#pragma once

#include "cuda/sm90/config.cuh"

namespace jax_natten::sm90 {

inline constexpr int kLaneRows = 2;  // a lane's queries, 8 rows apart

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

// Bits [begin, end) of 32, an interval that may reach beyond them.
__device__ __forceinline__ uint32_t bits_between(int begin, int end) {
  uint32_t from_begin, from_end;
  asm("shl.b32 %0, -1, %1;" : "=r"(from_begin) : "r"(max(begin, 0)));  // clamps at 32
  asm("shl.b32 %0, -1, %1;" : "=r"(from_end) : "r"(max(end, 0)));
  return from_begin & ~from_end;
}

// What the lane's queries see, in bits of masks.
struct Mask {
  Span rows[kLaneRows][kAxes - 1];  // along the first axes
  Span runs[kLaneRows][2];          // along the last, of keys 2c and of keys 2c + 1
  bool sees_any[kLaneRows];

  template <int kQueries>
  __device__ __forceinline__ Mask(const Plan<kQueries>& plan, const Shape& shape, int consumer) {
#pragma unroll
    for (int r = 0; r < kLaneRows; ++r) {
      sees_any[r] = true;
      const Span* axis = plan.seen;
#pragma unroll
      for (int a = 0; a < kAxes; axis += shape.queries[a++]) {
        const Span keys = axis[step_of_row(shape, consumer, lane_row(r), a)];
        sees_any[r] = sees_any[r] && keys.begin < keys.end;
        if (a < kAxes - 1) {
          rows[r][a] = {bits_of(shape, a, keys.begin), bits_of(shape, a, keys.end)};
          continue;
        }
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int past = kRun - 1 - 2 * (lane_id() % 4) - e;
          runs[r][e] = {bits_of(shape, a, keys.begin + past), bits_of(shape, a, keys.end + past)};
        }
      }
    }
  }

  // The words of a tile.
  __device__ __forceinline__ void words_of(const KeyBox& box, const Shape& shape,
                                           uint32_t (&words)[kLaneRows][2]) const {
    const auto pattern = [&](const Span& seen, int a) {
      const uint32_t bits = bits_between(seen.begin - box.bit[a], seen.end - box.bit[a]);
      return (bits & shape.period[a]) * shape.repeat[a];
    };
#pragma unroll
    for (int r = 0; r < kLaneRows; ++r) {
      const uint32_t planes = pattern(rows[r][0], 0) & pattern(rows[r][1], 1);
#pragma unroll
      for (int e = 0; e < 2; ++e) words[r][e] = planes & pattern(runs[r][e], 2);
    }
  }
};

// Logits of keys that a query does not see become -inf.
template <int kCount>
__device__ __forceinline__ void apply_mask(float (&s)[kCount],
                                           const uint32_t (&words)[kLaneRows][2]) {
#pragma unroll
  for (int r = 0; r < kLaneRows; ++r) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
#pragma unroll
      for (int run = 0; run < kCount / 4; ++run) {
        float& x = s[4 * run + 2 * r + e];
        x = words[r][e] & 1u << run ? x : -INFINITY;
      }
    }
  }
}

// Values of keys that do not exist, but have a place in the array, become 0: they may hold
// anything, and 0 times NaN is NaN. All threads of a warpgroup; each does it for itself.
template <typename Config, int kQueries>
__device__ __noinline__ void clear_missing_values(unsigned char* values, const Plan<kQueries>& plan,
                                                  const Shape& shape, const KeyBox& box,
                                                  int barrier) {
  using Row = typename Config::ValueRow;
  constexpr int kUnits = Row::kChunkBytes / 16;
  const auto thread = static_cast<int>(threadIdx.x) % kWarpgroup;
  int left[kAxes];  // existing keys, from the tile's first
  for (int a = 0; a < kAxes; ++a) {
    const int begin = a == kAxes - 1 ? box.bit[a] * kRun : box.bit[a] / shape.stride[a];
    left[a] = plan.existing[a] - begin;
  }
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
