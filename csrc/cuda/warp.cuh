#pragma once

#include <cuda_runtime.h>

// What the 32 lanes of a warp make of their values together; every lane gets it.
namespace tokencache {

__device__ inline float sum_of_warp(float value) {
  for (int offset = 16; offset > 0; offset /= 2) {
    value += __shfl_xor_sync(0xFFFFFFFF, value, offset);
  }
  return value;
}

__device__ inline float max_of_warp(float value) {
  for (int offset = 16; offset > 0; offset /= 2) {
    value = fmaxf(value, __shfl_xor_sync(0xFFFFFFFF, value, offset));
  }
  return value;
}

}  // namespace tokencache
