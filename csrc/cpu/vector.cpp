#include "cpu/vector.h"

#include <atomic>
#include <cstring>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace tokencache {
namespace {

#if defined(__x86_64__)
// Whether the processor has all that -march=x86-64-v3 may use. Not every compiler knows that name,
// nor those of the last three.
bool has_x86_64_v3() {
  unsigned a, b, c, extended, d;
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2") &&
         __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C) && (c & bit_MOVBE) &&
         __get_cpuid(0x80000001, &a, &b, &extended, &d) && (extended & bit_LZCNT);
}
#endif

// The loops of that name, or the best where it is null; null where the processor lacks them.
const VectorLoops* find_loops(const char* name) {
  const auto is_wanted = [&](const VectorLoops& loops) {
    return name == nullptr || std::strcmp(name, loops.name) == 0;
  };
#if defined(__x86_64__)
  const bool has_avx2 = has_x86_64_v3();
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") &&
                          __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512cd") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
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
