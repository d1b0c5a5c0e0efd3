#include "c_api/cuda.h"

#include <dlfcn.h>

#include <string>

namespace tokencache::c_api {
namespace {

Cuda load_cuda() {
  // found beside this library, by its runpath; what it needs of CUDA is linked into it
  void* library = dlopen(TOKENCACHE_CUDA_LIBRARY, RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) {
    static const std::string reason =
        std::string("no kernels were built, or they do not load: ") + dlerror();
    return {nullptr, {TOKENCACHE_UNSUPPORTED, reason.c_str()}};
  }
  void* launches = dlsym(library, "tokencache_cuda_launches");
  if (launches == nullptr) {
    return {nullptr,
            {TOKENCACHE_UNSUPPORTED, TOKENCACHE_CUDA_LIBRARY " has no kernels of this library"}};
  }
  const auto* found = static_cast<const CudaLaunches*>(launches);
  return {found, found->find_device()};
}

}  // namespace

const Cuda& find_cuda() {
  static const Cuda cuda = load_cuda();
  return cuda;
}

}  // namespace tokencache::c_api
