#include <map>
#include <string>

#include "cuda/launch.h"
#include "cuda/tensor_core.cuh"
#include "cuda/warp.cuh"

// Kernels that are wrong, each in one way that the emulator must see.
namespace tokencache {
namespace {

constexpr int kThreads = 64;

__global__ void well_kernel(float* out) {
  float* row = shared_memory<float>();
  row[threadIdx.x] = static_cast<float>(threadIdx.x);
  __syncthreads();
  out[threadIdx.x] = row[kThreads - 1 - threadIdx.x];
}

__global__ void reads_too_early_kernel(float* out) {
  float* row = shared_memory<float>();
  row[threadIdx.x] = static_cast<float>(threadIdx.x);
  out[threadIdx.x] = row[kThreads - 1 - threadIdx.x];
}

__global__ void writes_too_far_kernel(float*) {
  shared_memory<float>()[threadIdx.x + 1] = 0;
  __syncthreads();
}

__global__ void leaves_a_lane_out_kernel(float* out) {
  if (threadIdx.x != 3) out[threadIdx.x] = sum_of_warp(1.0f);
}

__global__ void waits_in_a_branch_kernel(float*) {
  if (threadIdx.x % 2 == 0) __syncthreads();
  __syncwarp();
}

__global__ void forgets_its_copies_kernel(float* out) {
  copy_async(shared_memory<float>() + 4 * (threadIdx.x % 4), out, true);
  commit_copies();
}

__global__ void reads_before_its_copies_kernel(float* out) {
  float* row = shared_memory<float>();
  if (threadIdx.x < kThreads / 4) copy_async(row + 4 * threadIdx.x, out + 4 * threadIdx.x, true);
  commit_copies();
  __syncthreads();
  out[threadIdx.x] = row[threadIdx.x];
  wait_copies<0>();
}

__global__ void copies_from_between_kernel(float* out) {
  copy_async(shared_memory<float>(), out + 1, true);
}

}  // namespace
}  // namespace tokencache

// Runs one of the kernels on 64 numbers; what was wrong with it, or null.
extern "C" const char* run_kernel(const char* name, float* out, int blocks, int shared_bytes) {
  using namespace tokencache;
  const std::map<std::string, void (*)(float*)> kernels = {
      {"is well", well_kernel},
      {"reads too early", reads_too_early_kernel},
      {"writes too far", writes_too_far_kernel},
      {"leaves a lane out", leaves_a_lane_out_kernel},
      {"waits in a branch", waits_in_a_branch_kernel},
      {"forgets its copies", forgets_its_copies_kernel},
      {"reads before its copies", reads_before_its_copies_kernel},
      {"copies from between", copies_from_between_kernel},
  };
  const cudaError_t error = launch(kernels.at(name), blocks, kThreads, shared_bytes, nullptr, out);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}
