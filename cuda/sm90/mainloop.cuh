// A consumer's way through the tiles of keys:
//   s = q k^T (+ biases), p = the weights of s, out = out * shrink + p v.
//
// In large blocks the product p v of a tile and the one of the next tile's s are begun together, by
// one consumer after the other: while the matrix units work on those of one, the others take their
// exponentials. Whether a tile needs a mask is asked between two tiles, when no product is under
// way.
#pragma once

#include "cuda/sm90/bias.cuh"
#include "cuda/sm90/products.cuh"
#include "cuda/sm90/softmax.cuh"

namespace jax_natten::sm90 {

// Where a product finds an operand in swizzled shared memory: its address and, where the summed
// index runs over its rows, the distance of its chunks, in units of 16 bytes. All that changes
// while a kernel runs is in this word, so that a step is one addition.
__device__ __forceinline__ uint32_t operand_at(const void* memory, uint32_t chunk_bytes = 16) {
  return shared_address(memory) >> 4 | (chunk_bytes >> 4) << 16;
}

// The operand so many bytes on. The high word: the distance of groups of 8 rows, and the swizzle.
template <typename Row>
__device__ __forceinline__ uint64_t operand(uint32_t word, uint32_t bytes) {
  constexpr uint32_t kSwizzle = Row::kChunkBytes == 128 ? 1 : 2;
  constexpr uint32_t kHigh = (8 * Row::kChunkBytes) >> 4 | kSwizzle << 30;
  return uint64_t{kHigh} << 32 | (word + (bytes >> 4));
}

template <typename Config>
struct Consumer {
  using Element = typename Config::Element;
  using KeyRow = typename Config::KeyRow;
  using ValueRow = typename Config::ValueRow;
  static constexpr int kKeys = Config::kKeys;
  static constexpr int kLogits = kKeys / 2, kOutputs = ValueRow::kDim / 2;  // of a lane

  Shared<Config>& shared;
  const typename Config::Shape& shape;
  int number;  // of the consumers, uniform
  bool is_leader;
  LaneMask mask;
  uint32_t turn;  // the parity of the next one
  uint32_t q_word, k_word, v_word;
  Cursor<Config::kStages> key, value;

  __device__ __forceinline__ Consumer(Shared<Config>& shared, const typename Config::Shape& shape,
                                      int number)
      : shared(shared),
        shape(shape),
        number(number),
        is_leader(threadIdx.x % kWarpgroup == 0),
        mask(shape, number),
        turn(number == 0),
        q_word(operand_at(shared.q[number])),
        k_word(operand_at(shared.k[0])),
        v_word(operand_at(shared.v[0], kKeys * ValueRow::kChunkBytes)) {}

  // s = q k^T, or that is added to s, begun.
  __device__ __forceinline__ void begin_logits(float (&s)[kLogits]) {
    constexpr int kSteps = KeyRow::kChannels / 16;  // of a chunk
    const uint32_t k = k_word + key.place * (Config::kKeyBytes >> 4);
#pragma unroll
    for (int i = 0; i < KeyRow::kDim / 16; ++i) {
      const int chunk = i / kSteps, within = i % kSteps * 32;
      Product<Element, kKeys>::rows(
          s, operand<KeyRow>(q_word, chunk * kRows * KeyRow::kChunkBytes + within),
          operand<KeyRow>(k, chunk * kKeys * KeyRow::kChunkBytes + within),
          Config::kHasBias || i > 0);
    }
    commit_products();
  }

  // out += p v, begun.
  __device__ __forceinline__ void begin_outputs(float (&out)[kOutputs],
                                                const uint32_t (&p)[kLogits / 2]) {
    const uint32_t v = v_word + value.place * (Config::kValueBytes >> 4);
#pragma unroll
    for (int i = 0; i < kKeys / 16; ++i) {
      Product<Element, ValueRow::kDim>::weights(
          out, p + 4 * i, operand<ValueRow>(v, i * 16 * ValueRow::kChunkBytes));
    }
    commit_products();
  }

  __device__ __forceinline__ static void scale_rows(float (&out)[kOutputs],
                                                    const float (&factor)[kLaneRows]) {
#pragma unroll
    for (int i = 0; i < kOutputs; ++i) out[i] *= factor[i / 2 % 2];
  }

  template <int kPlaces>
  __device__ __forceinline__ void give_back(Handover (&places)[kPlaces], Cursor<kPlaces>& cursor) {
    places[cursor.place].free.arrive();
    cursor.advance();
  }

  // Consumers begin their products in turn, each warp after that of the consumer before. The matrix
  // units would else serve them alternately: all would wait for the products of all, and then all
  // would take exponentials.
  __device__ __forceinline__ void take_turn() {
    if constexpr (Config::kConsumers > 1) {
      shared.turns[number][warp_of_warpgroup()].wait(turn);
      turn ^= 1;
    }
  }
  __device__ __forceinline__ void pass_turn() {
    if constexpr (Config::kConsumers > 1) {
      const int next = number + 1 < Config::kConsumers ? number + 1 : 0;
      if (lane_id() == 0) shared.turns[next][warp_of_warpgroup()].arrive();
    }
  }

