#include "emulator.h"

#include <link.h>
#include <ucontext.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <span>
#include <string>
#include <vector>

namespace tokencache {

constexpr int kMostShared = 99 << 10;   // the shared memory of a block on every architecture
constexpr int kPlainShared = 48 << 10;  // and without having asked for more
constexpr int kGuard = 1 << 10;

// The array that shared_memory() in csrc/cuda/launch.h declares.
thread_local uint4 shared[(kMostShared + kGuard) / sizeof(uint4)];

}  // namespace tokencache

namespace emulator {
namespace {

using tokencache::kGuard;
using tokencache::kMostShared;
using tokencache::kPlainShared;

struct Copy {
  void* to;
  const void* from;  // null: zeros
};

enum class State { kReady, kAtBarrier, kMeeting, kDone };

// A thread of the block: a stack of its own, left and entered where it waits for others.
struct Thread {
  std::vector<char> stack = std::vector<char>(64 << 10);
  ucontext_t context;
  State state;
  Meeting meeting;
  Place barrier;
  void* argument;
  std::vector<Copy> open_copies;
  std::deque<std::vector<Copy>> copies;
};

std::vector<std::unique_ptr<Thread>> threads;
Thread* running;
ucontext_t scheduler;
const std::function<void()>* body;
std::string failure;
std::map<const void*, int> limits;  // of dynamic shared memory, by kernel
std::mt19937 generator(1);          // of orders that no kernel may count on

void leave(State state) {
  running->state = state;
  swapcontext(&running->context, &scheduler);
}

void run_body() {
  (*body)();
  if (!running->open_copies.empty() || !running->copies.empty()) {
    fail("a thread ended before its copies");
  }
  leave(State::kDone);
}

void start(Thread& thread) {
  thread.state = State::kReady;
  thread.open_copies.clear();
  thread.copies.clear();
  getcontext(&thread.context);
  thread.context.uc_stack.ss_sp = thread.stack.data();
  thread.context.uc_stack.ss_size = thread.stack.size();
  thread.context.uc_link = nullptr;
  makecontext(&thread.context, run_body, 0);
}

// The lanes of one warp, each until it waits for the block or ends.
void run_warp(int first) {
  std::array<int, kWarp> lanes;
  std::iota(lanes.begin(), lanes.end(), 0);
  while (failure.empty()) {
    void* arguments[kWarp];
    int num_meeting = 0;
    std::shuffle(lanes.begin(), lanes.end(), generator);
    for (int lane : lanes) {
      Thread& thread = *threads[first + lane];
      if (thread.state == State::kReady) {
        running = &thread;
        threadIdx.x = first + lane;
        swapcontext(&scheduler, &thread.context);
        if (!failure.empty()) return;
      }
      num_meeting += thread.state == State::kMeeting;
      arguments[lane] = thread.argument;
    }
    if (num_meeting == 0 || !failure.empty()) return;
    const Meeting meeting = threads[first]->meeting;
    for (int lane = 0; lane < kWarp; ++lane) {
      const Thread& thread = *threads[first + lane];
      if (thread.state != State::kMeeting || thread.meeting != meeting) {
        failure = "the lanes of a warp do not do the same together";
        return;
      }
    }
    meeting(arguments);
    for (int lane = 0; lane < kWarp; ++lane) threads[first + lane]->state = State::kReady;
  }
}

// The memory of all __shared__ variables: this library's thread-local data.
std::span<char> find_shared_memory() {
  std::span<char> found;
  dl_iterate_phdr(
      [](dl_phdr_info* info, size_t, void* result) {
        for (int i = 0; i < info->dlpi_phnum; ++i) {
          const ElfW(Phdr) & header = info->dlpi_phdr[i];
          auto* begin = static_cast<char*>(info->dlpi_tls_data);
          auto* ours = reinterpret_cast<char*>(tokencache::shared);
          if (header.p_type != PT_TLS || begin == nullptr || ours < begin ||
              ours >= begin + header.p_memsz) {
            continue;
          }
          *static_cast<std::span<char>*>(result) = {begin, header.p_memsz};
          return 1;
        }
        return 0;
      },
      &found);
  return found;
}

// The bytes of static __shared__ variables that a block has written, in pieces of 16, as they are
// laid out. A compiler for GPUs also counts bytes that no thread writes.
int64_t count_static_bytes(std::span<char> memory) {
  const auto* dynamic = reinterpret_cast<const char*>(tokencache::shared);
  const char* const last = memory.data() + memory.size();
  int64_t bytes = 0;
  for (const char* piece = memory.data(); piece < last; piece += 16) {
    if (piece >= dynamic && piece < dynamic + sizeof tokencache::shared) continue;
    const char* end = std::min(piece + 16, last);
    if (std::any_of(piece, end, [](char byte) { return byte != '\xFF'; })) bytes += 16;
  }
  return bytes;
}

// All threads that have not ended wait; refuses differing barriers.
void expect_one_barrier(int num_threads) {
  for (int i = 1; i < num_threads; ++i) {
    if (threads[i]->state != threads[0]->state) {
      failure = "a thread ended where others wait for it";
    } else if (threads[i]->state == State::kAtBarrier &&
               threads[i]->barrier != threads[0]->barrier) {
      failure = "threads of a block wait at different barriers";
    }
  }
}

void run_block(int num_threads, int64_t shared_bytes, int64_t most_shared) {
  const std::span<char> memory = find_shared_memory();
  std::memset(memory.data(), 0xFF, memory.size());
  std::vector<int> warps;
  for (int first = 0; first < num_threads; first += kWarp) warps.push_back(first);
  for (int i = 0; i < num_threads; ++i) start(*threads[i]);
  for (bool is_done = false; !is_done && failure.empty();) {
    // in no order that a kernel may count on
    std::shuffle(warps.begin(), warps.end(), generator);
    for (int first : warps) run_warp(first);
    if (failure.empty()) expect_one_barrier(num_threads);
    is_done = true;
    for (int i = 0; i < num_threads; ++i) {
      if (threads[i]->state == State::kDone) continue;
      threads[i]->state = State::kReady;
      is_done = false;
    }
  }
  const auto* guard = reinterpret_cast<const unsigned char*>(tokencache::shared) + shared_bytes;
  if (std::any_of(guard, guard + kGuard, [](unsigned char byte) { return byte != 0xFF; })) {
    failure = "a block wrote behind its shared memory";
  }
  if (count_static_bytes(memory) + shared_bytes > most_shared) {
    failure = "a block has less shared memory than the launch and its variables need";
  }
}

}  // namespace

void fail(const char* reason) {
  failure = reason;
  leave(State::kDone);
  __builtin_unreachable();
}

void wait_for_block(Place barrier) {
  running->barrier = barrier;
  leave(State::kAtBarrier);
}

void meet(Meeting meeting, void* argument) {
  running->meeting = meeting;
  running->argument = argument;
  leave(State::kMeeting);
}

void copy_later(void* to, const void* from, bool is_there) {
  if ((reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from)) % 16 != 0) {
    fail("a copy must begin at 16 bytes");
  }
  running->open_copies.push_back({to, is_there ? from : nullptr});
}

