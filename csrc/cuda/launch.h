#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <map>
#include <mutex>
#include <utility>

// The launch of every kernel: its stream, its shared memory, its errors.
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

// Lets a kernel ask for all the shared memory that a block can have on the current device: its own
// static bytes count as well. Once for each kernel and device, so that no launch lowers the limit
// of another one.
inline cudaError_t allow_all_shared_memory(const void* kernel) {
  static std::mutex mutex;
  static std::map<std::pair<const void*, int>, cudaError_t> asked;
  int device = 0;
  if (const cudaError_t error = cudaGetDevice(&device); error != cudaSuccess) return error;
  const std::lock_guard lock(mutex);
  const auto [place, is_new] = asked.try_emplace({kernel, device}, cudaSuccess);
  if (!is_new) return place->second;
  int bytes = 0;
  cudaFuncAttributes attributes{};
  cudaError_t error =
      cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error == cudaSuccess) error = cudaFuncGetAttributes(&attributes, kernel);
  if (error == cudaSuccess) {
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 bytes - static_cast<int>(attributes.sharedSizeBytes));
  }
  // a failure that may pass is not kept
  if (error != cudaSuccess) asked.erase(place);
  return error;
}

// The limit that needs no such call, and that static bytes never exceed.
constexpr int64_t kPlainSharedBytes = 48 << 10, kMostStaticBytes = 3 << 10;

// Starts a kernel in a grid of blocks.
template <class... Params, class... Args>
cudaError_t launch(void (*kernel)(Params...), dim3 grid, int threads, int64_t shared_bytes,
                   cudaStream_t stream, const Args&... args) {
  if (shared_bytes > kPlainSharedBytes - kMostStaticBytes) {
    const cudaError_t error = allow_all_shared_memory(reinterpret_cast<const void*>(kernel));
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
