#include <pybind11/pybind11.h>

// Resources of the kernels in the CUDA half beside this module; see CMakeLists.txt.
PYBIND11_MODULE(_cuda_resources, module) {
  module.doc() = "What the CUDA kernels take of a GPU; for developers.";
  module.attr("printed") =
#include TOKENCACHE_CUDA_RESOURCES
      ;
}
