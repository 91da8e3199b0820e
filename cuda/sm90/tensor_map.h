// Tensor maps: how the copy engine finds boxes of an array [sample, *three axes, head, channel].
//
// The encoder is the driver's, looked up through the runtime so that nothing links the driver. A
// map is plain data, made anew for every launch and passed to the kernel by value.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "cpu/number.h"
#include "cuda/sm90/shape.h"

namespace jax_natten::sm90 {

inline constexpr int64_t kAlignment = 16;  // of the copy engine's addresses and strides, in bytes

using Encode = decltype(&cuTensorMapEncodeTiled);

// Null where the driver has none.
inline Encode tensor_map_encoder() {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult result;
  constexpr unsigned kSince = 12000;
  const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function,
                                                             kSince, cudaEnableDefault, &result);
  const bool found = error == cudaSuccess && result == cudaDriverEntryPointSuccess;
  return found ? reinterpret_cast<Encode>(function) : nullptr;
}

// An array, and the boxes that are copied of it: so many tokens along each axis, a dilation apart,
// and `channels` channels.
template <typename Element>
struct Boxes {
  const Element* data;
  int64_t samples;
  int64_t shape[kAxes];
  int64_t heads;
  int64_t dim;
  int channels;
  int box[kAxes];
  int64_t step[kAxes];

  // False where the copy engine cannot.
  bool encode(Encode encoder, CUtensorMap& map) const {
    const auto pitch = static_cast<uint64_t>(heads * dim * 2);
    const auto address = reinterpret_cast<uintptr_t>(data);
    if (address % kAlignment != 0 || pitch % kAlignment != 0) return false;
    uint64_t sizes[kAxes + 2] = {pitch / 2}, strides[kAxes + 1];
    uint32_t extents[kAxes + 2] = {static_cast<uint32_t>(channels)}, steps[kAxes + 2] = {1};
    uint64_t stride = pitch;
    for (int i = 0; i < kAxes; ++i) {
      const int a = kAxes - 1 - i;
      if (!fits_box(box[a], step[a])) return false;
      sizes[i + 1] = static_cast<uint64_t>(shape[a]);
      strides[i] = stride;
      stride *= sizes[i + 1];
      extents[i + 1] = static_cast<uint32_t>((box[a] - 1) * step[a] + 1);
      steps[i + 1] = static_cast<uint32_t>(step[a]);
    }
    sizes[kAxes + 1] = static_cast<uint64_t>(samples);
    strides[kAxes] = stride;
    extents[kAxes + 1] = steps[kAxes + 1] = 1;
    const auto type = std::is_same_v<Element, BFloat16> ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                                        : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
    const auto swizzle = channels == 64 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B;
    return encoder(&map, type, kAxes + 2, const_cast<Element*>(data), sizes, strides, extents,
                   steps, CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle,
                   CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
                   CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
  }
};

// What a kernel is given.
struct Maps {
  CUtensorMap q, k, v, out;
};

}  // namespace jax_natten::sm90
