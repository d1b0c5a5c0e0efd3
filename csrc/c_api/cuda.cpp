#include "c_api/cuda.h"

#include <dlfcn.h>

#include <string>

namespace tokencache::c_api {
namespace {

// Not just any of that name: the one beside this library was built with it.
std::string path_of_cuda_library() {
  Dl_info own{};
  dladdr(reinterpret_cast<void*>(&find_cuda), &own);
  const std::string path = own.dli_fname;
  return path.substr(0, path.rfind('/') + 1) + TOKENCACHE_CUDA_LIBRARY;
}

Cuda load_cuda() {
  // the parts of CUDA that it needs are linked into it
  void* library = dlopen(path_of_cuda_library().c_str(), RTLD_NOW | RTLD_LOCAL);
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
