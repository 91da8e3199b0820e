// A call as tiled kernels take it: its arrays, and its problem in three axes, so that no kernel is
// compiled once a rank.
#pragma once

#include "cpu/operands.h"
#include "cpu/tiling.h"

namespace jax_natten {

template <typename Arrays>
struct Call : OperandsOf<Arrays, kAxes> {
  int rank;  // axes that the frame has
};

template <typename Arrays, int Rank>
Call<Arrays> call_of(const OperandsOf<Arrays, Rank>& op) {
  Call<Arrays> call{};
  static_cast<Arrays&>(call) = op;
  call.problem = in_three_axes(op.problem);
  call.rank = Rank;
  return call;
}

}  // namespace jax_natten
