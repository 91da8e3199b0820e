// Defines run: the choice of a kernel and its shape, and the launch.
#pragma once

#include <utility>

#include "cuda/sm90/choices.h"
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

template <typename Row>
Channels channels(int64_t dim) {
  return {static_cast<int>(dim), dim != Row::kDim};
}

template <typename Config>
cudaError_t launch(cudaStream_t stream, const ForwardArrays<typename Config::Element>& arrays,
                   const Problem<kAxes>& problem, const Shape& shape) {
  using Element = typename Config::Element;
  const int64_t count = count_query_tiles(problem, shape);
  const Encode encoder = tensor_map_encoder();
  if (count >= int64_t{1} << 31 || encoder == nullptr) return kNotServed;
  Maps maps;
  maps.keys = channels<typename Config::KeyRow>(problem.dim);
  maps.values = channels<typename Config::ValueRow>(problem.value_dim);
  Boxes<Element> queries{arrays.q.data, problem.samples,           {}, problem.heads,
                         maps.keys,     Config::KeyRow::kChannels, {}, {}};
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
  values.channels = outputs.channels = maps.values;
  values.chunk = outputs.chunk = Config::ValueRow::kChannels;
  if (!queries.encode(encoder, maps.q) || !keys.encode(encoder, maps.k) ||
      !values.encode(encoder, maps.v) || !outputs.encode(encoder, maps.out)) {
    return kNotServed;
  }
  const auto* kernel = reinterpret_cast<const void*>(&forward_kernel<Config>);
  constexpr size_t kBytes = sizeof(Shared<Config>);
  static_assert(kBytes <= Config::kMostBytes);
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  if (error != cudaSuccess) return error;
  // So many tiles for a block that its beginning and end are little of its time, yet not so many
  // that processors wait for the last blocks; fewer where the cache, whose near half a processor
  // reads fast, does not hold a head's keys, so that blocks which drift apart would load them
  // again.
  const int64_t head_bytes = problem.key_shape[0] * problem.key_shape[1] * problem.key_shape[2] *
                             (problem.dim + problem.value_dim) * sizeof(Element);
  const bool may_drift = 2 * head_bytes <= attribute(cudaDevAttrL2CacheSize);
  const double block_cycles = may_drift ? 900e3 : 300e3;
  const int64_t resident = int64_t{Config::kBlocks} * attribute(cudaDevAttrMultiProcessorCount);
  const double cycles = shape.cost * static_cast<double>(problem.samples * problem.heads) *
                        Config::kBlocks / static_cast<double>(count);
  const int64_t per_block = geometry::max(
      1, geometry::min(static_cast<int64_t>(block_cycles / cycles), count / resident));
  const int64_t groups = geometry::ceil_div(count, resident * per_block);
  QueryTiles tiles{static_cast<unsigned>(count), static_cast<unsigned>(per_block),
                   static_cast<unsigned>(resident)};
  Tensor<float> lse = arrays.lse;
  Problem<kAxes> parameter = problem;
  typename Config::Shape shape_parameter;
  if constexpr (Config::kHasBias) {
    shape_parameter = with_biases(shape, problem, arrays.bias);
  } else {
    shape_parameter = shape;
  }
  void* arguments[] = {&maps, &lse, &parameter, &shape_parameter, &tiles};
  return cudaLaunchKernel(kernel, dim3(static_cast<unsigned>(groups * resident)),
                          dim3(Config::kThreads), arguments, kBytes, stream);
}

template <typename Element, int kIndex>
using ConfigOf =
    Config<Element, kKernels[kIndex].dim, kKernels[kIndex].value_dim, kKernels[kIndex].keys,
           kKernels[kIndex].consumers, kKernels[kIndex].stages, kKernels[kIndex].blocks,
           kKernels[kIndex].overlaps, kKernels[kIndex].biases>;

template <typename Element, int... kIndices>
cudaError_t launch_chosen(cudaStream_t stream, const ForwardArrays<Element>& arrays,
                          const Problem<kAxes>& problem, const Choice& choice,
                          std::integer_sequence<int, kIndices...>) {
  constexpr decltype(&launch<ConfigOf<Element, 0>>) kLaunches[] = {
      &launch<ConfigOf<Element, kIndices>>...};
  return kLaunches[choice.kernel](stream, arrays, problem, choice.shape);
}

template <typename Element>
cudaError_t run_of_rank(cudaStream_t stream, const ForwardArrays<Element>& arrays,
                        const Problem<kAxes>& problem, int rank) {
  if (!is_hopper()) return kNotServed;
  const Choice choice = choose(problem, rank, arrays.has_bias());
  if (choice.kernel < 0) return kNotServed;
  return launch_chosen(stream, arrays, problem, choice,
                       std::make_integer_sequence<int, kKernelCount>{});
}

template <template <typename, int> class Operands, typename Element, int Rank>
cudaError_t run(cudaStream_t stream, const Operands<Element, Rank>& operands) {
  return run_of_rank<Element>(stream, operands, in_three_axes(operands.problem), Rank);
}

}  // namespace jax_natten::sm90
