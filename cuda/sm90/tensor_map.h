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
#include "cuda/sm90/ptx.cuh"
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

// Where a map has a head's channels. Rows of as many channels as the kernel has are read side by
// side, [sample, z, y, x, head * dim + channel]. Shorter ones have an axis of heads, so that the
// copy engine knows where they end: it loads zeros beyond, and stores nothing. Since it knows five
// axes, [sample or z, y, x, head, channel], there is one sample then or one z.
struct Channels {
  int dim;  // of a head in the arrays
  bool has_heads;

  __device__ __forceinline__ Corner corner(int sample, const int (&at)[kAxes], int head,
                                           int channel) const {
    return has_heads ? Corner{channel, head, at[2], at[1], at[0] + sample}
                     : Corner{head * dim + channel, at[2], at[1], at[0], sample};
  }
};

// An array, and the boxes that are copied of it: so many tokens along each axis, a dilation apart,
// and `chunk` channels.
template <typename Element>
struct Boxes {
  const Element* data;
  int64_t samples;
  int64_t shape[kAxes];
  int64_t heads;
  Channels channels;
  int chunk;
  int box[kAxes];
  int64_t step[kAxes];

  // False where the copy engine cannot.
  bool encode(Encode encoder, CUtensorMap& map) const {
    constexpr int kMost = 5;
    uint64_t sizes[kMost], strides[kMost];
    uint32_t extents[kMost], steps[kMost];
    int count = 0;
    bool fits = reinterpret_cast<uintptr_t>(data) % kAlignment == 0;
    const auto add_axis = [&](int64_t size, int64_t stride, int64_t boxes, int64_t step) {
      fits = fits && count < kMost && fits_box(boxes, step) &&
             (count == 0 || stride % kAlignment == 0);
      if (!fits) return;
      sizes[count] = static_cast<uint64_t>(size);
      strides[count] = static_cast<uint64_t>(stride);
      extents[count] = static_cast<uint32_t>((boxes - 1) * step + 1);
      steps[count++] = static_cast<uint32_t>(step);
    };
    const int64_t head = channels.dim * 2, token = heads * head;
    add_axis(channels.has_heads ? channels.dim : token / 2, 2, chunk, 1);
    if (channels.has_heads) add_axis(heads, head, 1, 1);
    int64_t stride = token;
    for (int a = kAxes - 1; a >= 0; --a) {
      const bool is_left_out =
          channels.has_heads && a == 0 && samples > 1 && box[a] == 1 && shape[a] == 1;
      if (!is_left_out) add_axis(shape[a], stride, box[a], step[a]);
      stride *= shape[a];
    }
    if (!channels.has_heads || samples > 1) add_axis(samples, stride, 1, 1);
    if (!fits) return false;
    const auto type = std::is_same_v<Element, BFloat16> ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                                        : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
    const auto swizzle = chunk == 64 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B;
    return encoder(&map, type, kMost, const_cast<Element*>(data), sizes, strides + 1, extents,
                   steps, CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle,
                   CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
                   CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
  }
};

// What a kernel is given.
struct Maps {
  CUtensorMap q, k, v, out;
  Channels keys, values;  // of queries too, and of outputs
};

}  // namespace jax_natten::sm90
