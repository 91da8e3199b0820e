// The masks of tiles, as a warp of helpers writes them: see mask.cuh.
#pragma once

#include "cuda/sm90/bias.cuh"
#include "cuda/sm90/mask.cuh"

namespace jax_natten::sm90 {

// Bits [begin, end) of 32, an interval that may reach beyond them.
__device__ __forceinline__ uint32_t bits_between(int begin, int end) {
  uint32_t from_begin, from_end;
  asm("shl.b32 %0, -1, %1;" : "=r"(from_begin) : "r"(max(begin, 0)));  // clamps at 32
  asm("shl.b32 %0, -1, %1;" : "=r"(from_end) : "r"(max(end, 0)));
  return from_begin & ~from_end;
}

// Writes what the steps of a block's queries see of its tiles. All lanes of a warp: each has one
// step of the first two axes and a quarter of one of the last at hand, in bits, and looks up what
// there are beyond 32 and 8.
template <typename Config>
struct MaskWriter {
  static constexpr int kLast = kAxes - 1;

  int planes, before_last;  // steps of the first axis, and of the first two
  int axis;                 // of the lane's step of these
  Span own, own_runs[2];

  __device__ __forceinline__ void begin(const Plan<Config::kQueries>& plan, const Shape& shape) {
    planes = shape.queries[0];
    before_last = planes + shape.queries[1];
    axis = lane_id() < planes ? 0 : 1;
    own = bits_of(plan, shape, min(lane_id(), before_last - 1), axis);
    const int step = min(lane_id() / 4, shape.queries[kLast] - 1);
    for (int e = 0; e < 2; ++e) own_runs[e] = runs_of(plan, step, e);
  }

  __device__ __forceinline__ Span bits_of(const Plan<Config::kQueries>& plan, const Shape& shape,
                                          int step, int a) const {
    const Span keys = plan.seen[step];
    return {keys.begin * shape.stride[a], keys.end * shape.stride[a]};
  }
  // Of keys 2c and 2c + 1 of the runs.
  __device__ __forceinline__ Span runs_of(const Plan<Config::kQueries>& plan, int step,
                                          int e) const {
    const Span keys = plan.seen[before_last + step];
    const int past = kRun - 1 - 2 * (lane_id() % 4) - e;
    return {(keys.begin + past) >> kLogRun, (keys.end + past) >> kLogRun};
  }

  __device__ __forceinline__ static uint32_t pattern(const Shape& shape, const Span& seen,
                                                     int begin, int a) {
    const uint32_t bits = bits_between(seen.begin - begin, seen.end - begin);
    return (bits & shape.period[a]) * shape.repeat[a];
  }

  // The words of a tile, and which entry of a table of biases its first key has.
  __device__ __forceinline__ void write(Shared<Config>& shared, int place,
                                        const Plan<Config::kQueries>& plan,
                                        const Problem<kAxes>& problem,
                                        const typename Config::Shape& shape,
                                        const int (&tile)[kAxes]) const {
    auto& mask = shared.mask[place];
    const bool applies = !plan.is_inner(tile);
    if (lane_id() == 0) {
      mask.applies = applies;
      if constexpr (Config::kHasBias) {
        shared.first_bias[place] = first_bias(plan, problem, shape, tile);
      }
    }
    if (applies) write_words(mask.words, plan, shape, tile);
  }

  __device__ __forceinline__ void write_words(uint32_t* words, const Plan<Config::kQueries>& plan,
                                              const Shape& shape, const int (&tile)[kAxes]) const {
    int begin[kAxes];  // of the tile, in bits
#pragma unroll
    for (int a = 0; a < kAxes; ++a) {
      begin[a] = tile[a] * (a < kLast ? shape.keys[a] * shape.stride[a] : shape.keys[a] >> kLogRun);
    }
    if (lane_id() < before_last) {
      words[lane_id()] = pattern(shape, own, axis == 0 ? begin[0] : begin[1], axis);
    }
    for (int i = lane_id() + kWarp; i < before_last; i += kWarp) {
      const int a = i < planes ? 0 : 1;
      words[i] = pattern(shape, bits_of(plan, shape, i, a), a == 0 ? begin[0] : begin[1], a);
    }
    uint32_t* of_runs = words + before_last + lane_id() % 4;
    const auto write_runs = [&](int step, const Span& even, const Span& odd) {
      of_runs[4 * step] = pattern(shape, even, begin[kLast], kLast) |
                          pattern(shape, odd, begin[kLast], kLast) << kHalfWord;
    };
    int step = lane_id() / 4;
    if (step < shape.queries[kLast]) write_runs(step, own_runs[0], own_runs[1]);
    for (step += kWarp / 4; step < shape.queries[kLast]; step += kWarp / 4) {
      write_runs(step, runs_of(plan, step, 0), runs_of(plan, step, 1));
    }
  }
};

}  // namespace jax_natten::sm90
