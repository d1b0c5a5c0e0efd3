#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>

#include "api/describe.h"

#ifdef TOKENCACHE_CUDA
#include "cuda/attention.h"
#else
#include "cpu/vector.h"
#endif

// The inputs were checked by tokencache_kernels.ops; nothing below it checks again.
namespace tokencache {
namespace {

using torch::stable::Tensor;

void attention(const Tensor& query, const Tensor& key, const Tensor& value,
               std::optional<Tensor> key_lengths, double softmax_scale, Tensor out, Tensor lse,
               std::optional<Tensor> entropy) {
  if (lse.numel() == 0) return;
  const AttentionParams params{
      .map = describe_map(query, key, softmax_scale),
      .value = value.const_data_ptr(),
      .key_lengths = key_lengths ? key_lengths->const_data_ptr<int32_t>() : nullptr,
      .out = out.mutable_data_ptr(),
      .lse = lse.mutable_data_ptr(),
      .entropy = entropy ? entropy->mutable_data_ptr() : nullptr,
      .stride_value_b = value.stride(0),
      .stride_value_n = value.stride(1),
      .stride_value_h = value.stride(2),
      .stride_key_lengths_b = key_lengths ? key_lengths->stride(0) : 0,
  };
#ifdef TOKENCACHE_CUDA
  check_launch("attention", attention_cuda(params, stream_of(out)));
#else
  const int64_t blocks = (params.map.S + kBlockQueries - 1) / kBlockQueries;
  torch::stable::parallel_for(
      0, params.map.B * params.map.H * blocks, 1,
      [&](int64_t begin, int64_t end) { vector_loops().attention(params, begin, end); });
#endif
}

}  // namespace
}  // namespace tokencache

#ifndef TOKENCACHE_CUDA
STABLE_TORCH_LIBRARY_FRAGMENT(tokencache_kernels_native, m) {
  m.def(
      "attention(Tensor query, Tensor key, Tensor value, Tensor? key_lengths, float softmax_scale,"
      " Tensor(a!) out, Tensor(b!) lse, Tensor(c!)? entropy) -> ()");
}
#endif

STABLE_TORCH_LIBRARY_IMPL(tokencache_kernels_native, TOKENCACHE_KEY, m) {
  m.impl("attention", TORCH_BOX(&tokencache::attention));
}
