#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>

#include "api/describe.h"

#ifdef TOKENCACHE_CUDA
#include "cuda/attention.h"
#include "cuda/statistics.h"
#else
#include "cpu/vector.h"
#endif

// The inputs were checked by tokencache_kernels.ops; nothing below it checks again.
namespace tokencache {
namespace {

using torch::stable::Tensor;

#ifdef TOKENCACHE_CUDA

// The log-sum-exp of each query's scores.
Tensor make_lse(const Tensor& query, const Tensor& key, const std::optional<Tensor>& key_lengths,
                double softmax_scale) {
  Tensor lse = torch::stable::new_empty(query, {query.size(0), query.size(2), query.size(1)},
                                        torch::headeronly::ScalarType::Float);
  const AttentionParams params{
      .map = describe_map(query, key, softmax_scale),
      .value = nullptr,
      .key_lengths = key_lengths ? key_lengths->const_data_ptr<int32_t>() : nullptr,
      .out = nullptr,
      .lse = lse.mutable_data_ptr(),
      .entropy = nullptr,
      .stride_value_b = 0,
      .stride_value_n = 0,
      .stride_value_h = 0,
      .stride_key_lengths_b = key_lengths ? key_lengths->stride(0) : 0,
  };
  check_launch("the log-sum-exp", attention_cuda(params, stream_of(query)));
  return lse;
}

#endif

void attention_received(const Tensor& query, const Tensor& key, std::optional<Tensor> lse,
                        double softmax_scale, Tensor out) {
#ifdef TOKENCACHE_CUDA
  if (!lse) lse = make_lse(query, key, std::nullopt, softmax_scale);
#endif
  const AttentionReceivedParams params{
      .map = describe_map(query, key, softmax_scale),
      .lse = lse ? lse->const_data_ptr() : nullptr,
      .out = out.mutable_data_ptr(),
      .stride_lse_b = lse ? lse->stride(0) : 0,
      .stride_lse_h = lse ? lse->stride(1) : 0,
      .stride_lse_s = lse ? lse->stride(2) : 0,
  };
#ifdef TOKENCACHE_CUDA
  check_launch("attention_received", attention_received_cuda(params, stream_of(out)));
#else
  torch::stable::parallel_for(0, params.map.B * params.map.H, 1, [&](int64_t begin, int64_t end) {
    vector_loops().attention_received(params, begin, end);
  });
#endif
}

void attention_entropy(const Tensor& query, const Tensor& key, std::optional<Tensor> key_lengths,
                       std::optional<Tensor> lse, double softmax_scale, Tensor out) {
#ifdef TOKENCACHE_CUDA
  if (!lse) lse = make_lse(query, key, key_lengths, softmax_scale);
#endif
  const AttentionEntropyParams params{
      .map = describe_map(query, key, softmax_scale),
      .key_lengths = key_lengths ? key_lengths->const_data_ptr<int32_t>() : nullptr,
      .lse = lse ? lse->const_data_ptr() : nullptr,
      .out = out.mutable_data_ptr(),
      .stride_key_lengths_b = key_lengths ? key_lengths->stride(0) : 0,
  };
#ifdef TOKENCACHE_CUDA
  check_launch("attention_entropy", attention_entropy_cuda(params, stream_of(out)));
#else
  const int64_t blocks = (params.map.S + kBlockQueries - 1) / kBlockQueries;
  torch::stable::parallel_for(0, params.map.B * blocks, 1, [&](int64_t begin, int64_t end) {
    vector_loops().attention_entropy(params, begin, end);
  });
#endif
}

void head_norms(const Tensor& x, Tensor out) {
  if (out.numel() == 0) return;
  const HeadNormsParams params{
      .B = x.size(0),
      .N = x.size(1),
      .H = x.size(2),
      .E = x.size(3),
      .type = type_of(x),
      .x = x.const_data_ptr(),
      .out = out.mutable_data_ptr(),
      .stride_x_b = x.stride(0),
      .stride_x_n = x.stride(1),
      .stride_x_h = x.stride(2),
  };
#ifdef TOKENCACHE_CUDA
  check_launch("head_norms", head_norms_cuda(params, stream_of(out)));
#else
  const int64_t bytes_per_row = params.H * params.E * static_cast<int64_t>(x.element_size());
  torch::stable::parallel_for(
      0, params.B * params.N, rows_per_thread(bytes_per_row),
      [&](int64_t begin, int64_t end) { vector_loops().head_norms(params, begin, end); });
#endif
}

void token_change(const Tensor& new_rows, const Tensor& old_rows, bool is_cosine, Tensor out) {
  if (out.numel() == 0) return;
  const TokenChangeParams params{
      .B = new_rows.size(0),
      .N = new_rows.size(1),
      .D = new_rows.size(2),
      .type = type_of(new_rows),
      .is_cosine = is_cosine,
      .new_rows = new_rows.const_data_ptr(),
      .old_rows = old_rows.const_data_ptr(),
      .out = out.mutable_data_ptr(),
      .stride_new_b = new_rows.stride(0),
      .stride_new_n = new_rows.stride(1),
      .stride_old_b = old_rows.stride(0),
      .stride_old_n = old_rows.stride(1),
  };
#ifdef TOKENCACHE_CUDA
  check_launch("token_change", token_change_cuda(params, stream_of(out)));
#else
  const int64_t bytes_per_row = 2 * params.D * static_cast<int64_t>(new_rows.element_size());
  torch::stable::parallel_for(
      0, params.B * params.N, rows_per_thread(bytes_per_row),
      [&](int64_t begin, int64_t end) { vector_loops().token_change(params, begin, end); });
#endif
}

}  // namespace
}  // namespace tokencache

#ifndef TOKENCACHE_CUDA
STABLE_TORCH_LIBRARY_FRAGMENT(tokencache_kernels_native, m) {
  m.def(
      "attention_received(Tensor query, Tensor key, Tensor? lse, float softmax_scale,"
      " Tensor(a!) out) -> ()");
  m.def(
      "attention_entropy(Tensor query, Tensor key, Tensor? key_lengths, Tensor? lse,"
      " float softmax_scale, Tensor(a!) out) -> ()");
  m.def("head_norms(Tensor x, Tensor(a!) out) -> ()");
  m.def("token_change(Tensor new_rows, Tensor old_rows, bool is_cosine, Tensor(a!) out) -> ()");
}
#endif

STABLE_TORCH_LIBRARY_IMPL(tokencache_kernels_native, TOKENCACHE_KEY, m) {
  m.impl("attention_received", TORCH_BOX(&tokencache::attention_received));
  m.impl("attention_entropy", TORCH_BOX(&tokencache::attention_entropy));
  m.impl("head_norms", TORCH_BOX(&tokencache::head_norms));
  m.impl("token_change", TORCH_BOX(&tokencache::token_change));
}
