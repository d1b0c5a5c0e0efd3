#include "c_api/parallel.h"

#include <algorithm>
#include <atomic>
#include <exception>
#include <new>
#include <thread>
#include <vector>

#include "c_api/call.h"

namespace tokencache::c_api {
namespace {

// Starting and joining a thread takes as long as copying about this much.
constexpr int64_t kBytesPerThread = int64_t{512} << 10;

constexpr int64_t kMostThreads = 1024;

std::atomic<int64_t> chosen_num_threads{0};

int64_t num_threads() {
  const int64_t chosen = chosen_num_threads;
  return chosen > 0 ? chosen : std::max<int64_t>(1, std::thread::hardware_concurrency());
}

}  // namespace

void parallel_for(int64_t count, int64_t bytes_per_item,
                  const std::function<void(int64_t begin, int64_t end)>& f) {
  const int64_t items_per_thread =
      std::max<int64_t>(1, kBytesPerThread / std::max<int64_t>(1, bytes_per_item));
  const int64_t worth = count / items_per_thread;
  const int64_t num_parts = std::clamp<int64_t>(worth, 1, num_threads());
  const int64_t part = count / num_parts + (count % num_parts != 0);

  std::atomic<bool> has_failed{false};
  const auto run_part = [&](int64_t begin, int64_t end) noexcept {
    try {
      f(begin, std::min(end, count));
    } catch (const std::bad_alloc&) {
      has_failed = true;
    }
  };
  std::vector<std::thread> threads;
  threads.reserve(num_parts - 1);
  int64_t begin = part;
  try {
    for (; begin < count; begin += part) threads.emplace_back(run_part, begin, begin + part);
  } catch (const std::exception&) {
    // no more threads can be had: the rest is done here
    run_part(begin, count);
  }
  run_part(0, part);
  for (std::thread& thread : threads) thread.join();
  if (has_failed) throw std::bad_alloc();
}

}  // namespace tokencache::c_api

tokencache_status tokencache_set_num_threads(int64_t num_threads) {
  using namespace tokencache::c_api;
  return run("set_num_threads", [&] {
    expect_within("set_num_threads", "num_threads", num_threads, 0, kMostThreads);
    chosen_num_threads = num_threads;
  });
}
