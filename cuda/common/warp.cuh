// The lanes that run together.
#pragma once

namespace jax_natten {

inline constexpr int kWarp = 32;
inline constexpr unsigned kAllLanes = ~0u;

}  // namespace jax_natten
