#include <cmath>
#include <map>
#include <string>
#include <utility>

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

// Shuffles would show it, shared memory alone does not.
__global__ void forgets_to_meet_kernel(float* out) {
  float* row = shared_memory<float>();
  row[threadIdx.x] = static_cast<float>(threadIdx.x);
  out[threadIdx.x] = row[threadIdx.x / 32 * 32 + (threadIdx.x + 1) % 32];
}

// The data is read in time, but may be overwritten before.
__global__ void overwrites_too_early_kernel(float* out) {
  float* row = shared_memory<float>();
  row[threadIdx.x] = static_cast<float>(threadIdx.x);
  __syncwarp();
  const float read = row[threadIdx.x / 32 * 32 + (threadIdx.x + 1) % 32];
  row[threadIdx.x] = NAN;
  out[threadIdx.x] = read;
}

__global__ void waits_at_two_barriers_kernel(float*) {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}

__global__ void ends_before_a_barrier_kernel(float*) {
  if (threadIdx.x < 32) return;
  __syncthreads();
}

template <bool kAsks>
__global__ void has_variables_of_its_own_kernel(float* out) {
  __shared__ float own[kThreads];
  own[threadIdx.x] = 1;
  __syncthreads();
  out[threadIdx.x] = own[kThreads - 1 - threadIdx.x];
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

// Runs one of the kernels on 64 numbers, by launch() or without its care for shared memory; returns
// the error, or null.
extern "C" const char* run_kernel(const char* name, float* out, int blocks, int shared_bytes,
                                  bool asks_for_memory) {
  using namespace tokencache;
  const std::map<std::string, void (*)(float*)> kernels = {
      {"is well", well_kernel},
      {"reads too early", reads_too_early_kernel},
      {"writes too far", writes_too_far_kernel},
      {"forgets to meet", forgets_to_meet_kernel},
      {"overwrites too early", overwrites_too_early_kernel},
      {"waits at two barriers", waits_at_two_barriers_kernel},
      {"ends before a barrier", ends_before_a_barrier_kernel},
      {"has variables of its own", has_variables_of_its_own_kernel<true>},
      {"does not ask for them", has_variables_of_its_own_kernel<false>},
      {"leaves a lane out", leaves_a_lane_out_kernel},
      {"waits in a branch", waits_in_a_branch_kernel},
      {"forgets its copies", forgets_its_copies_kernel},
      {"reads before its copies", reads_before_its_copies_kernel},
      {"copies from between", copies_from_between_kernel},
  };
  const auto kernel = kernels.at(name);
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = shared_bytes;
  const cudaError_t error = asks_for_memory
                                ? launch(kernel, blocks, kThreads, shared_bytes, nullptr, out)
                                : cudaLaunchKernelEx(&config, kernel, std::as_const(out));
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}
