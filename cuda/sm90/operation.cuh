// Defines Operation: the choice of a kernel and its shape, and the launch.
#pragma once

#include "cuda/sm90/kernel.cuh"
#include "cuda/sm90/sm90.h"

namespace jax_natten::sm90 {

inline int attribute(cudaDeviceAttr which) {
  int device = 0, value = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return 0;
  return cudaDeviceGetAttribute(&value, which, device) == cudaSuccess ? value : 0;
}

// Code for sm_90a runs on compute capability 9.0 alone.
inline bool is_hopper() {
  return attribute(cudaDevAttrComputeCapabilityMajor) == 9 &&
         attribute(cudaDevAttrComputeCapabilityMinor) == 0;
}

// Whether the kernels know everything that a problem asks for.
template <typename Element>
bool can_serve(const ForwardArrays<Element>& arrays, const Problem<kAxes>& problem) {
  constexpr int64_t kEnd = int64_t{1} << 26;  // of an axis, so that places in words never overflow
  for (int a = 0; a < kAxes; ++a) {
    if (problem.query_shape[a] >= kEnd || problem.key_shape[a] >= kEnd) return false;
    if (problem.query_shape[a] == 0 || problem.key_shape[a] == 0) return false;
    if (problem.window[a].dilation > kMostStep) return false;
  }
  const int64_t rows = problem.samples * problem.heads * problem.queries();
  return !arrays.has_bias() && problem.dim == problem.value_dim && problem.scale > 0 && rows > 0 &&
         is_hopper();
}

template <typename Config>
cudaError_t launch(cudaStream_t stream, const ForwardArrays<typename Config::Element>& arrays,
                   const Problem<kAxes>& problem, const Shape& shape) {
  using Element = typename Config::Element;
  const int64_t count = count_query_tiles(problem, shape);
  const Encode encoder = tensor_map_encoder();
  if (count >= int64_t{1} << 31 || encoder == nullptr) return kNotServed;
  Maps maps;
  Boxes<Element> queries{arrays.q.data, problem.samples, {}, problem.heads, problem.dim,
                         Config::kChannels, {}, {}};
  Boxes<Element> keys = queries;
  keys.heads = problem.heads_kv;
  for (int a = 0; a < kAxes; ++a) {
    queries.shape[a] = problem.query_shape[a];
    queries.box[a] = 1 << shape.log_rows[a];
    keys.shape[a] = problem.key_shape[a];
    keys.box[a] = shape.keys[a];
    queries.step[a] = keys.step[a] = problem.window[a].dilation;
  }
  Boxes<Element> values = keys, outputs = queries;
  keys.data = arrays.k.data;
  values.data = arrays.v.data;
  outputs.data = arrays.out.data;
  if (!queries.encode(encoder, maps.q) || !keys.encode(encoder, maps.k) ||
      !values.encode(encoder, maps.v) || !outputs.encode(encoder, maps.out)) {
    return kNotServed;
  }
  const auto* kernel = reinterpret_cast<const void*>(&forward_kernel<Config>);
  constexpr size_t kBytes = sizeof(Shared<Config>);
  static_assert(kBytes <= 227 * 1024 / Config::kBlocks - 1024 * (Config::kBlocks > 1));
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  if (error != cudaSuccess) return error;
  const int64_t resident = int64_t{Config::kBlocks} * attribute(cudaDevAttrMultiProcessorCount);
  auto query_tiles = static_cast<unsigned>(count);
  Tensor<float> lse = arrays.lse;
  Problem<kAxes> parameter = problem;
  Shape shape_parameter = shape;
  void* arguments[] = {&maps, &lse, &parameter, &shape_parameter, &query_tiles};
  return cudaLaunchKernel(kernel, dim3(static_cast<unsigned>(geometry::min(count, resident))),
                          dim3(Config::kThreads), arguments, kBytes, stream);
}

// The kernels of a head dim. Large tiles for windows of many tiles; for small windows many small
// blocks, which hide each other's beginnings and ends. With what each takes, as measured.
template <typename Element, int kDim>
struct Kernels;

template <typename Element>
struct Kernels<Element, 32> {
  using Large = Config<Element, 32, 128, 3, 4, 1, true>;
  using Small = Config<Element, 32, 64, 1, 4, 4, false>;
  static constexpr Costs kLarge{6000, 2900, 2300};
  static constexpr Costs kSmall{2000, 1200, 900};
};

template <typename Element>
struct Kernels<Element, 64> {
  using Large = Config<Element, 64, 128, 3, 4, 1, true>;
  using Small = Config<Element, 64, 64, 1, 3, 3, false>;
  static constexpr Costs kLarge{6000, 3000, 2434};
  static constexpr Costs kSmall{2000, 1250, 1000};
};

template <typename Element>
struct Kernels<Element, 128> {
  using Large = Config<Element, 128, 128, 2, 2, 1, true>;
  using Small = Large;
  static constexpr Costs kLarge{3000, 2600, 2370};
};

template <typename Element>
struct Kernels<Element, 96> {
  using Large = Config<Element, 96, 128, 2, 3, 1, true>;
  using Small = Large;
  static constexpr Costs kLarge{3000, 2300, 2000};
};

template <typename Element>
struct Kernels<Element, 192> {
  using Large = Config<Element, 192, 96, 2, 2, 1, true>;
  using Small = Large;
  static constexpr Costs kLarge{4000, 2800, 2600};
};

template <typename Element>
struct Kernels<Element, 256> {
  using Large = Config<Element, 256, 64, 2, 2, 1, true>;
  using Small = Large;
  static constexpr Costs kLarge{4000, 2600, 2400};
};

template <typename Config, typename Element>
cudaError_t run_with(cudaStream_t stream, const ForwardArrays<Element>& arrays,
                     const Problem<kAxes>& problem, const Shape& shape) {
  if (shape.cost < 0) return kNotServed;
  return launch<Config>(stream, arrays, problem, shape);
}

template <int kDim, typename Element>
cudaError_t run_of_dim(cudaStream_t stream, const ForwardArrays<Element>& arrays,
                       const Problem<kAxes>& problem, int rank) {
  using Known = Kernels<Element, kDim>;
  using Large = typename Known::Large;
  using Small = typename Known::Small;
  const Shape large =
      choose_shape(problem, rank, Large::kConsumers, Large::kKeys, Known::kLarge);
  if constexpr (!std::is_same_v<Large, Small>) {
    const Shape small =
        choose_shape(problem, rank, Small::kConsumers, Small::kKeys, Known::kSmall);
    if (large.cost < 0 || (small.cost >= 0 && small.cost < large.cost)) {
      return run_with<Small>(stream, arrays, problem, small);
    }
  }
  return run_with<Large>(stream, arrays, problem, large);
}

template <typename Element>
cudaError_t run_of_rank(cudaStream_t stream, const ForwardArrays<Element>& arrays,
                        const Problem<kAxes>& problem, int rank) {
  if (!can_serve(arrays, problem)) return kNotServed;
  switch (problem.dim) {
    case 32:
      return run_of_dim<32>(stream, arrays, problem, rank);
    case 64:
      return run_of_dim<64>(stream, arrays, problem, rank);
    case 96:
      return run_of_dim<96>(stream, arrays, problem, rank);
    case 128:
      return run_of_dim<128>(stream, arrays, problem, rank);
    case 192:
      return run_of_dim<192>(stream, arrays, problem, rank);
    case 256:
      return run_of_dim<256>(stream, arrays, problem, rank);
    default:
      return kNotServed;
  }
}

template <template <typename, int> class Operands, typename Element>
cudaError_t Operation<Operands, Element>::run(cudaStream_t stream,
                                              const Operands<Element, 1>& operands) {
  return run_of_rank<Element>(stream, operands, in_three_axes(operands.problem), 1);
}

template <template <typename, int> class Operands, typename Element>
cudaError_t Operation<Operands, Element>::run(cudaStream_t stream,
                                              const Operands<Element, 2>& operands) {
  return run_of_rank<Element>(stream, operands, in_three_axes(operands.problem), 2);
}

template <template <typename, int> class Operands, typename Element>
cudaError_t Operation<Operands, Element>::run(cudaStream_t stream,
                                              const Operands<Element, 3>& operands) {
  return run_of_rank<Element>(stream, operands, in_three_axes(operands.problem), 3);
}

}  // namespace jax_natten::sm90
