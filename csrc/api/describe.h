#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <optional>

#include "params.h"

#ifdef TOKENCACHE_CUDA
#include "api/device.h"
#else
#define TOKENCACHE_KEY CPU
#endif

// Shared by the torch-facing files. Each is compiled twice: as it is for the CPU, with the schemas,
// and with TOKENCACHE_CUDA for the kernels.
namespace tokencache {

inline Type type_of(const torch::stable::Tensor& tensor) {
  using torch::headeronly::ScalarType;
  switch (tensor.scalar_type()) {
    case ScalarType::Double:
      return Type::kFloat64;
    case ScalarType::Half:
      return Type::kFloat16;
    case ScalarType::BFloat16:
      return Type::kBfloat16;
    default:
      return Type::kFloat32;
  }
}

inline const void* data_of(const std::optional<torch::stable::Tensor>& tensor) {
  return tensor ? tensor->const_data_ptr() : nullptr;
}

// Asserts the assumptions of a loop, in nanoseconds. A caller that passes by the public functions
// gets an error for a dtype or a size that does not fit, and not a read beside the tensor.
inline void expect_shape(const char* op, const char* name, const torch::stable::Tensor& tensor,
                         std::initializer_list<int64_t> sizes) {
  bool fits = tensor.dim() == static_cast<int64_t>(sizes.size());
  int64_t dim = 0;
  for (const int64_t size : sizes) fits = fits && tensor.size(dim++) == size;
  STD_TORCH_CHECK(fits, op, ": ", name, " must have the sizes that the other tensors imply");
  const int64_t last = tensor.dim() - 1;
  STD_TORCH_CHECK(last < 0 || tensor.size(last) <= 1 || tensor.stride(last) == 1, op, ": ", name,
                  " must have stride 1 along its last dimension, got ", tensor.stride(last));
}

inline void expect_like(const char* op, const char* name, const torch::stable::Tensor& tensor,
                        const torch::stable::Tensor& like, std::initializer_list<int64_t> sizes) {
  STD_TORCH_CHECK(tensor.scalar_type() == like.scalar_type(), op, ": ", name,
                  " must have the dtype of the other tensors");
  expect_shape(op, name, tensor, sizes);
}

inline void expect_int32(const char* op, const char* name, const torch::stable::Tensor& tensor,
                         std::initializer_list<int64_t> sizes) {
  STD_TORCH_CHECK(tensor.scalar_type() == torch::headeronly::ScalarType::Int, op, ": ", name,
                  " must be int32");
  expect_shape(op, name, tensor, sizes);
}

inline AttentionMapParams describe_map(const torch::stable::Tensor& query,
                                       const torch::stable::Tensor& key, double softmax_scale) {
  return {
      .B = query.size(0),
      .S = query.size(1),
      .N = key.size(1),
      .H = query.size(2),
      .E = query.size(3),
      .type = type_of(query),
      .softmax_scale = softmax_scale,
      .query = query.const_data_ptr(),
      .key = key.const_data_ptr(),
      .stride_query_b = query.stride(0),
      .stride_query_s = query.stride(1),
      .stride_query_h = query.stride(2),
      .stride_key_b = key.stride(0),
      .stride_key_n = key.stride(1),
      .stride_key_h = key.stride(2),
  };
}

#ifdef TOKENCACHE_CUDA

// Every launch is followed by this.
inline void check_launch(const char* op, cudaError_t error) {
  STD_TORCH_CHECK(error == cudaSuccess, op, ": the launch must succeed, got ",
                  cudaGetErrorString(error));
}

#else

// The least number of rows that is worth a thread of its own: 64 KiB of copying.
inline int64_t rows_per_thread(int64_t bytes_per_row) {
  return std::max<int64_t>(1, (int64_t{64} << 10) / std::max<int64_t>(1, bytes_per_row));
}

#endif

}  // namespace tokencache