void close_group_of_copies() {
  running->copies.push_back(std::move(running->open_copies));
  running->open_copies.clear();
}

void make_copies(int most_groups_left) {
  while (static_cast<int>(running->copies.size()) > most_groups_left) {
    for (const Copy& copy : running->copies.front()) {
      if (copy.from == nullptr) {
        std::memset(copy.to, 0, 16);
      } else {
        std::memcpy(copy.to, copy.from, 16);
      }
    }
    running->copies.pop_front();
  }
}

cudaError_t run(const cudaLaunchConfig_t& config, const void* kernel,
                const std::function<void()>& run_thread) {
  const int64_t shared_bytes = config.dynamicSmemBytes;
  const bool has_asked = limits.contains(kernel);
  const int num_threads = config.blockDim.x;
  gridDim = config.gridDim;
  if (gridDim.x == 0 || gridDim.y == 0 || gridDim.z == 0 || gridDim.x > INT32_MAX ||
      gridDim.y > UINT16_MAX || gridDim.z > UINT16_MAX ||
      shared_bytes > (has_asked ? limits[kernel] : kPlainShared) || num_threads < 1 ||
      num_threads > 1024 || num_threads % kWarp != 0) {
    return cudaErrorInvalidConfiguration;
  }
  while (static_cast<int>(threads.size()) < num_threads) {
    threads.push_back(std::make_unique<Thread>());
  }
  body = &run_thread;
  failure.clear();
  for (unsigned z = 0; z < gridDim.z; ++z) {
    for (unsigned y = 0; y < gridDim.y; ++y) {
      for (unsigned x = 0; x < gridDim.x && failure.empty(); ++x) {
        blockIdx = {x, y, z};
        run_block(num_threads, shared_bytes, has_asked ? kMostShared : kPlainShared);
      }
    }
  }
  return failure.empty() ? cudaSuccess : cudaErrorLaunchFailure;
}

}  // namespace emulator

// The other functions of the CUDA runtime that the launches call.

cudaError_t cudaMemsetAsync(void* memory, int value, size_t bytes, cudaStream_t) {
  std::memset(memory, value, bytes);
  return cudaSuccess;
}

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

// Few multiprocessors, so that small problems also take the tiles of large ones.
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrMaxSharedMemoryPerBlockOptin ? tokencache::kMostShared : 2;
  return cudaSuccess;
}

// The one attribute that is set: the dynamic shared memory that a launch may ask for.
cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute, int bytes) {
  auto& limits = emulator::limits;
  if (bytes > tokencache::kMostShared) return cudaErrorInvalidValue;
  // another launch of the kernel, on another thread, may count on the higher one
  if (limits.contains(kernel) && bytes < limits[kernel]) return cudaErrorInvalidValue;
  limits[kernel] = bytes;
  return cudaSuccess;
}

// How many static bytes a kernel has shows when it runs.
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  *attributes = {};
  return cudaSuccess;
}

const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorLaunchFailure ? emulator::failure.c_str() : "a launch that no GPU takes";
}
