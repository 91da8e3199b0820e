// The handlers of the CPU: operations on XLA's own thread pool, which return a future.
#include "cpu/handlers.h"

#include <initializer_list>
#include <utility>
#include <vector>

#include "cpu/binding.h"
#include "cpu/operations.h"
#include "cpu/parallel.h"
#include "xla/ffi/api/ffi.h"

namespace jax_natten {
namespace {

struct Cpu {
  static constexpr const char* kName = "CPU";
  using Context = ffi::ThreadPool;
  using Result = ffi::Future;

  static auto bind() { return ffi::Ffi::Bind().Ctx<ffi::ThreadPool>(); }
  static constexpr std::initializer_list<ffi::Traits> kTraits{};
  static Result failed(ffi::Error error) { return jax_natten::failed(std::move(error)); }

  template <typename Element, typename Buffers>
  static Result run(Context& pool, const Attributes& attributes, const Buffers& buffers) {
    return Operation<Element, Buffers>::run(pool, attributes, buffers);
  }
};

}  // namespace

std::vector<Handler> handlers() { return handlers_of<Cpu>(); }

}  // namespace jax_natten
