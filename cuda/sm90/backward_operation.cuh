// The launches of a backward call: the gradients of queries, then those of keys and values, which
// read what was found of queries.
#pragma once

#include <utility>

#include "cuda/sm90/backward_choices.h"
#include "cuda/sm90/backward_kernel.cuh"
#include "cuda/sm90/launch.cuh"
#include "cuda/sm90/sm90.h"

namespace jax_natten::sm90 {

template <typename Config>
bool make_maps(BackwardMaps& maps, const BackwardArrays<typename Config::Element>& arrays,
               const Problem<kAxes>& problem, const Shape& shape) {
  using Element = typename Config::Element;
  using Row = typename Config::Row;
  const Encode encoder = tensor_map_encoder();
  if (encoder == nullptr) return false;
  maps.channels[0] = channels<Row>(problem.dim);
  maps.channels[1] = channels<Row>(problem.value_dim);
  const auto encode = [&](CUtensorMap& map, const Element* data, bool is_of_keys, int array,
                          bool is_of_columns) {
    Boxes<Element> boxes{data,
                         problem.samples,
                         {},
                         is_of_keys ? problem.heads_kv : problem.heads,
                         maps.channels[array],
                         Row::kChannels,
                         {},
                         {}};
    for (int a = 0; a < kAxes; ++a) {
      boxes.shape[a] = is_of_keys ? problem.key_shape[a] : problem.query_shape[a];
      boxes.box[a] = is_of_columns ? shape.keys[a] : 1 << shape.log_rows[a];
      boxes.step[a] = problem.window[a].dilation;
    }
    return boxes.encode(encoder, map);
  };
  constexpr bool kRowsAreKeys = Config::kRowsAreKeys;
  const Element* const of_queries[] = {arrays.q.data, arrays.ct_out.data};
  const Element* const of_keys[] = {arrays.k.data, arrays.v.data};
  const Element* const sums[] = {kRowsAreKeys ? arrays.dk.data : arrays.dq.data, arrays.dv.data};
  // What is not loaded by the copy engine is read in units as long.
  bool done = reinterpret_cast<uintptr_t>(arrays.out.data) % kAlignment == 0;
  for (int i = 0; i < 2; ++i) {
    done =
        done &&
        encode(maps.row[i], kRowsAreKeys ? of_keys[i] : of_queries[i], kRowsAreKeys, i, false) &&
        encode(maps.column[i], kRowsAreKeys ? of_queries[i] : of_keys[i], !kRowsAreKeys, i, true);
    if (i < Config::kSums) done = done && encode(maps.sum[i], sums[i], kRowsAreKeys, i, false);
  }
  return done;
}

template <typename Config>
cudaError_t launch_backward(cudaStream_t stream,
                            const BackwardArrays<typename Config::Element>& arrays,
                            const Problem<kAxes>& problem, const Shape& shape,
                            const BackwardMaps& maps) {
  const int64_t count = count_query_tiles<Config::kSide>(problem, shape);
  const auto* kernel = reinterpret_cast<const void*>(&backward_kernel<Config>);
  constexpr size_t kBytes = sizeof(BackwardShared<Config>);
  static_assert(kBytes <= 227 * 1024 / Config::kBlocks - 1024 * (Config::kBlocks > 1));
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  if (error != cudaSuccess) return error;
  QueryTiles tiles = schedule<Config::kSide>(problem, shape, count, Config::kBlocks);
  BackwardShape parameter{shape, shape.scale * kLog2E};
  void* arguments[] = {const_cast<BackwardMaps*>(&maps),
                       const_cast<BackwardArrays<typename Config::Element>*>(&arrays),
                       const_cast<Problem<kAxes>*>(&problem), &parameter, &tiles};
  return cudaLaunchKernel(kernel, dim3(tiles.blocks()), dim3(Config::kThreads), arguments, kBytes,
                          stream);
}

template <typename Element, int kIndex>
using BackwardConfigOf =
    BackwardConfig<Element, kBackwardKernels[kIndex].side, kBackwardKernels[kIndex].dim,
                   kBackwardKernels[kIndex].columns, kBackwardKernels[kIndex].consumers,
                   kBackwardKernels[kIndex].stages, kBackwardKernels[kIndex].blocks,
                   kBackwardKernels[kIndex].overlaps>;

// run(Config) with what a kernel of the table is compiled for.
template <typename Element, int kIndex = 0, typename Run>
auto with_backward_config(int kernel, Run&& run) {
  if constexpr (kIndex + 1 < kBackwardKernelCount) {
    if (kernel != kIndex) return with_backward_config<Element, kIndex + 1>(kernel, run);
  }
  return run(BackwardConfigOf<Element, kIndex>{});
}

template <typename Element>
cudaError_t run_of_rank(cudaStream_t stream, const BackwardArrays<Element>& arrays,
                        const Problem<kAxes>& problem, int rank) {
  constexpr int64_t kEnd = int64_t{1} << 31;
  if (!is_hopper()) return kNotServed;
  const BackwardChoice choice = choose_backward(problem, rank, arrays.has_bias());
  if (!choice.is_served() || problem.samples * problem.queries() * problem.heads >= kEnd ||
      count_query_tiles<Side::kQueries>(problem, choice.queries.shape) >= kEnd ||
      count_query_tiles<Side::kKeys>(problem, choice.keys.shape) >= kEnd) {
    return kNotServed;
  }
  // All can be launched, or none is.
  BackwardMaps maps[2];
  const Choice* const choices[] = {&choice.queries, &choice.keys};
  for (int i = 0; i < 2; ++i) {
    const bool made = with_backward_config<Element>(choices[i]->kernel, [&](auto config) {
      return make_maps<decltype(config)>(maps[i], arrays, problem, choices[i]->shape);
    });
    if (!made) return kNotServed;
  }
  cudaError_t error = cudaSuccess;
  for (int i = 0; i < 2 && error == cudaSuccess; ++i) {
    error = with_backward_config<Element>(choices[i]->kernel, [&](auto config) {
      return launch_backward<decltype(config)>(stream, arrays, problem, choices[i]->shape, maps[i]);
    });
  }
  return error;
}

}  // namespace jax_natten::sm90
