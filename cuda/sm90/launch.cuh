// What launches have in common, on the host.
#pragma once

#include <cuda_runtime.h>

#include "cuda/sm90/producer.cuh"

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

// The schedule of so many tiles of rows, of a kernel of which so many blocks run on a
// multiprocessor at once.
//
// So many tiles for a block that its beginning and end are little of its time, yet not so many that
// processors wait for the last blocks; fewer where three or more hide each other's beginnings, and
// where the cache, whose near half a processor reads fast, does not hold a head's columns, so that
// blocks which drift apart would load them again.
template <Side kRows>
QueryTiles schedule(const Problem<kAxes>& problem, const Shape& shape, int64_t count, int blocks) {
  const bool may_drift =
      blocks < 3 && 2 * head_bytes<kRows>(problem) <= attribute(cudaDevAttrL2CacheSize);
  const double block_cycles = may_drift ? 900e3 : 300e3;
  const int64_t resident = int64_t{blocks} * attribute(cudaDevAttrMultiProcessorCount);
  const double cycles = shape.cost * static_cast<double>(problem.samples * problem.heads) * blocks /
                        static_cast<double>(count);
  const int64_t per_block = geometry::max(
      1, geometry::min(static_cast<int64_t>(block_cycles / cycles), count / resident));
  return {static_cast<unsigned>(count), static_cast<unsigned>(per_block),
          static_cast<unsigned>(resident)};
}

}  // namespace jax_natten::sm90
