#include "c_api/call.h"
#include "cpu/vector.h"

tokencache_status tokencache_set_cpu_instructions(const char* name) {
  using namespace tokencache;
  return c_api::run("set_cpu_instructions", [&] {
    if (!use_vector_loops(name)) {
      c_api::refuse("set_cpu_instructions", TOKENCACHE_UNSUPPORTED,
                    "name must be of instructions that this processor has, got %.32s", name);
    }
  });
}
