// A consumer's way through the tiles of columns. Of p = exp2(factor s - shift), which is
// exp(scale s - lse), and delta = ct_lse - ct . out:
//
//   kQueries   s = q k^T   t = ct v^T   ds = p (t + delta)   dq += ds k
//   kKeys      s = k q^T   t = v ct^T   ds = p (t + delta)   dk += ds q   dv += p ct
//
// The exponentials of a tile are taken while t is computed, and the last product of a tile is
// computed together with the first ones of the next.
#pragma once

#include "cuda/sm90/backward_producer.cuh"
#include "cuda/sm90/mainloop.cuh"

namespace jax_natten::sm90 {

// The shift that makes weights of logits, exp2(factor * logit - shift); the weights of a query that
// sees nothing are 0.
__device__ __forceinline__ float weight_shift(float lse) {
  return lse == -INFINITY ? INFINITY : lse * kLog2E;
}

template <typename Config>
struct BackwardConsumer {
  using Element = typename Config::Element;
  using Row = typename Config::Row;
  static constexpr bool kRowsAreKeys = Config::kRowsAreKeys;
  static constexpr int kColumns = Config::kColumns, kStages = Config::kStages;
  static constexpr int kLogits = kColumns / 2, kSumSize = Row::kDim / 2;  // of a lane
  static constexpr int kRuns = kColumns / kRun;
  using Logits = float[kLogits];
  using Weights = uint32_t[kLogits / 2];
  using Sum = float[kSumSize];

  BackwardShared<Config>& shared;
  const BackwardShape& shape;
  int number;  // of the consumers, uniform
  LaneMask mask;
  uint32_t row_word, column_word;
  Counter<kStages> stage;  // of all tiles

  __device__ __forceinline__ BackwardConsumer(BackwardShared<Config>& shared,
                                              const BackwardShape& shape, int number)
      : shared(shared),
        shape(shape),
        number(number),
        mask(shape, number),
        row_word(operand_at(shared.row[0][number])),
        column_word(operand_at(shared.column[0][0])) {}

  // s = rows columns^T of the arrays of a number, begun.
  template <int kArray>
  __device__ __forceinline__ void begin_logits(Logits& s) {
    constexpr int kSteps = Row::kChannels / 16;  // of a chunk
    const uint32_t rows = row_word + kArray * (Config::kConsumers * Config::kRowBytes >> 4);
    const uint32_t columns = column_word + kArray * (kStages * Config::kColumnBytes >> 4) +
                             stage.place() * (Config::kColumnBytes >> 4);
#pragma unroll
    for (int i = 0; i < Row::kDim / 16; ++i) {
      const int chunk = i / kSteps, within = i % kSteps * 32;
      Product<Element, kColumns>::rows(
          s, operand<Row>(rows, chunk * kRows * Row::kChunkBytes + within),
          operand<Row>(columns, chunk * kColumns * Row::kChunkBytes + within), i > 0);
    }
    commit_products();
  }

  // sum += weights columns, begun.
  template <int kArray>
  __device__ __forceinline__ void begin_sum(Sum& sum, const Weights& weights) {
    // With the distance of chunks, since the summed index runs over rows.
    constexpr uint32_t kDistance = ((kColumns * Row::kChunkBytes >> 4) - 1) << 16;
    const uint32_t columns = column_word + kDistance +
                             kArray * (kStages * Config::kColumnBytes >> 4) +
                             stage.place() * (Config::kColumnBytes >> 4);
#pragma unroll
    for (int i = 0; i < kColumns / 16; ++i) {
      Product<Element, Row::kDim>::weights(sum, weights + 4 * i,
                                           operand<Row>(columns, i * 16 * Row::kChunkBytes));
    }
    commit_products();
  }

  // The place of the tile before; the last one of a kernel nobody waits for.
  __device__ __forceinline__ void give_last_back() {
    if (stage.count > 0) shared.stages[stage.last_place()].free.arrive();
  }

  // The numbers of a lane's two columns of a run.
  __device__ __forceinline__ static float2 numbers_of(const float* numbers, int run) {
    return *reinterpret_cast<const float2*>(numbers + run * kRun + 2 * (lane_id() % 4));
  }

