// What a backward kernel is compiled for, and where all lies in shared memory.
//
// A block has rows, 64 for each consumer, and goes through tiles of the columns that they see: of
// keys where rows are queries, of queries where rows are keys. Both have two arrays, of which
// products make logits and gradients of weights:
//
//              rows     columns   sums
//   kQueries   q, ct    k, v      dq
//   kKeys      k, v     q, ct     dk, dv
#pragma once

#include "cuda/sm90/config.cuh"

namespace jax_natten::sm90 {

struct BackwardShape : Shape {
  float factor;  // of logits, to powers of two
};

// kConsumers warpgroups, each of 64 rows, go together through tiles of kColumns columns that lie in
// kStages places. kBlocks run on a multiprocessor at once. kOverlaps: the exponentials of a tile
// are taken while its gradients of weights are computed; else there are no registers for it.
template <typename Element_, Side kSide_, int kDim, int kColumns_, int kConsumers_, int kStages_,
          int kBlocks_, bool kOverlaps_>
struct BackwardConfig {
  using Element = Element_;
  using Shape = BackwardShape;
  static constexpr Side kSide = kSide_;
  static constexpr bool kRowsAreKeys = kSide == Side::kKeys;
  static constexpr int kSums = kRowsAreKeys ? 2 : 1;
  static constexpr int kColumns = kColumns_, kConsumers = kConsumers_, kStages = kStages_;
  static constexpr int kBlocks = kBlocks_;
  static constexpr bool kOverlaps = kOverlaps_;
  static_assert((kStages & (kStages - 1)) == 0);

  using Row = sm90::Row<kDim>;
  static constexpr int kQueries = kConsumers * kRows;          // of a block: rows
  static constexpr int kRowBytes = kRows * Row::kBytes;        // of a consumer, an array
  static constexpr int kColumnBytes = kColumns * Row::kBytes;  // of a stage, an array

  static constexpr int kThreads = kWarpgroup * (kConsumers + 1);
  // Of a lane: sums, logits, gradients of weights, weights.
  static constexpr int kNumbers = kSums * kDim / 2 + kColumns + (kOverlaps ? kColumns / 4 : 0);
  static constexpr int kConsumerRegisters =
      kConsumers > 1 ? (kNumbers > 200 ? 240 : 232) : (kNumbers > 150 ? 232 : 184);
  // Helpers have what consumers leave them.
  static constexpr int kThreadRegisters = 65536 / kBlocks / kThreads / 8 * 8;
  static constexpr int kHelperRegisters =
      (kThreadRegisters * (kConsumers + 1) - kConsumerRegisters * kConsumers) / 8 * 8;
};

template <typename Config>
struct BackwardShared {
  static constexpr int kStages = Config::kStages, kConsumers = Config::kConsumers;

  // What the queries of a tile have beside their rows, where these are columns.
  struct Numbers {
    alignas(16) float lse[Config::kRowsAreKeys ? Config::kColumns : 1];
    alignas(16) float delta[Config::kRowsAreKeys ? Config::kColumns : 1];
  };
  struct Stage {
    Barrier full[2];   // of both arrays
    Barrier finished;  // mask and numbers
    Barrier free;
    Barrier raw;  // both arrays are there, where missing columns are yet to be cleared
  };

  alignas(1024) unsigned char row[2][kConsumers][Config::kRowBytes];
  alignas(1024) unsigned char column[2][kStages][Config::kColumnBytes];
  Plan<Config::kQueries> plan[2];
  Numbers numbers[kStages];
  TileMask<Config::kQueries> mask[kStages];
  Handover plans[2];
  Barrier windows[2];  // the plan's, which are there later
  Handover rows[kConsumers];
  Stage stages[kStages];

  __device__ void init_barriers() {
    for (Handover& handover : plans) {
      handover.full.init(kWarp);
      // The loading thread, two other helpers and the consumers.
      handover.free.init(1 + 2 * kWarp + kWarpgroup * kConsumers);
    }
    for (Barrier& window : windows) window.init(kWarp);
    for (Handover& handover : rows) {
      handover.full.init(1);
      handover.free.init(1);
    }
    for (Stage& stage : stages) {
      for (Barrier& full : stage.full) full.init(1);
      stage.finished.init(Config::kRowsAreKeys ? 2 * kWarp : kWarp);
      stage.raw.init(1);
      stage.free.init(kWarpgroup * kConsumers);
    }
    publish_barriers();
  }
};

// The place in a ring of a power of two of places, and the parity of the phase that its barriers
// are in, as one number: consumers have no register to spare.
template <int kPlaces>
struct Counter {
  uint32_t count = 0;

  __device__ __forceinline__ uint32_t place() const { return count % kPlaces; }
  __device__ __forceinline__ uint32_t last_place() const { return (count - 1) % kPlaces; }
  __device__ __forceinline__ uint32_t parity() const { return count / kPlaces % 2; }
};

}  // namespace jax_natten::sm90
