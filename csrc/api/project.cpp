#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>

#include "api/describe.h"

#ifdef TOKENCACHE_CUDA
#include "cuda/project.h"
#else
#include "cpu/vector.h"
#endif

// The inputs were checked by tokencache_kernels.ops; nothing below it checks again.
namespace tokencache {
namespace {

using torch::stable::Tensor;

void finish_heads_(Tensor rows, std::optional<Tensor> indices, int64_t num_tokens,
                   std::optional<Tensor> weight, std::optional<Tensor> bias, bool is_layer_norm,
                   double eps, std::optional<Tensor> cosine, std::optional<Tensor> sine) {
  if (rows.numel() == 0) return;
  const FinishHeadsParams params{
      .B = rows.size(0),
      .N = num_tokens,
      .S = rows.size(1),
      .H = rows.size(2),
      .E = rows.size(3),
      .type = type_of(rows),
      .is_layer_norm = is_layer_norm,
      .eps = eps,
      .rows = rows.mutable_data_ptr(),
      .indices = indices ? indices->const_data_ptr<int32_t>() : nullptr,
      .weight = weight ? weight->const_data_ptr() : nullptr,
      .bias = bias ? bias->const_data_ptr() : nullptr,
      .cosine = cosine ? cosine->const_data_ptr() : nullptr,
      .sine = sine ? sine->const_data_ptr() : nullptr,
      .stride_indices_b = indices ? indices->stride(0) : 0,
      // one table for all samples, or one for each
      .stride_table_b = cosine && cosine->dim() == 3 ? cosine->stride(0) : 0,
      .stride_table_t = cosine ? cosine->stride(cosine->dim() - 2) : 0,
  };
#ifdef TOKENCACHE_CUDA
  check_launch("finish_heads_", finish_heads_cuda(params, stream_of(rows)));
#else
  const int64_t bytes_per_row = 4 * params.H * params.E * static_cast<int64_t>(rows.element_size());
  torch::stable::parallel_for(
      0, params.B * params.S, rows_per_thread(bytes_per_row),
      [&](int64_t begin, int64_t end) { vector_loops().finish_heads(params, begin, end); });
#endif
}

}  // namespace
}  // namespace tokencache

#ifndef TOKENCACHE_CUDA
STABLE_TORCH_LIBRARY_FRAGMENT(tokencache_kernels_native, m) {
  m.def(
      "finish_heads_(Tensor(a!) rows, Tensor? indices, int num_tokens, Tensor? weight,"
      " Tensor? bias, bool is_layer_norm, float eps, Tensor? cosine, Tensor? sine) -> ()");
}
#endif

STABLE_TORCH_LIBRARY_IMPL(tokencache_kernels_native, TOKENCACHE_KEY, m) {
  m.impl("finish_heads_", TORCH_BOX(&tokencache::finish_heads_));
}
