#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>

#include "api/describe.h"

#ifdef TOKENCACHE_CUDA
#include "cuda/blend.h"
#else
#include "cpu/vector.h"
#endif

// The inputs were checked by tokencache_kernels.ops; nothing below it checks again.
namespace tokencache {
namespace {

using torch::stable::Tensor;

BlendParams describe(const Tensor& cached, const Tensor& fresh, const Tensor& weight, void* out) {
  return {
      .B = fresh.size(0),
      .N = fresh.size(1),
      .D = fresh.size(2),
      .type = type_of(fresh),
      .cached = cached.const_data_ptr(),
      .fresh = fresh.const_data_ptr(),
      .weight = weight.const_data_ptr(),
      .out = out,
      .stride_cached_b = cached.stride(0),
      .stride_cached_n = cached.stride(1),
      .stride_fresh_b = fresh.stride(0),
      .stride_fresh_n = fresh.stride(1),
      .stride_weight_b = weight.stride(0),
      .stride_weight_n = weight.stride(1),
  };
}

Tensor blend(const Tensor& cached, const Tensor& fresh, const Tensor& weight) {
  Tensor out = torch::stable::new_empty(fresh, {fresh.size(0), fresh.size(1), fresh.size(2)});
  if (out.numel() == 0) return out;
  const BlendParams params = describe(cached, fresh, weight, out.mutable_data_ptr());
#ifdef TOKENCACHE_CUDA
  check_launch("blend", blend_cuda(params, stream_of(out)));
#else
  const int64_t bytes_per_row = 3 * params.D * static_cast<int64_t>(out.element_size());
  torch::stable::parallel_for(
      0, params.B * params.N, rows_per_thread(bytes_per_row),
      [&](int64_t begin, int64_t end) { vector_loops().blend(params, begin, end); });
#endif
  return out;
}

void blend_backward(const Tensor& grad, const Tensor& cached, const Tensor& fresh,
                    const Tensor& weight, std::optional<Tensor> grad_cached, Tensor grad_fresh,
                    Tensor grad_weight) {
  if (grad_weight.numel() == 0) return;
  const BlendBackwardParams params{
      .forward = describe(cached, fresh, weight, nullptr),
      .grad = grad.const_data_ptr(),
      .grad_cached = grad_cached ? grad_cached->mutable_data_ptr() : nullptr,
      .grad_fresh = grad_fresh.mutable_data_ptr(),
      .grad_weight = grad_weight.mutable_data_ptr(),
      .stride_grad_b = grad.stride(0),
      .stride_grad_n = grad.stride(1),
  };
#ifdef TOKENCACHE_CUDA
  check_launch("blend_backward", blend_backward_cuda(params, stream_of(grad)));
#else
  const int64_t bytes_per_row = 5 * params.forward.D * static_cast<int64_t>(grad.element_size());
  torch::stable::parallel_for(
      0, grad_weight.numel(), rows_per_thread(bytes_per_row),
      [&](int64_t begin, int64_t end) { vector_loops().blend_backward(params, begin, end); });
#endif
}

}  // namespace
}  // namespace tokencache

#ifndef TOKENCACHE_CUDA
STABLE_TORCH_LIBRARY_FRAGMENT(tokencache_kernels_native, m) {
  m.def("blend(Tensor cached, Tensor fresh, Tensor weight) -> Tensor");
  m.def(
      "blend_backward(Tensor grad, Tensor cached, Tensor fresh, Tensor weight, "
      "Tensor(a!)? grad_cached, Tensor(b!) grad_fresh, Tensor(c!) grad_weight) -> ()");
}
#endif

STABLE_TORCH_LIBRARY_IMPL(tokencache_kernels_native, TOKENCACHE_KEY, m) {
  m.impl("blend", TORCH_BOX(&tokencache::blend));
  m.impl("blend_backward", TORCH_BOX(&tokencache::blend_backward));
}
