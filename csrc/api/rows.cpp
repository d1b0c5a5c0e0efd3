
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>

#include "api/describe.h"

#ifdef TOKENCACHE_CUDA
#include "cuda/rows.h"
#else
#include "cpu/rows.h"
#endif

// The inputs were checked by tokencache_kernels.ops; nothing below it checks again.
namespace tokencache {
namespace {

using torch::stable::Tensor;

Tensor gather_rows(const Tensor& hidden_states, const Tensor& indices) {
  const int64_t B = hidden_states.size(0), S = indices.size(1), D = hidden_states.size(2);
  expect_shape("gather_rows", "hidden_states", hidden_states, {B, hidden_states.size(1), D});
  expect_int32("gather_rows", "indices", indices, {B, S});
  Tensor out = torch::stable::new_empty(hidden_states, {B, S, D});
  if (out.numel() == 0) return out;
  const GatherRowsParams params{
      .B = B,
      .N = hidden_states.size(1),
      .S = S,
      .D = D,
      .x = hidden_states.const_data_ptr(),
      .indices = indices.const_data_ptr<int32_t>(),
      .out = out.mutable_data_ptr(),
      .stride_x_b = hidden_states.stride(0),
      .stride_x_n = hidden_states.stride(1),
      .stride_indices_b = indices.stride(0),
      .element_size = static_cast<int64_t>(hidden_states.element_size()),
  };
#ifdef TOKENCACHE_CUDA
  check_launch("gather_rows", gather_rows_cuda(params, stream_of(out)));
#else
  torch::stable::parallel_for(
      0, B * S, rows_per_thread(D * params.element_size),
      [&](int64_t begin, int64_t end) { gather_rows_cpu(params, begin, end); });
#endif
  return out;
}

void scatter_rows_(Tensor cache, const Tensor& indices, const Tensor& rows) {
  const int64_t S = indices.size(1);
  expect_shape("scatter_rows_", "cache", cache, {cache.size(0), cache.size(1), cache.size(2)});
  expect_int32("scatter_rows_", "indices", indices, {cache.size(0), S});
  expect_like("scatter_rows_", "rows", rows, cache, {cache.size(0), S, cache.size(2)});
  if (rows.numel() == 0) return;
  const ScatterRowsParams params{
      .B = cache.size(0),
      .N = cache.size(1),
      .S = rows.size(1),
      .D = cache.size(2),
      .rows = rows.const_data_ptr(),
      .indices = indices.const_data_ptr<int32_t>(),
      .cache = cache.mutable_data_ptr(),
      .stride_rows_b = rows.stride(0),
      .stride_rows_s = rows.stride(1),
      .stride_indices_b = indices.stride(0),
      .stride_cache_b = cache.stride(0),
      .stride_cache_n = cache.stride(1),
      .element_size = static_cast<int64_t>(cache.element_size()),
  };
#ifdef TOKENCACHE_CUDA
  check_launch("scatter_rows_", scatter_rows_cuda(params, stream_of(cache)));
#else
  // only S of a sample's N rows are written: the bytes to copy for each of the N, on average
  const int64_t bytes_per_row = params.D * params.element_size * params.S / params.N;
  torch::stable::parallel_for(
      0, params.B * params.N, rows_per_thread(bytes_per_row),
      [&](int64_t begin, int64_t end) { scatter_rows_cpu(params, begin, end); });
#endif
}

}  // namespace
}  // namespace tokencache

#ifndef TOKENCACHE_CUDA
STABLE_TORCH_LIBRARY_FRAGMENT(tokencache_kernels_native, m) {
  m.def("gather_rows(Tensor hidden_states, Tensor indices) -> Tensor");
  m.def("scatter_rows_(Tensor(a!) cache, Tensor indices, Tensor rows) -> ()");
}
#endif

STABLE_TORCH_LIBRARY_IMPL(tokencache_kernels_native, TOKENCACHE_KEY, m) {
  m.impl("gather_rows", TORCH_BOX(&tokencache::gather_rows));
  m.impl("scatter_rows_", TORCH_BOX(&tokencache::scatter_rows_));
}
