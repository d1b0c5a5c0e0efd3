#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

// What every kernel is launched with and by.
namespace tokencache {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// A size of a grid. One that no grid can have stays such, and the launch refuses it.
inline unsigned int size_of_grid(int64_t num_blocks) {
  return static_cast<unsigned int>(std::min<int64_t>(num_blocks, UINT32_MAX));
}

// Blocks of a kernel whose threads stride over the work: enough to fill any device.
inline unsigned int grid_for(int64_t num_items, int64_t items_per_block) {
  constexpr int64_t kMostBlocks = 1 << 16;
  return static_cast<unsigned int>(
      std::clamp<int64_t>(ceil_div(num_items, items_per_block), 1, kMostBlocks));
}

// The widest piece, up to 16 bytes, that divides all of these addresses and byte counts.
template <class... Values>
int64_t common_alignment(Values... values) {
  const uint64_t bits = (uint64_t{16} | ... | static_cast<uint64_t>(values));
  return static_cast<int64_t>(bits & -bits);
}

// The shared memory that a launch asked for.
template <class T>
__device__ T* shared_memory() {
  extern __shared__ uint4 shared[];
  return reinterpret_cast<T*>(shared);
}

// Starts a kernel in a grid of blocks; for more shared memory than every device gives, its limit is
// raised first.
template <class... Params, class... Args>
cudaError_t launch(void (*kernel)(Params...), dim3 grid, int threads, int64_t shared_bytes,
                   cudaStream_t stream, const Args&... args) {
  if (shared_bytes > 48 << 10) {
    const int bytes = static_cast<int>(std::min<int64_t>(shared_bytes, 1 << 30));
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (error != cudaSuccess) return error;
  }
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, args...);
}

inline uint64_t address(const void* pointer) { return reinterpret_cast<uint64_t>(pointer); }

}  // namespace tokencache
