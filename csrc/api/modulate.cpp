#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <vector>

#include "api/describe.h"
#include "cpu/vector.h"

// The inputs were checked by tokencache_kernels.ops; nothing below it checks again.
namespace tokencache {
namespace {

using torch::stable::Tensor;

void add_branches(Tensor out, const Tensor& hidden_states, std::vector<Tensor> branches,
                  std::vector<std::optional<Tensor>> gates) {
  if (out.numel() == 0) return;
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
  const AddBranchesParams params{
      .B = out.size(0),
      .N = out.size(1),
      .D = out.size(2),
      .type = type_of(out),
      .x = hidden_states.const_data_ptr(),
      .branches = described.data(),
      .num_branches = static_cast<int64_t>(described.size()),
      .out = out.mutable_data_ptr(),
      .stride_x_b = hidden_states.stride(0),
      .stride_x_n = hidden_states.stride(1),
      .stride_out_b = out.stride(0),
      .stride_out_n = out.stride(1),
  };
  const int64_t bytes_per_row =
      (params.num_branches + 2) * params.D * static_cast<int64_t>(out.element_size());
  torch::stable::parallel_for(
      0, params.B * params.N, rows_per_thread(bytes_per_row),
      [&](int64_t begin, int64_t end) { vector_loops().add_branches(params, begin, end); });
}

Tensor gather_modulate(const Tensor& hidden_states, const Tensor& indices, const Tensor& shift,
                       const Tensor& scale, double eps) {
  const int64_t B = hidden_states.size(0), S = indices.size(1), D = hidden_states.size(2);
  Tensor packed = torch::stable::new_empty(hidden_states, {B, S, D});
  if (packed.numel() == 0) return packed;
  const ModulateParams params{
      .B = B,
      .N = hidden_states.size(1),
      .S = S,
      .D = D,
      .type = type_of(hidden_states),
      .eps = eps,
      .x = hidden_states.const_data_ptr(),
      .indices = indices.const_data_ptr<int32_t>(),
      .shift = shift.const_data_ptr(),
      .scale = scale.const_data_ptr(),
      .packed = packed.mutable_data_ptr(),
      .stride_x_b = hidden_states.stride(0),
      .stride_x_n = hidden_states.stride(1),
      .stride_indices_b = indices.stride(0),
      .stride_shift_b = shift.stride(0),
      .stride_scale_b = scale.stride(0),
  };
  // normalising reads a row four times over
  const int64_t bytes_per_row = 4 * D * static_cast<int64_t>(packed.element_size());
  torch::stable::parallel_for(
      0, B * S, rows_per_thread(bytes_per_row),
      [&](int64_t begin, int64_t end) { vector_loops().gather_modulate(params, begin, end); });
  return packed;
}

}  // namespace
}  // namespace tokencache

STABLE_TORCH_LIBRARY_FRAGMENT(tokencache_kernels_native, m) {
  m.def("add_branches(Tensor(a!) out, Tensor x, Tensor[] branches, Tensor?[] gates) -> ()");
  m.def(
      "gather_modulate(Tensor x, Tensor indices, Tensor shift, Tensor scale, float eps) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(tokencache_kernels_native, CPU, m) {
  m.impl("add_branches", TORCH_BOX(&tokencache::add_branches));
  m.impl("gather_modulate", TORCH_BOX(&tokencache::gather_modulate));
}
