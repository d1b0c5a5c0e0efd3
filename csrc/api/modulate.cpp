#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "api/describe.h"

#ifdef TOKENCACHE_CUDA
#include "cuda/modulate.h"
#else
#include "cpu/vector.h"
#endif

// tokencache_kernels.ops has checked the inputs in words; the loop's assumptions are asserted here.
namespace tokencache {
namespace {

using torch::stable::Tensor;

// The norms of branches, as the schemas hold them: nothing where no branch has one.
struct BranchNorms {
  std::vector<std::optional<Tensor>> weights;
  std::vector<double> offsets, eps;  // an eps below 0 stands for no norm
};

// Of rank 2 one vector for each sample; of rank 3 one for each token, or for each number.
VectorParams describe_vectors(const char* op, const char* name,
                              const std::optional<Tensor>& vectors, const Tensor& x,
                              const std::optional<Tensor>& index) {
  if (!vectors) return {};
  const int64_t rank = vectors->dim();
  STD_TORCH_CHECK(rank == 2 || rank == 3, op, ": ", name, " must have rank 2 or 3, got ", rank);
  if (rank == 2) {
    expect_like(op, name, *vectors, x, {x.size(0), x.size(2)});
    return {.data = vectors->const_data_ptr(), .stride_b = vectors->stride(0)};
  }
  const int64_t K = vectors->size(1);
  expect_like(op, name, *vectors, x, {x.size(0), index ? K : x.size(1), x.size(2)});
  if (index) expect_int32(op, "vector_index", *index, {x.size(0), x.size(1)});
  return {
      .data = vectors->const_data_ptr(),
      .stride_b = vectors->stride(0),
      .stride_n = vectors->stride(1),
      .K = K,
      .index = index ? index->const_data_ptr<int32_t>() : nullptr,
      .stride_index_b = index ? index->stride(0) : 0,
  };
}

NormParams describe_norm(const char* op, const std::string& kind,
                         const std::optional<Tensor>& weight, const std::optional<Tensor>& bias,
                         double offset, double eps, const Tensor& x) {
  if (weight) expect_like(op, "norm's weight", *weight, x, {x.size(2)});
  if (bias) expect_like(op, "norm's bias", *bias, x, {x.size(2)});
  return {
      .kind = kind == "layer" ? NormKind::kLayer
              : kind == "rms" ? NormKind::kRms
                              : NormKind::kNone,
      .eps = eps,
      .weight = data_of(weight),
      .bias = data_of(bias),
      .weight_offset = offset,
  };
}

std::vector<BranchParams> describe_branches(const char* op, const Tensor& x,
                                            const std::vector<Tensor>& branches,
                                            const std::vector<std::optional<Tensor>>& gates,
                                            const BranchNorms& norms,
                                            const std::optional<Tensor>& index) {
  STD_TORCH_CHECK(gates.size() == branches.size(), op, ": there must be a gate for each branch");
  std::vector<BranchParams> described;
  described.reserve(branches.size());
  for (size_t j = 0; j < branches.size(); ++j) {
    expect_like(op, "branch", branches[j], x, {x.size(0), x.size(1), x.size(2)});
    NormParams norm;
    if (!norms.eps.empty() && norms.eps[j] >= 0) {
      norm = describe_norm(op, "rms", norms.weights[j], {}, norms.offsets[j], norms.eps[j], x);
    }
    described.push_back({
        .branch = branches[j].const_data_ptr(),
        .gate = describe_vectors(op, "gate", gates[j], x, index),
        .norm = norm,
        .stride_branch_b = branches[j].stride(0),
        .stride_branch_n = branches[j].stride(1),
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

ModulateParams describe_modulate(const char* op, const Tensor& x, const Tensor& indices,
                                 const std::optional<Tensor>& shift,
                                 const std::optional<Tensor>& scale, const NormParams& norm,
                                 const std::optional<Tensor>& index, Tensor& packed) {
  expect_int32(op, "indices", indices, {x.size(0), indices.size(1)});
  return {
      .B = x.size(0),
      .N = x.size(1),
      .S = indices.size(1),
      .D = x.size(2),
      .type = type_of(x),
      .norm = norm,
      .x = x.const_data_ptr(),
      .indices = indices.const_data_ptr<int32_t>(),
      .shift = describe_vectors(op, "shift", shift, x, index),
      .scale = describe_vectors(op, "scale", scale, x, index),
      .packed = packed.mutable_data_ptr(),
      .stride_x_b = x.stride(0),
      .stride_x_n = x.stride(1),
      .stride_indices_b = indices.stride(0),
  };
}

void add_branches(Tensor out, const Tensor& x, std::vector<Tensor> branches,
                  std::vector<std::optional<Tensor>> gates,
                  std::vector<std::optional<Tensor>> norm_weights, std::vector<double> norm_offsets,
                  std::vector<double> norm_eps, std::optional<Tensor> index) {
  expect_like("add_branches", "out", out, x, {x.size(0), x.size(1), x.size(2)});
  if (out.numel() == 0) return;
  const std::vector<BranchParams> described = describe_branches(
      "add_branches", x, branches, gates, {norm_weights, norm_offsets, norm_eps}, index);
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

Tensor gather_modulate(const Tensor& x, const Tensor& indices, std::optional<Tensor> shift,
                       std::optional<Tensor> scale, std::string norm_kind,
                       std::optional<Tensor> norm_weight, std::optional<Tensor> norm_bias,
                       double norm_offset, double eps, std::optional<Tensor> index) {
  Tensor packed = torch::stable::new_empty(x, {x.size(0), indices.size(1), x.size(2)});
  if (packed.numel() == 0) return packed;
  const NormParams norm =
      describe_norm("gather_modulate", norm_kind, norm_weight, norm_bias, norm_offset, eps, x);
  const ModulateParams params =
      describe_modulate("gather_modulate", x, indices, shift, scale, norm, index, packed);
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
                std::vector<std::optional<Tensor>> gates,
                std::vector<std::optional<Tensor>> norm_weights, std::vector<double> norm_offsets,
                std::vector<double> norm_eps, const Tensor& indices,
                [[maybe_unused]] const Tensor& positions, std::optional<Tensor> shift,
                std::optional<Tensor> scale, std::string norm_kind,
                std::optional<Tensor> norm_weight, std::optional<Tensor> norm_bias,
                double norm_offset, double eps, std::optional<Tensor> index) {
#ifdef TOKENCACHE_CUDA
  const char* op = "row_pass";
  Tensor packed = torch::stable::new_empty(x, {x.size(0), indices.size(1), x.size(2)});
  expect_like(op, "out", out, x, {x.size(0), x.size(1), x.size(2)});
  expect_int32(op, "positions", positions, {x.size(0), x.size(1)});
  if (out.numel() == 0) return packed;
  const std::vector<BranchParams> described =
      describe_branches(op, x, branches, gates, {norm_weights, norm_offsets, norm_eps}, index);
  const AddBranchesParams sum = describe_sum(out, x, described);
  const NormParams norm = describe_norm(op, norm_kind, norm_weight, norm_bias, norm_offset, eps, x);
  const ModulateParams modulate =
      describe_modulate(op, out, indices, shift, scale, norm, index, packed);
  check_launch(op,
               row_pass_cuda(sum, modulate, positions.const_data_ptr<int32_t>(), stream_of(out)));
  return packed;
#else
  // on the CPU the few selected rows are still in a cache
  add_branches(out, x, std::move(branches), std::move(gates), std::move(norm_weights),
               std::move(norm_offsets), std::move(norm_eps), index);
  return gather_modulate(out, indices, shift, scale, norm_kind, norm_weight, norm_bias, norm_offset,
                         eps, index);
#endif
}

}  // namespace
}  // namespace tokencache

#ifndef TOKENCACHE_CUDA
STABLE_TORCH_LIBRARY_FRAGMENT(tokencache_kernels_native, m) {
  m.def(
      "add_branches(Tensor(a!) out, Tensor x, Tensor[] branches, Tensor?[] gates,"
      " Tensor?[] norm_weights, float[] norm_offsets, float[] norm_eps, Tensor? index) -> ()");
  m.def(
      "gather_modulate(Tensor x, Tensor indices, Tensor? shift, Tensor? scale, str norm_kind,"
      " Tensor? norm_weight, Tensor? norm_bias, float norm_offset, float eps, Tensor? index)"
      " -> Tensor");
  m.def(
      "row_pass(Tensor(a!) out, Tensor x, Tensor[] branches, Tensor?[] gates,"
      " Tensor?[] norm_weights, float[] norm_offsets, float[] norm_eps, Tensor indices,"
      " Tensor positions, Tensor? shift, Tensor? scale, str norm_kind, Tensor? norm_weight,"
      " Tensor? norm_bias, float norm_offset, float eps, Tensor? index) -> Tensor");
}
#endif

STABLE_TORCH_LIBRARY_IMPL(tokencache_kernels_native, TOKENCACHE_KEY, m) {
  m.impl("add_branches", TORCH_BOX(&tokencache::add_branches));
  m.impl("gather_modulate", TORCH_BOX(&tokencache::gather_modulate));
  m.impl("row_pass", TORCH_BOX(&tokencache::row_pass));
}
