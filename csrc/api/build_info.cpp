#include <pybind11/pybind11.h>

// How the native library beside this module was built; CMake fills the words in.
PYBIND11_MODULE(_build_info, module) {
  module.doc() = "How the native library was built.";
  module.def(
      "facts",
      [] {
        pybind11::dict facts;
        facts["version"] = TOKENCACHE_VERSION;
        facts["compiler"] = TOKENCACHE_COMPILER;
        facts["flags"] = TOKENCACHE_FLAGS;
        facts["processor"] = TOKENCACHE_PROCESSOR;
        facts["torch"] = TOKENCACHE_TORCH;
        facts["torch_target"] = TOKENCACHE_TORCH_TARGET;
        return facts;
      },
      "Name and value of each fact, all strings.");
}
