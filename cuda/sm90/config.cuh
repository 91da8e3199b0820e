// What a kernel is compiled for: the size of its tiles, who computes them, and where all lies in
// shared memory.
//
// Three consumers where registers allow it: at head dim 64 the exponentials of a tile take as long
// as its products, and three warpgroups hide one behind the other better than two; at larger ones
// masks do where most tiles need one.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cuda/sm90/bias.h"
#include "cuda/sm90/plan.cuh"
#include "cuda/sm90/ptx.cuh"

namespace jax_natten::sm90 {

inline constexpr int kWarpgroup = 128;  // threads
inline constexpr int kRows = 1 << kLogRows;

// A row of so many channels, those beyond the arrays' being zeros. It lies in chunks of up to 128
// bytes, all rows of a chunk one after the other, the 16-byte units of a row swizzled by its
// number.
template <int kDim_>
struct Row {
  static constexpr int kDim = kDim_;
  static constexpr int kBytes = kDim * 2;
  static constexpr int kChannels = kDim % 64 == 0 ? 64 : 32;  // of a chunk
  static constexpr int kChunks = kDim / kChannels;
  static constexpr int kChunkBytes = kChannels * 2;
};

// What the queries of each step see of a tile of keys along each axis, one axis after the other: of
// the first two a word, of the last one a word for each of the four lanes that share a query.
template <int kQueries>
struct TileMask {
  static constexpr int kWords =
      4 * kQueries + kAxes - 1;  // at most: all steps are of the last axis
  uint32_t words[kWords];
  bool applies;  // else every query sees all of the tile
};

// kConsumers warpgroups, each of 64 queries, go together through tiles of kKeys keys that lie in
// kStages places. kBlocks run on a multiprocessor at once. kOverlaps: the logits of a tile are
// computed while the weights of the one before are applied; else other blocks fill the gaps.
// kBiases: room for entries of a head's table of biases, 0 in kernels without.
template <typename Element_, int kDim, int kValueDim, int kKeys_, int kConsumers_, int kStages_,
          int kBlocks_, bool kOverlaps_, int kBiases_>
struct Config {
  using Element = Element_;
  static constexpr int kKeys = kKeys_, kConsumers = kConsumers_, kStages = kStages_;
  static constexpr int kBlocks = kBlocks_;
  static constexpr bool kOverlaps = kOverlaps_;
  static constexpr int kBiases = kBiases_;
  static constexpr bool kHasBias = kBiases > 0;
  using Shape = std::conditional_t<kHasBias, BiasedShape, sm90::Shape>;

  using KeyRow = Row<kDim>;                                   // of queries too
  using ValueRow = Row<kValueDim>;                            // of outputs too
  static constexpr int kQueryBytes = kRows * KeyRow::kBytes;  // of a consumer
  static constexpr int kOutBytes = kRows * ValueRow::kBytes;
  static constexpr int kKeyBytes = kKeys * KeyRow::kBytes;  // of a stage
  static constexpr int kValueBytes = kKeys * ValueRow::kBytes;

  // The helpers follow the consumers: two warps, or, where consumers need the registers that
  // helpers can give, a warpgroup of their own, in which a third warp writes the masks.
  static constexpr bool kMovesRegisters = kConsumers > 1;
  static constexpr int kHelpers = kMovesRegisters ? kWarpgroup : 2 * kWarp;
  static constexpr bool kHasMaskWriter = kMovesRegisters;
  static constexpr int kThreads = kWarpgroup * kConsumers + kHelpers;
  static constexpr int kHelperRegisters = kConsumers == 2 ? 40 : 32;
  static constexpr int kConsumerRegisters = kConsumers == 2 ? 232 : 160;
  // A block shares out what it was launched with, and would wait for more forever.
  static constexpr int kLaunchRegisters = 65536 / kThreads / 8 * 8;
  static_assert(!kMovesRegisters || kConsumers * kConsumerRegisters + kHelperRegisters <=
                                        (kConsumers + 1) * kLaunchRegisters);

