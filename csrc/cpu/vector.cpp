#include "cpu/vector.h"

#include <atomic>
#include <cstring>

namespace tokencache {
namespace {

// The loops of that name, or the best where it is null; null where the processor lacks them.
const VectorLoops* find_loops(const char* name) {
  const auto is_wanted = [&](const VectorLoops& loops) {
    return name == nullptr || std::strcmp(name, loops.name) == 0;
  };
#if defined(__x86_64__)
  const bool has_avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (has_avx512 && is_wanted(avx512::loops)) return &avx512::loops;
  if (has_avx2 && is_wanted(avx2::loops)) return &avx2::loops;
#endif
  return is_wanted(portable::loops) ? &portable::loops : nullptr;
}

std::atomic<const VectorLoops*>& chosen_loops() {
  static std::atomic<const VectorLoops*> chosen = find_loops(nullptr);
  return chosen;
}

}  // namespace

const VectorLoops& vector_loops() { return *chosen_loops().load(std::memory_order_relaxed); }

bool use_vector_loops(const char* name) {
  const VectorLoops* found = find_loops(name);
  if (found != nullptr) chosen_loops().store(found, std::memory_order_relaxed);
  return found != nullptr;
}

}  // namespace tokencache
