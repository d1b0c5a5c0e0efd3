#include <pybind11/pybind11.h>

namespace {

// What cuobjdump says of the kernels in the CUDA half; empty where there is none, of either.
constexpr char kCudaResources[] =
#ifdef TOKENCACHE_CUDA_RESOURCES
#include TOKENCACHE_CUDA_RESOURCES
#else
    ""
#endif
    ;

}  // namespace

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
        facts["instructions"] = TOKENCACHE_INSTRUCTIONS;
        facts["torch"] = TOKENCACHE_TORCH;
        facts["torch_target"] = TOKENCACHE_TORCH_TARGET;
#ifdef TOKENCACHE_CUDA
        facts["cuda"] = TOKENCACHE_CUDA;
        facts["cuda_architectures"] = TOKENCACHE_CUDA_ARCHITECTURES;
#endif
        return facts;
      },
      "Name and value of each fact, all strings; those of CUDA where that half was built.");
  module.def(
      "cuda_resources", [] { return kCudaResources; },
      "What the CUDA kernels take of a GPU, as cuobjdump -res-usage prints it; or nothing.");
}
