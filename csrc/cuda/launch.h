#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

// How many threads and blocks a launch has, and how much shared memory.
namespace tokencache {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

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

// Raises the kernel's limit of shared memory where a block needs more than every device gives.
template <class Kernel>
cudaError_t allow_shared(Kernel kernel, int64_t bytes) {
  if (bytes <= 48 << 10) return cudaSuccess;
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                              static_cast<int>(bytes));
}

inline uint64_t address(const void* pointer) { return reinterpret_cast<uint64_t>(pointer); }

}  // namespace tokencache
