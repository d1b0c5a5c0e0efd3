#pragma once

#include <cuda_runtime_api.h>
#include <torch/csrc/stable/tensor.h>

// In the place of csrc/api/device.h: tensors of the CPU, and no stream.
#define TOKENCACHE_KEY CPU

namespace tokencache {

inline cudaStream_t stream_of(const torch::stable::Tensor&) { return nullptr; }

}  // namespace tokencache
