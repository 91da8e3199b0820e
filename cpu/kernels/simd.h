// Vectors of one instruction set, as the compiler's own vector types.
//
// The file that includes the kernels names the instruction set's namespace, JAX_NATTEN_TARGET, the
// bytes of its vectors, JAX_NATTEN_VECTOR_BYTES, and how many registers it has for them,
// JAX_NATTEN_VECTOR_REGISTERS.
#pragma once

#include <cstddef>
#include <cstdint>
#include <iterator>
#include <limits>
#include <type_traits>
#include <utility>

#define JAX_NATTEN_INLINE inline __attribute__((always_inline))
#define JAX_NATTEN_LAMBDA __attribute__((always_inline))
// Before a loop of few constant steps over vectors that are to stay in registers.
#define JAX_NATTEN_UNROLL _Pragma("GCC unroll 32")

namespace jax_natten::JAX_NATTEN_TARGET {

template <typename T>
struct Simd {
  using Bits = std::conditional_t<sizeof(T) == 8, int64_t, int32_t>;
  typedef T Vector __attribute__((vector_size(JAX_NATTEN_VECTOR_BYTES)));
  typedef Bits Mask __attribute__((vector_size(JAX_NATTEN_VECTOR_BYTES)));
  typedef T Unaligned
      __attribute__((vector_size(JAX_NATTEN_VECTOR_BYTES), aligned(alignof(T)), may_alias));
};

template <typename T>
using Vector = typename Simd<T>::Vector;
template <typename T>
using Mask = typename Simd<T>::Mask;

template <typename T>
inline constexpr int kWidth = JAX_NATTEN_VECTOR_BYTES / static_cast<int>(sizeof(T));
inline constexpr int kRegisters = JAX_NATTEN_VECTOR_REGISTERS;

template <typename T>
inline constexpr T kInfinity = std::numeric_limits<T>::infinity();

template <typename T>
JAX_NATTEN_INLINE Vector<T> load(const T* from) {
  return *reinterpret_cast<const typename Simd<T>::Unaligned*>(from);
}

template <typename T>
JAX_NATTEN_INLINE void store(T* to, Vector<T> value) {
  *reinterpret_cast<typename Simd<T>::Unaligned*>(to) = value;
}

template <typename T>
JAX_NATTEN_INLINE Vector<T> splat(T value) {
  return Vector<T>{} + value;
}

// ---- float16, a vector of floats at a time where instructions convert it

typedef int16_t Halves __attribute__((vector_size(JAX_NATTEN_VECTOR_BYTES / 2)));

#if JAX_NATTEN_VECTOR_BYTES == 64
inline constexpr bool kConvertsFloat16 = true;

JAX_NATTEN_INLINE Vector<float> widen_halves(Halves halves) {
  return __builtin_ia32_vcvtph2ps512_mask(halves, Vector<float>{}, -1, 4);  // as rounding is set
}

JAX_NATTEN_INLINE Halves narrow_to_halves(Vector<float> value) {
  return __builtin_ia32_vcvtps2ph512_mask(value, 0, Halves{}, -1);  // to nearest even
}
#elif JAX_NATTEN_VECTOR_BYTES == 32
inline constexpr bool kConvertsFloat16 = true;

JAX_NATTEN_INLINE Vector<float> widen_halves(Halves halves) {
  return __builtin_ia32_vcvtph2ps256(halves);
}

JAX_NATTEN_INLINE Halves narrow_to_halves(Vector<float> value) {
  return __builtin_ia32_vcvtps2ph256(value, 0);  // to nearest even
}
#else
inline constexpr bool kConvertsFloat16 = false;

Vector<float> widen_halves(Halves halves);  // not called
Halves narrow_to_halves(Vector<float> value);
#endif

// ---- stores past the caches, of results that they could not keep until something reads them

// Copies the bytes of a vector; `to` is aligned to them.
JAX_NATTEN_INLINE void copy_past_caches(void* to, const void* from) {
  using V = Vector<float>;
  const V value = load(static_cast<const float*>(from));
#if defined(__clang__)
  __builtin_nontemporal_store(value, static_cast<V*>(to));
#elif !defined(__x86_64__)
  store(static_cast<float*>(to), value);
#elif JAX_NATTEN_VECTOR_BYTES == 64
  __builtin_ia32_movntps512(static_cast<float*>(to), value);
#elif JAX_NATTEN_VECTOR_BYTES == 32
  __builtin_ia32_movntps256(static_cast<float*>(to), value);
#else
  __builtin_ia32_movntps(static_cast<float*>(to), value);
#endif
}

// Orders such stores before all that follow, as others must see them where a task is done.
JAX_NATTEN_INLINE void fence_past_caches() {
#ifdef __x86_64__
  __builtin_ia32_sfence();
#else
  __atomic_thread_fence(__ATOMIC_RELEASE);
#endif
}

// Lanes of consecutive ints, as wide as T's.
template <typename T>
JAX_NATTEN_INLINE Mask<T> load_ints(const int* from) {
  Mask<T> result;
  for (int l = 0; l < kWidth<T>; ++l) result[l] = from[l];
  return result;
}

// A NaN in `a` gives `b`.
template <typename V>
JAX_NATTEN_INLINE V largest(V a, V b) {
  return a > b ? a : b;
}

// What masked lanes have; the mask that all lanes pass is a type of its own.
struct AllLanes {};

template <typename M, typename V>
JAX_NATTEN_INLINE V select(M mask, V yes, V no) {
  return mask ? yes : no;
}

template <typename V>
JAX_NATTEN_INLINE V select(AllLanes, V yes, V) {
  return yes;
}

// ---- exponential and logarithm, of base 2

template <typename T>
struct Format;

template <>
struct Format<float> {
  static constexpr int kMantissa = 23;
  static constexpr float kBias = 127;
  static constexpr float kToInteger = 0x1.8p23f;  // adding it rounds to an integer
  // 2^x on [-1/2, 1/2] to 1e-7, by descending power.
  static constexpr float kExp2[] = {1.326472731307149e-3f, 9.671512991189957e-3f,
                                    5.550733581185341e-2f, 2.4022242426872253e-1f,
                                    6.931470036506653e-1f, 1.f};
  static constexpr int kTerms = std::size(kExp2);
  static constexpr int kLogTerms = 5;
};

template <>
struct Format<double> {
  static constexpr int kMantissa = 52;
  static constexpr double kBias = 1023;
  static constexpr double kToInteger = 0x1.8p52;
  // ln(2)^n / n!
  static constexpr double kExp2[] = {1.3691488853904124e-12, 2.5678435993488196e-11,
                                     4.44553827187081e-10,   7.054911620801121e-09,
                                     1.0178086009239696e-07, 1.3215486790144305e-06,
                                     1.5252733804059838e-05, 1.5403530393381606e-04,
                                     1.3333558146428441e-03, 9.618129107628477e-03,
                                     5.5504108664821576e-02, 2.402265069591007e-01,
                                     6.931471805599453e-01,  1.0};
  static constexpr int kTerms = std::size(kExp2);
  static constexpr int kLogTerms = 11;
};

// 2^x for x up to 0 and somewhat above; 0 far below the normal numbers, NaN of NaN.
template <typename T>
JAX_NATTEN_INLINE Vector<T> exp2(Vector<T> x) {
  using F = Format<T>;
  x = largest(splat<T>(-F::kBias), x);  // whose power has no bit set
  // The sum's last bits are those of the power's exponent.
  const Vector<T> sum = x + (F::kToInteger + F::kBias);
  const Vector<T> rest = x - (sum - (F::kToInteger + F::kBias));
  Vector<T> result = splat<T>(F::kExp2[0]);
  JAX_NATTEN_UNROLL
  for (int n = 1; n < F::kTerms; ++n) result = result * rest + F::kExp2[n];
  const auto power = reinterpret_cast<Mask<T>>(sum) << F::kMantissa;
  return result * reinterpret_cast<Vector<T>>(power);
}

// The logarithm to base e; of 0 it is -infinity, of NaN NaN. No other argument below the normal
// numbers.
template <typename T>
JAX_NATTEN_INLINE Vector<T> log(Vector<T> x) {
  using F = Format<T>;
  constexpr T kSqrtHalf = static_cast<T>(0.70710678118654752440);
  constexpr T kLn2 = static_cast<T>(0.69314718055994530942);
  const auto bits = reinterpret_cast<Mask<T>>(x);
  const auto least = reinterpret_cast<Mask<T>>(splat<T>(kSqrtHalf));
  // x = m 2^e with m in [sqrt(1/2), sqrt(2))
  const Mask<T> exponent = (bits - least) >> F::kMantissa;
  const auto m = reinterpret_cast<Vector<T>>(bits - (exponent << F::kMantissa));
  const Vector<T> e =
      reinterpret_cast<Vector<T>>(exponent + reinterpret_cast<Mask<T>>(splat<T>(F::kToInteger))) -
      F::kToInteger;
  // log m = 2 artanh((m - 1) / (m + 1))
  const Vector<T> t = (m - 1) / (m + 1), square = t * t;
  Vector<T> series = splat<T>(T{1} / (2 * F::kLogTerms - 1));
  JAX_NATTEN_UNROLL
  for (int n = F::kLogTerms - 1; n > 0; --n) series = series * square + T{1} / (2 * n - 1);
  const Vector<T> result = 2 * t * series + e * kLn2;
  const Vector<T> special = select(x == Vector<T>{}, splat<T>(-kInfinity<T>), x);
  return select((x > Vector<T>{}), result, special);
}

// ---- transposition

template <typename T, int kStep, size_t... kLane>
JAX_NATTEN_INLINE void exchange(Vector<T>& a, Vector<T>& b, std::index_sequence<kLane...>) {
  constexpr int kLanes = kWidth<T>;
  const Vector<T> low = __builtin_shufflevector(
      a, b, ((kLane & kStep) != 0 ? int(kLane ^ kStep) + kLanes : int(kLane))...);
  const Vector<T> high = __builtin_shufflevector(
      a, b, ((kLane & kStep) != 0 ? int(kLane) + kLanes : int(kLane ^ kStep))...);
  a = low;
  b = high;
}

// The square of as many vectors as a vector has lanes.
template <typename T, int kStep = 1>
JAX_NATTEN_INLINE void transpose(Vector<T> (&rows)[kWidth<T>]) {
  if constexpr (kStep < kWidth<T>) {
    JAX_NATTEN_UNROLL
    for (int i = 0; i < kWidth<T>; ++i) {
      if ((i & kStep) == 0) {
        exchange<T, kStep>(rows[i], rows[i ^ kStep], std::make_index_sequence<kWidth<T>>());
      }
    }
    transpose<T, 2 * kStep>(rows);
  }
}

}  // namespace jax_natten::JAX_NATTEN_TARGET
