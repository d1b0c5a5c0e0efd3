// The features of a toolkit and its C++ compiler that csrc/cuda needs; see cuda_half.cmake.
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <bit>
#include <cstdint>

struct Params {
  int64_t size;
  __nv_bfloat16* out;
};

template <class... Values>
__global__ void probe_kernel(Params p, Values... values) {
  if (threadIdx.x < p.size) p.out[threadIdx.x] = __float2bfloat16((0.0f + ... + values));
}

cudaError_t probe(__nv_bfloat16* out) {
  const Params params{.size = 32, .out = out};
  probe_kernel<<<1, std::bit_ceil(17u)>>>(params, 1.0f, 2.0f);
  return cudaGetLastError();
}
