#pragma once

// Comes before every file of csrc/cuda when a compiler for the CPU takes it, with the definitions
// that nvcc has built in. The toolkit's headers give the types. This file gives the threads' view,
// and their joint operations.

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <functional>
#include <source_location>
#include <tuple>
#include <utility>

// Blocks run one after another in one thread of the CPU. Unlike a static variable, one of a thread
// may also be declared extern, and lies with all others in one piece of memory: it is filled with
// NaN before each block.
#undef __shared__
#define __shared__ thread_local

#define __launch_bounds__(...)

inline uint3 threadIdx, blockIdx;
inline dim3 gridDim;

namespace emulator {

constexpr int kWarp = 32;

// Ends the launch with an error.
[[noreturn]] void fail(const char* reason);

// A line of a source file.
using Place = std::pair<const char*, unsigned>;

// Returns when all threads of the block have called it, all at the same place.
void wait_for_block(Place barrier);

// A joint operation of a warp's lanes, each with an argument of its own.
using Meeting = void (*)(void* const (&lanes)[kWarp]);

// Returns when all lanes have called it, and the last one has done the joint operation.
void meet(Meeting meeting, void* argument);

// Remembers a copy of 16 bytes, or of zeros; it is made as late as the kernel allows.
void copy_later(void* to, const void* from, bool is_there);
void close_group_of_copies();
void make_copies(int most_groups_left);

cudaError_t run(const cudaLaunchConfig_t& config, const void* kernel,
                const std::function<void()>& run_thread);

// The value that the lane with number source gives.
template <class T>
T shuffle(unsigned mask, T value, int source) {
  struct Lane {
    T value;
    int source;
    T result;
  } mine{value, source, {}};
  if (mask != 0xFFFFFFFF) fail("only whole warps can shuffle here");
  meet(
      [](void* const(&lanes)[kWarp]) {
        for (void* lane : lanes) {
          Lane& one = *static_cast<Lane*>(lane);
          one.result = static_cast<Lane*>(lanes[one.source])->value;
        }
      },
      &mine);
  return mine.result;
}

inline int lane() { return threadIdx.x % kWarp; }

}  // namespace emulator

template <class... Params, class... Args>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Params...),
                               const Args&... args) {
  const std::tuple<Params...> given(args...);
  return emulator::run(*config, reinterpret_cast<const void*>(kernel),
                       [&] { std::apply(kernel, given); });
}

inline void __syncthreads(std::source_location at = std::source_location::current()) {
  emulator::wait_for_block({at.file_name(), at.line()});
}

inline void __syncwarp() {
  emulator::meet([](void* const(&)[emulator::kWarp]) {}, nullptr);
}

template <class T>
T __shfl_sync(unsigned mask, T value, int source) {
  return emulator::shuffle(mask, value, source);
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int other) {
  return emulator::shuffle(mask, value, emulator::lane() ^ other);
}

template <class T>
T __shfl_up_sync(unsigned mask, T value, int distance) {
  const int lane = emulator::lane();
  return emulator::shuffle(mask, value, lane < distance ? lane : lane - distance);
}

inline unsigned __ballot_sync(unsigned mask, bool vote) {
  struct Lane {
    bool vote;
    unsigned votes;
  } mine{vote, 0};
  if (mask != 0xFFFFFFFF) emulator::fail("only whole warps can vote here");
  emulator::meet(
      [](void* const(&lanes)[emulator::kWarp]) {
        unsigned votes = 0;
        for (int lane = 0; lane < emulator::kWarp; ++lane) {
          votes |= static_cast<unsigned>(static_cast<Lane*>(lanes[lane])->vote) << lane;
        }
        for (void* lane : lanes) static_cast<Lane*>(lane)->votes = votes;
      },
      &mine);
  return mine.votes;
}

template <class T>
T atomicAdd(T* address, T value) {
  return std::exchange(*address, *address + value);
}

template <class T>
T atomicMax(T* address, T value) {
  return std::exchange(*address, std::max(*address, value));
}

inline int __ffs(unsigned x) { return x == 0 ? 0 : std::countr_zero(x) + 1; }
inline int __popc(unsigned x) { return std::popcount(x); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
template <class T>
T min(T a, T b) {
  return std::min(a, b);
}
template <class T>
T max(T a, T b) {
  return std::max(a, b);
}
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
