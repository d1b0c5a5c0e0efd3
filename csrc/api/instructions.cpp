#include <torch/csrc/stable/library.h>

#include <string>

#include "cpu/vector.h"

namespace tokencache {
namespace {

std::string cpu_instructions() { return vector_loops().name; }

bool use_cpu_instructions(std::string name) { return use_vector_loops(name.c_str()); }

}  // namespace
}  // namespace tokencache

STABLE_TORCH_LIBRARY_FRAGMENT(tokencache_kernels_native, m) {
  m.def("cpu_instructions() -> str");
  m.def("use_cpu_instructions(str name) -> bool");
}

// no tensor says on which device: an implementation for all
STABLE_TORCH_LIBRARY_IMPL(tokencache_kernels_native, CompositeExplicitAutograd, m) {
  m.impl("cpu_instructions", TORCH_BOX(&tokencache::cpu_instructions));
  m.impl("use_cpu_instructions", TORCH_BOX(&tokencache::use_cpu_instructions));
}
