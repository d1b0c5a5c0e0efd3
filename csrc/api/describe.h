#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstdint>

#include "params.h"

// What the torch-facing files share: how a tensor is described to a loop.
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

// The least number of rows that is worth a thread of its own: 64 KiB of copying.
inline int64_t rows_per_thread(int64_t bytes_per_row) {
  return std::max<int64_t>(1, (int64_t{64} << 10) / std::max<int64_t>(1, bytes_per_row));
}

}  // namespace tokencache
