#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <utility>
#include <vector>

#include "api/describe.h"

#ifdef TOKENCACHE_CUDA
#include "cuda/modulate.h"
#else
#include "cpu/vector.h"
#endif

// The inputs were checked by tokencache_kernels.ops; nothing below it checks again.
namespace tokencache {
namespace {

using torch::stable::Tensor;

std::vector<BranchParams> describe_branches(const std::vector<Tensor>& branches,
                                            const std::vector<std::optional<Tensor>>& gates) {
  std::vector<BranchParams> described;
  described.reserve(branches.size());
  for (size_t j = 0; j < branches.size(); ++j) {
    const std::optional<Tensor>& gate = gates[j];
    described.push_back({
        .branch = branches[j].const_data_ptr(),
        .gate = gate ? gate->const_data_ptr() : nullptr,
        .stride_branch_b = branches[j].stride(0),
        .stride_branch_n = branches[j].stride(1),
        .stride_gate_b = gate ? gate->stride(0) : 0,
    });
  }
  return described;
}

AddBranchesParams describe_sum(Tensor& out, const Tensor& x,
                               const std::vector<BranchParams>& branches) {
  return {
      .B = out.size(0),
      .N = out.size(1),
      .D = out.size(2),
      .type = type_of(out),
      .x = x.const_data_ptr(),
      .branches = branches.data(),
      .num_branches = static_cast<int64_t>(branches.size()),
      .out = out.mutable_data_ptr(),
      .stride_x_b = x.stride(0),
      .stride_x_n = x.stride(1),
      .stride_out_b = out.stride(0),
      .stride_out_n = out.stride(1),
  };
}

ModulateParams describe_modulate(const Tensor& x, const Tensor& indices, const Tensor& shift,
                                 const Tensor& scale, double eps, Tensor& packed) {
  return {
      .B = x.size(0),
      .N = x.size(1),
      .S = indices.size(1),
      .D = x.size(2),
      .type = type_of(x),
      .eps = eps,
      .x = x.const_data_ptr(),
      .indices = indices.const_data_ptr<int32_t>(),
      .shift = shift.const_data_ptr(),
      .scale = scale.const_data_ptr(),
      .packed = packed.mutable_data_ptr(),
      .stride_x_b = x.stride(0),
      .stride_x_n = x.stride(1),
      .stride_indices_b = indices.stride(0),
      .stride_shift_b = shift.stride(0),
      .stride_scale_b = scale.stride(0),
  };
}

void add_branches(Tensor out, const Tensor& x, std::vector<Tensor> branches,
                  std::vector<std::optional<Tensor>> gates) {
  if (out.numel() == 0) return;
  const std::vector<BranchParams> described = describe_branches(branches, gates);
  const AddBranchesParams params = describe_sum(out, x, described);
#ifdef TOKENCACHE_CUDA
  check_launch("add_branches", add_branches_cuda(params, stream_of(out)));
#else
  const int64_t bytes_per_row =
      (params.num_branches + 2) * params.D * static_cast<int64_t>(out.element_size());
  torch::stable::parallel_for(
      0, params.B * params.N, rows_per_thread(bytes_per_row),
      [&](int64_t begin, int64_t end) { vector_loops().add_branches(params, begin, end); });
#endif
}

Tensor gather_modulate(const Tensor& x, const Tensor& indices, const Tensor& shift,
                       const Tensor& scale, double eps) {
  Tensor packed = torch::stable::new_empty(x, {x.size(0), indices.size(1), x.size(2)});
  if (packed.numel() == 0) return packed;
  const ModulateParams params = describe_modulate(x, indices, shift, scale, eps, packed);
#ifdef TOKENCACHE_CUDA
  check_launch("gather_modulate", gather_modulate_cuda(params, stream_of(x)));
#else
  // normalising reads a row four times over
  const int64_t bytes_per_row = 4 * params.D * static_cast<int64_t>(x.element_size());
  torch::stable::parallel_for(
      0, params.B * params.S, rows_per_thread(bytes_per_row),
      [&](int64_t begin, int64_t end) { vector_loops().gather_modulate(params, begin, end); });
#endif
  return packed;
}

Tensor row_pass(Tensor out, const Tensor& x, std::vector<Tensor> branches,
                std::vector<std::optional<Tensor>> gates, const Tensor& indices,
                [[maybe_unused]] const Tensor& positions, const Tensor& shift, const Tensor& scale,
                double eps) {
#ifdef TOKENCACHE_CUDA
  Tensor packed = torch::stable::new_empty(x, {x.size(0), indices.size(1), x.size(2)});
  if (out.numel() == 0) return packed;
  const std::vector<BranchParams> described = describe_branches(branches, gates);
  const AddBranchesParams sum = describe_sum(out, x, described);
  const ModulateParams modulate = describe_modulate(out, indices, shift, scale, eps, packed);
  check_launch("row_pass",
               row_pass_cuda(sum, modulate, positions.const_data_ptr<int32_t>(), stream_of(out)));
  return packed;
#else
  // on the CPU the few selected rows are still in a cache
  add_branches(out, x, std::move(branches), std::move(gates));
  return gather_modulate(out, indices, shift, scale, eps);
#endif
}

}  // namespace
}  // namespace tokencache

#ifndef TOKENCACHE_CUDA
STABLE_TORCH_LIBRARY_FRAGMENT(tokencache_kernels_native, m) {
  m.def("add_branches(Tensor(a!) out, Tensor x, Tensor[] branches, Tensor?[] gates) -> ()");
  m.def(
      "gather_modulate(Tensor x, Tensor indices, Tensor shift, Tensor scale, float eps) -> Tensor");
  m.def(
      "row_pass(Tensor(a!) out, Tensor x, Tensor[] branches, Tensor?[] gates, Tensor indices,"
      " Tensor positions, Tensor shift, Tensor scale, float eps) -> Tensor");
}
#endif

STABLE_TORCH_LIBRARY_IMPL(tokencache_kernels_native, TOKENCACHE_KEY, m) {
  m.impl("add_branches", TORCH_BOX(&tokencache::add_branches));
  m.impl("gather_modulate", TORCH_BOX(&tokencache::gather_modulate));
  m.impl("row_pass", TORCH_BOX(&tokencache::row_pass));
}
