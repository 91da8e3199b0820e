// The kernels of all operations for one instruction set.
//
// Included by the files of targets/ only, after the headers that other files include too: what
// those define must not be compiled for an instruction set that the processor may not have.
#include "cpu/kernels/backward.h"
#include "cpu/kernels/bias.h"
#include "cpu/kernels/block.h"
#include "cpu/kernels/forward.h"
#include "cpu/kernels/key_sums.h"
#include "cpu/kernels/logits.h"
#include "cpu/kernels/products.h"
#include "cpu/kernels/rows.h"
#include "cpu/kernels/simd.h"
#include "cpu/kernels/tangent.h"
#include "cpu/kernels/unfused.h"

namespace jax_natten::JAX_NATTEN_TARGET {

template <typename Arrays>
Job job(const Call<Arrays>& call) {
  return make_job(call);
}

#define JAX_NATTEN_INSTANTIATE(Element)                        \
  template Job job(const Call<ForwardArrays<Element>>& call);  \
  template Job job(const Call<TangentArrays<Element>>& call);  \
  template Job job(const Call<BackwardArrays<Element>>& call); \
  template Job job(const Call<QkArrays<Element>>& call);       \
  template Job job(const Call<AvArrays<Element>>& call);       \
  template Job job(const Call<InverseArrays<Element>>& call)

JAX_NATTEN_INSTANTIATE(float);
JAX_NATTEN_INSTANTIATE(double);
JAX_NATTEN_INSTANTIATE(Float16);
JAX_NATTEN_INSTANTIATE(BFloat16);

#undef JAX_NATTEN_INSTANTIATE

}  // namespace jax_natten::JAX_NATTEN_TARGET