  // The tile whose logits come next.
  template <typename Plan>
  __device__ __forceinline__ void begin_with_biases(const Plan& plan, float (&s)[kLogits]) {
    const int row = number * kRows + lane_row(0);
    load_biases(s, plan.bias + shared.first_bias[key.place] - shared.row_bias[row], shape);
  }

  // Before the values of a tile are used, of a plan that has missing ones.
  template <typename Plan>
  __device__ __forceinline__ void clear_values(const Plan& plan) {
    shared.values[value.place].full.wait(value.parity);
    clear_missing_values<Config>(shared.v[value.place], plan, shape, shared.first_key[value.place],
                                 1 + number);
  }

  // All tiles of keys of a plan, which has at least one; after_queries() once the queries have been
  // read for the last time.
  template <typename Plan, typename AfterQueries>
  __device__ __forceinline__ void run(const Plan& plan, Softmax& softmax, float (&out)[kOutputs],
                                      AfterQueries&& after_queries) {
    const int tiles = plan.tile_count();
    const bool clears = plan.has_missing_keys;
    int tile = 0;
    float s[kLogits];
    uint32_t p[kLogits / 2];

    // The weights of the next tile's logits, of which `words` tell what is seen.
    const auto add_weights =
        [&](auto masked, bool is_first, const uint32_t (&words)[kLaneRows])
            __attribute__((always_inline)) {
              float shrink[kLaneRows];
              bool sees[kLaneRows] = {true, true};
              if constexpr (decltype(masked)::value) sees_any_key<kKeys>(words, sees);
              const bool moves =
                  softmax.template add<Element, Config::kKeepsLogits>(s, sees, is_first, p, shrink);
              if (moves && !is_first) scale_rows(out, shrink);
            };

    // The logits of the next tile, and their weights.
    const auto weigh = [&](auto masked) __attribute__((always_inline)) {
      constexpr bool kMasked = decltype(masked)::value;
      uint32_t words[kLaneRows];
      if constexpr (Config::kHasBias) begin_with_biases(plan, s);
      take_turn();
      pin(s);
      begin_products();
      begin_logits(s);
      pass_turn();
      if constexpr (kMasked) mask.read(shared.mask[key.place], words);
      wait_for_products<0>();
      pin(s);
      give_back(shared.keys, key);
      if constexpr (kMasked) apply_mask(s, words);
      add_weights(masked, Config::kOverlaps || tile == 0, words);
      if (kMasked && clears) clear_values(plan);
    };

    const auto wait_for_outputs = [&]() __attribute__((always_inline)) {
      wait_for_products<0>();
      pin(out);
      pin(p);
      give_back(shared.values, value);
    };
    // The outputs of the tile whose weights are there.
    const auto apply_weights = [&]() __attribute__((always_inline)) {
      shared.values[value.place].full.wait(value.parity);
      pin(out);
      pin(p);
      begin_products();
      begin_outputs(out, p);
      wait_for_outputs();
    };

    // Both: the outputs of the tile whose weights are there, and the weights of the next one.
    const auto overlapped = [&](auto masked) __attribute__((always_inline)) {
      constexpr bool kMasked = decltype(masked)::value;
      uint32_t words[kLaneRows];
      if constexpr (Config::kHasBias) begin_with_biases(plan, s);
      take_turn();
      pin(s);
      pin(out);
      pin(p);
      begin_products();
      begin_logits(s);
      shared.values[value.place].full.wait(value.parity);
      begin_products();
      begin_outputs(out, p);
      pass_turn();
      if constexpr (kMasked) mask.read(shared.mask[key.place], words);
      wait_for_products<1>();
      pin(s);
      give_back(shared.keys, key);
      if constexpr (kMasked) apply_mask(s, words);
      wait_for_outputs();
      add_weights(masked, false, words);
      if (kMasked && clears) clear_values(plan);
    };

    const auto is_masked = [&] {
      shared.keys[key.place].full.wait(key.parity);
      return __any_sync(kAllLanes, shared.mask[key.place].applies);
    };
    if constexpr (Config::kOverlaps) {
      if (is_masked()) {
        weigh(std::true_type{});
      } else {
        weigh(std::false_type{});
      }
      for (tile = 1; tile < tiles; ++tile) {
        if (is_masked()) {
          overlapped(std::true_type{});
        } else {
          overlapped(std::false_type{});
        }
      }
      after_queries();
      apply_weights();
    } else {
      const auto one_by_one = [&](auto masked) __attribute__((always_inline)) {
        weigh(masked);
        apply_weights();
      };
      for (; tile < tiles; ++tile) {
        if (is_masked()) {
          one_by_one(std::true_type{});
        } else {
          one_by_one(std::false_type{});
        }
      }
      after_queries();
    }
  }
};

}  // namespace jax_natten::sm90
