// The handlers of CUDA: each one only launches kernels on XLA's stream, so that XLA can record it
// in a command buffer.
#include "cpu/handlers.h"

#include <cuda_runtime.h>

#include <initializer_list>
#include <string>
#include <vector>

#include "cpu/binding.h"
#include "cuda/dispatch.h"
#include "xla/ffi/api/ffi.h"

namespace jax_natten {
namespace {

struct Cuda {
  static constexpr const char* kName = "CUDA";
  using Context = cudaStream_t;
  using Result = ffi::Error;

  static auto bind() { return ffi::Ffi::Bind().Ctx<ffi::PlatformStream<cudaStream_t>>(); }
  static constexpr std::initializer_list<ffi::Traits> kTraits{ffi::Traits::kCmdBufferCompatible};
  static Result failed(ffi::Error error) { return error; }

  template <typename Element, typename Buffers>
  static Result run(Context stream, const Attributes& attributes, const Buffers& buffers) {
    return with_operands<Element>(
        attributes, buffers,
        [&](const auto& operands) {
          const cudaError_t error = dispatch(stream, operands);
          return error == cudaSuccess ? ffi::Error::Success()
                                      : ffi::Error::Internal(std::string("jax_natten: CUDA: ") +
                                                             cudaGetErrorString(error));
        },
        failed);
  }
};

}  // namespace

std::vector<Handler> handlers() { return handlers_of<Cuda>(); }

}  // namespace jax_natten
