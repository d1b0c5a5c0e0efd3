#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>

#include "api/describe.h"

#ifdef TOKENCACHE_CUDA
#include "cuda/select.h"
#else
#include "cpu/select.h"
#endif

// The inputs were checked by tokencache_kernels.ops; nothing below it checks again.
namespace tokencache {
namespace {

using torch::stable::Tensor;

void select_tokens_(const Tensor& scores, Tensor staleness, std::optional<Tensor> num_fresh,
                    int64_t max_fresh, double staleness_weight, bool normalize, int64_t grid_height,
                    int64_t grid_width, int64_t tile, double bonus, Tensor indices,
                    Tensor positions) {
  if (positions.numel() == 0) return;
  const SelectParams params{
      .L = scores.size(0),
      .B = scores.size(1),
      .N = scores.size(2),
      .P = indices.size(0),
      .max_fresh = max_fresh,
      .staleness_weight = static_cast<float>(staleness_weight),
      .normalize = normalize,
      .grid_height = grid_height,
      .grid_width = grid_width,
      .tile = tile,
      .bonus = static_cast<float>(bonus),
      .scores = scores.const_data_ptr<float>(),
      .num_fresh = num_fresh ? num_fresh->const_data_ptr<int32_t>() : nullptr,
      .staleness = staleness.mutable_data_ptr<int32_t>(),
      .indices = indices.mutable_data_ptr<int32_t>(),
      .positions = positions.mutable_data_ptr<int32_t>(),
      .stride_staleness_l = staleness.stride(0),
      .stride_staleness_b = staleness.stride(1),
  };
#ifdef TOKENCACHE_CUDA
  const Tensor workspace = torch::stable::new_empty(scores, {select_workspace_bytes(params)},
                                                    torch::headeronly::ScalarType::Byte);
  check_launch("select_tokens_",
               select_tokens_cuda(params, workspace.mutable_data_ptr(), stream_of(positions)));
#else
  torch::stable::parallel_for(0, params.L * params.B, 1, [&](int64_t begin, int64_t end) {
    select_tokens_cpu(params, begin, end);
  });
#endif
}

void invert_indices(const Tensor& indices, Tensor positions) {
  if (positions.numel() == 0) return;
  const InvertIndicesParams params{
      .B = positions.size(0),
      .N = positions.size(1),
      .S = indices.size(1),
      .indices = indices.const_data_ptr<int32_t>(),
      .positions = positions.mutable_data_ptr<int32_t>(),
      .stride_indices_b = indices.stride(0),
  };
#ifdef TOKENCACHE_CUDA
  check_launch("invert_indices", invert_indices_cuda(params, stream_of(positions)));
#else
  torch::stable::parallel_for(
      0, params.B, rows_per_thread(4 * params.N),
      [&](int64_t begin, int64_t end) { invert_indices_cpu(params, begin, end); });
#endif
}

}  // namespace
}  // namespace tokencache

#ifndef TOKENCACHE_CUDA
STABLE_TORCH_LIBRARY_FRAGMENT(tokencache_kernels_native, m) {
  m.def(
      "select_tokens_(Tensor scores, Tensor(a!) staleness, Tensor? num_fresh, int max_fresh,"
      " float staleness_weight, bool normalize, int grid_height, int grid_width, int tile,"
      " float bonus, Tensor(b!) indices, Tensor(c!) positions) -> ()");
  m.def("invert_indices(Tensor indices, Tensor(a!) positions) -> ()");
}
#endif

STABLE_TORCH_LIBRARY_IMPL(tokencache_kernels_native, TOKENCACHE_KEY, m) {
  m.impl("select_tokens_", TORCH_BOX(&tokencache::select_tokens_));
  m.impl("invert_indices", TORCH_BOX(&tokencache::invert_indices));
}