  // Whether a tile's logits are kept until its weights are known to be right, see Softmax.
  static constexpr bool kKeepsLogits = kOverlaps || kKeys >= 128;

  static constexpr int kQueries = kConsumers * kRows;
  static constexpr int kOtherBytes =  // plans, biases, masks and barriers
      2 * (sizeof(Plan<kQueries>) + 4 * kBiases) + kStages * sizeof(TileMask<kQueries>) + 1024;
  // Of shared memory, 1 KB of which the system takes for each block.
  static constexpr int kMostBytes = 227 * 1024 / kBlocks - (kBlocks > 1 ? 1024 : 0);
  // Outputs leave through memory of their own where there is room, so that the next queries can
  // come while they do; else through that of the queries.
  static constexpr bool kHasOut =
      kConsumers * (kQueryBytes + kOutBytes) + kStages * (kKeyBytes + kValueBytes) + kOtherBytes <=
      kMostBytes;
  static_assert(kHasOut || kOutBytes <= kQueryBytes);
};

// Barriers in pairs: something is there, and its place is free again. Every thread that has read
// there arrives at the second: one for its warp would be no faster, and racecheck could not follow.
struct Handover {
  Barrier full;
  Barrier free;
};

// A plan, and where there are biases the table of its head.
template <int kQueries, int kBiases>
struct PlanOf : Plan<kQueries> {
  float bias[kBiases];
};
template <int kQueries>
struct PlanOf<kQueries, 0> : Plan<kQueries> {};

template <typename Config>
struct Shared {
  static constexpr int kStages = Config::kStages, kQueries = Config::kQueries;

  alignas(1024) unsigned char q[Config::kConsumers][Config::kQueryBytes];
  alignas(1024) unsigned char k[kStages][Config::kKeyBytes];
  alignas(1024) unsigned char v[kStages][Config::kValueBytes];
  alignas(1024) unsigned char own_out[Config::kHasOut ? Config::kConsumers * Config::kOutBytes : 1];
  PlanOf<kQueries, Config::kBiases> plan[2];
  TileMask<kQueries> mask[kStages];  // with the keys
  int first_bias[kStages];           // the entry of a tile's first key in a table of biases
  int first_key[kStages][kAxes];     // with the values: from the first that the block's queries see
  Handover plans[2];
  Barrier windows[2];  // the plan's, which are there later
  Handover queries[Config::kConsumers];
  Handover keys[kStages];
  Handover values[kStages];
  Barrier turns[Config::kConsumers][kWarpgroup / kWarp];  // of each warp of the consumers
  // How far back, in a table of biases, a query has its entries.
  int row_bias[Config::kHasBias ? kQueries : 1];

  __device__ __forceinline__ unsigned char* out(int consumer) {
    return Config::kHasOut ? own_out + consumer * Config::kOutBytes : q[consumer];
  }

  __device__ void init_barriers() {
    for (Handover& plan : plans) {
      plan.full.init(kWarp);
      plan.free.init(kWarp * (1 + Config::kHasMaskWriter) + kWarpgroup * Config::kConsumers);
    }
    for (Barrier& window : windows) window.init(kWarp);
    for (Handover& query : queries) {
      query.full.init(1);
      query.free.init(1);
    }
    for (int i = 0; i < kStages; ++i) {
      keys[i].full.init(kWarp * (1 + Config::kHasMaskWriter));
      values[i].full.init(1);
      keys[i].free.init(kWarpgroup * Config::kConsumers);
      values[i].free.init(kWarpgroup * Config::kConsumers);
    }
    for (auto& of_consumer : turns) {
      for (Barrier& turn : of_consumer) turn.init(1);
    }
    publish_barriers();
  }
};

// The place in a ring, and the parity of the phase that its barriers are in.
template <int kPlaces>
struct Cursor {
  int place = 0;
  uint32_t parity = 0;

  __device__ __forceinline__ void advance() {
    if (++place == kPlaces) {
      place = 0;
      parity ^= 1;
    }
  }
};

}  // namespace jax_natten::sm90
