// Defines run: the choice of a kernel and its shape, and the launch.
#pragma once

#include <utility>

#include "cuda/sm90/backward_operation.cuh"
#include "cuda/sm90/choices.h"
#include "cuda/sm90/kernel.cuh"
#include "cuda/sm90/launch.cuh"
#include "cuda/sm90/sm90.h"

namespace jax_natten::sm90 {

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
  QueryTiles tiles = schedule<Side::kQueries>(problem, shape, count, Config::kBlocks);
  Tensor<float> lse = arrays.lse;
  Problem<kAxes> parameter = problem;
  typename Config::Shape shape_parameter;
  if constexpr (Config::kHasBias) {
    shape_parameter = with_biases(shape, problem, arrays.bias);
  } else {
    shape_parameter = shape;
  }
  void* arguments[] = {&maps, &lse, &parameter, &shape_parameter, &tiles};
  return cudaLaunchKernel(kernel, dim3(tiles.blocks()), dim3(Config::kThreads), arguments, kBytes,
                          stream);
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