  // All tiles of columns of a plan, of so many heads. shift and delta are those of the lane's
  // rows, where these are queries.
  template <typename Plan>
  __device__ __forceinline__ void run(const Plan& plan, int heads, const float (&shift)[kLaneRows],
                                      const float (&delta)[kLaneRows], Sum (&sums)[Config::kSums]) {
    const int inner = InnerTiles(plan).count * heads, rim = plan.tile_count() * heads - inner;
    Logits s, t;
    Weights p, ds;
    if constexpr (kRowsAreKeys) {
      for (uint32_t& x : p) x = 0;
    }
    for (uint32_t& x : ds) x = 0;

    // Logits of a run become weights, of what is seen.
    const auto weigh = [&](int run, bool masked,
                           const uint32_t (&words)[kLaneRows]) __attribute__((always_inline)) {
      float2 of_columns{};
      if constexpr (kRowsAreKeys) of_columns = numbers_of(shared.numbers[stage.place()].lse, run);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int r = i / 2, e = i % 2;
        const float own = kRowsAreKeys ? (e == 0 ? of_columns.x : of_columns.y) * kLog2E : shift[r];
        float& x = s[4 * run + i];
        x = exp2_of(x * shape.factor - own);
        if (masked) x = words[r] & 1u << (e * kHalfWord + run) ? x : 0.f;
      }
    };
    // Gradients of a run's weights become those of logits.
    const auto grade = [&](int run) __attribute__((always_inline)) {
      float2 of_columns{};
      if constexpr (kRowsAreKeys) {
        of_columns = numbers_of(shared.numbers[stage.place()].delta, run);
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float own = kRowsAreKeys ? (i % 2 == 0 ? of_columns.x : of_columns.y) : delta[i / 2];
        t[4 * run + i] = s[4 * run + i] * (t[4 * run + i] + own);
      }
    };
    const auto round = [&](const Logits& from, Weights& to, int run)
                           __attribute__((always_inline)) {
                             to[2 * run] = pair<Element>(from[4 * run], from[4 * run + 1]);
                             to[2 * run + 1] = pair<Element>(from[4 * run + 2], from[4 * run + 3]);
                           };

    const auto visit = [&](auto masked) __attribute__((always_inline)) {
      constexpr bool kMasked = decltype(masked)::value;
      auto& place = shared.stages[stage.place()];
      uint32_t words[kLaneRows];
      place.full[0].wait(stage.parity());
      pin(s);
      begin_products();
      begin_logits<0>(s);
      wait_for_products<1>();
      pin(ds);
      if constexpr (kRowsAreKeys) pin(p);
      give_last_back();
      place.full[1].wait(stage.parity());
      pin(t);
      begin_products();
      begin_logits<1>(t);
      place.finished.wait(stage.parity());
      if constexpr (kMasked) mask.read(shared.mask[stage.place()], words);
      wait_for_products<Config::kOverlaps ? 1 : 0>();
      pin(s);
      if constexpr (!Config::kOverlaps) pin(t);
#pragma unroll
      for (int run = 0; run < kRuns; ++run) {
        weigh(run, kMasked, words);
        if constexpr (kRowsAreKeys) round(s, p, run);
        if constexpr (!Config::kOverlaps) {
          grade(run);
          round(t, ds, run);
        }
      }
      if constexpr (kRowsAreKeys) {
        pin(sums[1]);
        pin(p);
        begin_products();
        begin_sum<1>(sums[1], p);
      }
      if constexpr (Config::kOverlaps) {
        // What is there is waited for again: the compiler moves the wait for products no further up
        // than this, so that exponentials come before it.
        if constexpr (!kRowsAreKeys) place.full[1].wait(stage.parity());
        wait_for_products<kRowsAreKeys ? 1 : 0>();
        pin(t);
#pragma unroll
        for (int run = 0; run < kRuns; ++run) {
          grade(run);
          round(t, ds, run);
        }
      }
      pin(sums[0]);
      pin(ds);
      begin_products();
      begin_sum<0>(sums[0], ds);
      ++stage.count;
    };
    for (int left = rim; left > 0; --left) visit(std::true_type{});
    for (int left = inner; left > 0; --left) visit(std::false_type{});
    wait_for_products<0>();
#pragma unroll
    for (Sum& sum : sums) pin(sum);
  }
};

}  // namespace jax_natten::sm90
