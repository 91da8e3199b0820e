// The instruction sets that the kernels are compiled for, and the choice among them.
//
// Each is a namespace with the same functions. What a processor can run is asked once, when the
// module is loaded; the environment variable JAX_NATTEN_CPU_TARGET forces one by its name.
#pragma once

#include <string>
#include <vector>

#include "cpu/call.h"
#include "cpu/parallel.h"

#ifdef JAX_NATTEN_X86_TARGETS
#define JAX_NATTEN_TARGETS(X) X(baseline) X(avx2) X(avx512)
#else
#define JAX_NATTEN_TARGETS(X) X(baseline)
#endif

namespace jax_natten {

#define JAX_NATTEN_DECLARE(name)     \
  namespace name {                   \
  template <typename Arrays>         \
  Job job(const Call<Arrays>& call); \
  }
JAX_NATTEN_TARGETS(JAX_NATTEN_DECLARE)
#undef JAX_NATTEN_DECLARE

#define JAX_NATTEN_ENUMERATE(name) name,
enum class Target { JAX_NATTEN_TARGETS(JAX_NATTEN_ENUMERATE) };
#undef JAX_NATTEN_ENUMERATE

// Names of the targets that this processor can run, the best last.
std::vector<std::string> available_targets();

// The best, or the forced one. Throws std::runtime_error where that cannot run here.
Target target();
const char* name_of(Target target);

// A call's kernel on the chosen target.
template <typename Arrays>
Job job_on_target(const Call<Arrays>& call) {
  switch (target()) {
#define JAX_NATTEN_CASE(name) \
  case Target::name:          \
    return name::job(call);
    JAX_NATTEN_TARGETS(JAX_NATTEN_CASE)
#undef JAX_NATTEN_CASE
  }
  return {};
}

}  // namespace jax_natten
