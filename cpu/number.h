// Element types: float64, float32, float16 and bfloat16, and the types they are summed in.
//
// The half types are bits; their conversions are integer and float arithmetic without branches, so
// that loops over them vectorise on any processor. They round to nearest even, keep subnormals,
// infinities and NaN, and hold where XLA's threads flush float subnormals to zero.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

namespace jax_natten {

struct Float16 {
  uint16_t bits;
};

struct BFloat16 {
  uint16_t bits;
};

// The type that sums, softmax statistics and biases are in.
template <typename Element>
using Accumulator = std::conditional_t<std::is_same_v<Element, double>, double, float>;

inline uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

inline float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

inline double widen(double value) { return value; }
inline float widen(float value) { return value; }
inline float widen(BFloat16 value) { return float_of(static_cast<uint32_t>(value.bits) << 16); }

inline float widen(Float16 value) {
  constexpr uint32_t kRebias = (127 - 15) << 23;
  const uint32_t magnitude = value.bits & 0x7fffu;
  const uint32_t sign = (value.bits & 0x8000u) << 16;
  const uint32_t normal = (magnitude << 13) + kRebias;
  const uint32_t special = normal + kRebias;  // infinity and NaN have float's largest exponent
  const uint32_t subnormal =
      bits_of(static_cast<float>(static_cast<int32_t>(magnitude)) * 0x1p-24f);
  const uint32_t finite = magnitude < 0x0400u ? subnormal : normal;
  return float_of(sign | (magnitude < 0x7c00u ? finite : special));
}

// narrow(x, Element{}) rounds to Element; the second argument only names the type.
inline double narrow(double value, double) { return value; }
inline float narrow(float value, float) { return value; }

inline BFloat16 narrow(float value, BFloat16) {
  const uint32_t bits = bits_of(value);
  const uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  const uint32_t nan = bits >> 16 | 0x0040u;
  return {static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? nan : rounded)};
}

inline Float16 narrow(float value, Float16) {
  constexpr uint32_t kRebias = (127 - 15) << 10;
  const uint32_t bits = bits_of(value);
  const uint32_t magnitude = bits & 0x7fffffffu;
  const uint32_t normal = ((magnitude + 0x0fffu + (magnitude >> 13 & 1u)) >> 13) - kRebias;
  // Next to 1/2 a float's last place is 2^-24, which is float16's: the addition rounds.
  const uint32_t subnormal = bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f);
  const uint32_t nan = (magnitude >> 13 & 0x03ffu) | 0x7e00u;
  const uint32_t finite = magnitude < 0x38800000u ? subnormal : normal;  // below 2^-14
  const uint32_t inexact = magnitude < 0x477ff000u ? finite : 0x7c00u;   // from 65520 on
  const uint32_t result = magnitude > 0x7f800000u ? nan : inexact;
  return {static_cast<uint16_t>(result | (bits >> 16 & 0x8000u))};
}

}  // namespace jax_natten
