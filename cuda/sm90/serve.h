// Which calls these kernels serve, on a GPU that runs them.
#pragma once

#include <cstdint>

#include "cuda/sm90/shape.h"

namespace jax_natten::sm90 {

// The copy engine loads tiles of as few keys as an axis' dilation leaves room for; where that
// leaves no tile that lies in the window's axes, keys would be loaded in vain.
inline bool has_room(const Problem<kAxes>& problem, int rank) {
  const AxisWindow& last = problem.window[kAxes - 1];
  constexpr int64_t kLeastTile = 64;
  return rank > 1 || fits_box(kLeastTile, last.dilation);
}

// Whether the copy engine can read rows that a kernel pads: their map has an axis of heads, which
// leaves none for the samples of three axes.
inline bool has_padded_maps(const Problem<kAxes>& problem) {
  return problem.samples == 1 || (problem.query_shape[0] == 1 && problem.key_shape[0] == 1);
}

// Biases are divided by the scale, and whether their table fits in shared memory is told later.
inline bool has_small_biases(const Problem<kAxes>& problem) {
  return problem.scale > 1e-12 && problem.biases() < 1 << 16;
}

// Whether the kernels know everything that a fused call asks for.
inline bool can_serve(const Problem<kAxes>& problem, int rank, bool has_bias) {
  constexpr int64_t kUnit = 8;                // channels whose bytes the copy engine can count
  constexpr int64_t kEnd = int64_t{1} << 26;  // of an axis, so that bits of masks never overflow
  for (int a = 0; a < kAxes; ++a) {
    if (problem.query_shape[a] >= kEnd || problem.key_shape[a] >= kEnd) return false;
    if (problem.query_shape[a] == 0 || problem.key_shape[a] == 0) return false;
    if (problem.window[a].dilation > kMostStep) return false;
  }
  const auto is_dim = [](int64_t dim) { return dim > 0 && dim % kUnit == 0; };
  return is_dim(problem.dim) && is_dim(problem.value_dim) && problem.scale > 0 &&
         (!has_bias || has_small_biases(problem)) && problem.samples * problem.heads > 0 &&
         has_room(problem, rank);
}

}  // namespace jax_natten::sm90
