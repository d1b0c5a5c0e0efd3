#pragma once

#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>

// Where the kernels of the CUDA half are registered and launched.
#define TOKENCACHE_KEY CUDA

namespace tokencache {

// The stream that torch launches on, on the device of a tensor. As long as this lives, which is to
// the end of the call that takes it, that device is the current one.
class CurrentStream {
 public:
  explicit CurrentStream(const torch::stable::Tensor& tensor) : guard_(tensor.get_device_index()) {
    // it lives in torch's CUDA library, which a CPU build of torch does not have: so it is not
    // linked, but looked up where torch has loaded it
    using GetStream = AOTITorchError (*)(int32_t device_index, void** ret_stream);
    static const auto get_stream = [] {
      void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
      return library == nullptr ? nullptr
                                : reinterpret_cast<GetStream>(
                                      dlsym(library, "aoti_torch_get_current_cuda_stream"));
    }();
    STD_TORCH_CHECK(get_stream != nullptr, "torch must be built with CUDA, got another build");
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(get_stream(tensor.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }

  operator cudaStream_t() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_;
};

inline CurrentStream stream_of(const torch::stable::Tensor& tensor) {
  return CurrentStream(tensor);
}

}  // namespace tokencache
