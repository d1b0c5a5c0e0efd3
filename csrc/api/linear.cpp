#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <string>

#include "api/describe.h"

#ifdef TOKENCACHE_CUDA
#include "cuda/linear.h"

// tokencache_kernels.ops has checked the inputs in words; the kernel's assumptions are asserted
// here.
namespace tokencache {
namespace {

using torch::stable::Tensor;

Activation activation_of(const std::string& name) {
  if (name == "gelu") return Activation::kGelu;
  if (name == "gelu_tanh") return Activation::kGeluTanh;
  if (name == "silu") return Activation::kSilu;
  return Activation::kNone;
}

Tensor linear(const Tensor& x, const Tensor& weight, std::optional<Tensor> bias,
              std::string activation, std::optional<Tensor> indices, std::optional<Tensor> factor) {
  const Tensor& packed = indices ? *indices : x;
  const int64_t B = packed.size(0), S = packed.size(1), O = weight.size(0);
  expect_shape("linear", "x", x, {B, x.size(1), x.size(2)});
  expect_like("linear", "weight", weight, x, {O, x.size(2)});
  if (bias) expect_like("linear", "bias", *bias, x, {O});
  if (indices) expect_int32("linear", "indices", *indices, {B, S});
  if (factor) expect_like("linear", "factor", *factor, x, {B, S, O});
  Tensor out = torch::stable::new_empty(x, {B, S, O});
  if (out.numel() == 0) return out;
  const LinearParams params{
      .B = B,
      .S = S,
      .K = x.size(2),
      .O = O,
      .N_x = x.size(1),
      .N_out = S,
      .type = type_of(x),
      .activation = activation_of(activation),
      .residual = false,
      .x = x.const_data_ptr(),
      .from = indices ? indices->const_data_ptr<int32_t>() : nullptr,
      .weight = weight.const_data_ptr(),
      .bias = data_of(bias),
      .gate = nullptr,
      .factor = data_of(factor),
      .to = nullptr,
      .out = out.mutable_data_ptr(),
      .stride_x_b = x.stride(0),
      .stride_x_n = x.stride(1),
      .stride_from_b = indices ? indices->stride(0) : 0,
      .stride_weight_o = weight.stride(0),
      .stride_gate_b = 0,
      .stride_to_b = 0,
      .stride_out_b = S * O,
      .stride_out_n = O,
  };
  check_launch("linear", linear_cuda(params, stream_of(x)));
  return out;
}

void linear_scatter_(Tensor cache, const Tensor& indices, const Tensor& x, const Tensor& weight,
                     std::optional<Tensor> bias, std::optional<Tensor> gate, bool residual) {
  const char* op = "linear_scatter_";
  const int64_t B = cache.size(0), S = indices.size(1), O = cache.size(2);
  expect_shape(op, "cache", cache, {B, cache.size(1), O});
  expect_int32(op, "indices", indices, {B, S});
  expect_like(op, "x", x, cache, {B, S, x.size(2)});
  expect_like(op, "weight", weight, cache, {O, x.size(2)});
  if (bias) expect_like(op, "bias", *bias, cache, {O});
  if (gate) expect_like(op, "gate", *gate, cache, {B, O});
  const LinearParams params{
      .B = x.size(0),
      .S = x.size(1),
      .K = x.size(2),
      .O = weight.size(0),
      .N_x = x.size(1),
      .N_out = cache.size(1),
      .type = type_of(x),
      .activation = Activation::kNone,
      .residual = residual,
      .x = x.const_data_ptr(),
      .from = nullptr,
      .weight = weight.const_data_ptr(),
      .bias = data_of(bias),
      .gate = data_of(gate),
      .factor = nullptr,
      .to = indices.const_data_ptr<int32_t>(),
      .out = cache.mutable_data_ptr(),
      .stride_x_b = x.stride(0),
      .stride_x_n = x.stride(1),
      .stride_from_b = 0,
      .stride_weight_o = weight.stride(0),
      .stride_gate_b = gate ? gate->stride(0) : 0,
      .stride_to_b = indices.stride(0),
      .stride_out_b = cache.stride(0),
      .stride_out_n = cache.stride(1),
  };
  if (params.B * params.S * params.O == 0) return;
  check_launch("linear_scatter_", linear_cuda(params, stream_of(cache)));
}

}  // namespace
}  // namespace tokencache

STABLE_TORCH_LIBRARY_IMPL(tokencache_kernels_native, TOKENCACHE_KEY, m) {
  m.impl("linear", TORCH_BOX(&tokencache::linear));
  m.impl("linear_scatter_", TORCH_BOX(&tokencache::linear_scatter_));
}

#else

// On the CPU oneDNN multiplies; see tokencache_kernels/backends/native/linear.py.
STABLE_TORCH_LIBRARY_FRAGMENT(tokencache_kernels_native, m) {
  m.def(
      "linear(Tensor x, Tensor weight, Tensor? bias, str activation, Tensor? indices,"
      " Tensor? factor) -> Tensor");
  m.def(
      "linear_scatter_(Tensor(a!) cache, Tensor indices, Tensor x, Tensor weight, Tensor? bias,"
      " Tensor? gate, bool residual) -> ()");
}

#endif
