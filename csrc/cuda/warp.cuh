#pragma once

#include <cuda_runtime.h>

// Reductions over the 32 lanes of a warp, the four that hold a row of a product, or the threads of
// a block. Every thread gets the result.
namespace tokencache {

template <class T>
__device__ T sum_of_warp(T value) {
  for (int offset = 16; offset > 0; offset /= 2) {
    value += __shfl_xor_sync(0xFFFFFFFF, value, offset);
  }
  return value;
}

// Each lane gets that of the lanes before it.
__device__ inline int sum_of_lanes_before(int value) {
  const int lane = threadIdx.x % 32;
  int sum = value;
  for (int offset = 1; offset < 32; offset *= 2) {
    const int before = __shfl_up_sync(0xFFFFFFFF, sum, offset);
    if (lane >= offset) sum += before;
  }
  return sum - value;
}

__device__ inline float max_of_warp(float value) {
  for (int offset = 16; offset > 0; offset /= 2) {
    value = fmaxf(value, __shfl_xor_sync(0xFFFFFFFF, value, offset));
  }
  return value;
}

__device__ inline float sum_of_row(float value) {
  value += __shfl_xor_sync(0xFFFFFFFF, value, 1);
  return value + __shfl_xor_sync(0xFFFFFFFF, value, 2);
}

__device__ inline float max_of_row(float value) {
  value = fmaxf(value, __shfl_xor_sync(0xFFFFFFFF, value, 1));
  return fmaxf(value, __shfl_xor_sync(0xFFFFFFFF, value, 2));
}

template <int Threads>
__device__ float sum_of_block(float value) {
  __shared__ float of_warp[Threads / 32];
  value = sum_of_warp(value);
  __syncthreads();  // the sums of the call before were read
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = value;
  __syncthreads();
  float total = 0;
  for (int warp = 0; warp < Threads / 32; ++warp) total += of_warp[warp];
  return total;
}

}  // namespace tokencache
