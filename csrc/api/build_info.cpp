#include <torch/csrc/stable/library.h>

#include <string>

namespace tokencache {
namespace {

// How the library was built, a fact a line, "name=value"; CMake fills them in.
std::string build_info() {
  return
#include TOKENCACHE_FACTS
      ;
}

}  // namespace
}  // namespace tokencache

STABLE_TORCH_LIBRARY_FRAGMENT(tokencache_kernels_native, m) { m.def("build_info() -> str"); }

// no tensor says on which device: an implementation for all
STABLE_TORCH_LIBRARY_IMPL(tokencache_kernels_native, CompositeExplicitAutograd, m) {
  m.impl("build_info", TORCH_BOX(&tokencache::build_info));
}
