#include "cpu/vector.h"

namespace tokencache {

const VectorLoops& vector_loops() {
#if defined(__x86_64__)
  static const VectorLoops& best =
      __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
              __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")
          ? avx512::loops
      : __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? avx2::loops
                                                                        : portable::loops;
  return best;
#else
  return portable::loops;
#endif
}

}  // namespace tokencache
