// Which instruction sets the processor has, and which one serves.
#include "cpu/targets.h"

#include <cstdlib>
#include <stdexcept>
#include <string>
#include <vector>

namespace jax_natten {
namespace {

bool is_available(Target target) {
  switch (target) {
#ifdef JAX_NATTEN_X86_TARGETS
    case Target::avx2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
             __builtin_cpu_supports("f16c");
    case Target::avx512:
      return is_available(Target::avx2) && __builtin_cpu_supports("avx512f") &&
             __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
             __builtin_cpu_supports("avx512vl");
#endif
    default:
      return true;
  }
}

std::vector<Target> available() {
  std::vector<Target> result;
#define JAX_NATTEN_ADD(name) \
  if (is_available(Target::name)) result.push_back(Target::name);
  JAX_NATTEN_TARGETS(JAX_NATTEN_ADD)
#undef JAX_NATTEN_ADD
  return result;
}

Target choose() {
  const char* forced = std::getenv("JAX_NATTEN_CPU_TARGET");
  if (forced == nullptr || *forced == 0) return available().back();
  std::string names;
  for (Target target : available()) {
    if (std::string(forced) == name_of(target)) return target;
    names += std::string(names.empty() ? "" : ", ") + name_of(target);
  }
  throw std::runtime_error("JAX_NATTEN_CPU_TARGET is " + std::string(forced) +
                           ", which this processor or build has not; it has " + names);
}

}  // namespace

std::vector<std::string> available_targets() {
  std::vector<std::string> result;
  for (Target target : available()) result.emplace_back(name_of(target));
  return result;
}

Target target() {
  static const Target chosen = choose();
  return chosen;
}

const char* name_of(Target target) {
  switch (target) {
#define JAX_NATTEN_CASE(name) \
  case Target::name:          \
    return #name;
    JAX_NATTEN_TARGETS(JAX_NATTEN_CASE)
#undef JAX_NATTEN_CASE
  }
  return "";
}

}  // namespace jax_natten
