#include <vector>

#include "c_api/call.h"
#include "c_api/parallel.h"
#include "cpu/vector.h"

using namespace tokencache;
using namespace tokencache::c_api;

namespace {

// Of add_branches and row_pass, whose fields have the same names.
template <class Args>
void expect_sum(Call& call, const Args& a, int64_t size) {
  call.reads({"x", a.x, a.B, a.N, a.D, a.stride_x_b, a.stride_x_n, size}, true);
  call.expect_within("num_branches", a.num_branches, 0, TOKENCACHE_MAX_BRANCHES);
  call.reads({"branches", a.branches, 1, 1, a.num_branches, 0, 0, sizeof(tokencache_branch)});
  for (int64_t j = 0; j < a.num_branches; ++j) {
    const tokencache_branch& one = a.branches[j];
    call.reads(
        {"branch", one.branch, a.B, a.N, a.D, one.stride_branch_b, one.stride_branch_n, size});
    if (one.gate != nullptr) {
      call.reads({"gate", one.gate, a.B, 1, a.D, one.stride_gate_b, 0, size});
    }
  }
}

// Of gather_modulate and row_pass.
template <class Args>
void expect_modulation(Call& call, const Args& a, int64_t size) {
  call.expect_eps(a.eps);
  call.reads({"indices", a.indices, a.B, 1, a.S, a.stride_indices_b, 0, sizeof(int32_t)});
  // where there is no slot, nothing is modulated
  const int64_t width = a.S == 0 ? 0 : a.D;
  call.reads({"shift", a.shift, a.B, 1, width, a.stride_shift_b, 0, size});
  call.reads({"scale", a.scale, a.B, 1, width, a.stride_scale_b, 0, size});
}

template <class Args>
void add_branches(const Args& a, Type type) {
  if (a.B == 0 || a.N == 0 || a.D == 0) return;
  std::vector<BranchParams> branches;
  for (int64_t j = 0; j < a.num_branches; ++j) {
    const tokencache_branch& one = a.branches[j];
    branches.push_back({
        .branch = one.branch,
        .gate = one.gate,
        .stride_branch_b = one.stride_branch_b,
        .stride_branch_n = one.stride_branch_n,
        // without a gate it is any number
        .stride_gate_b = one.gate == nullptr ? 0 : one.stride_gate_b,
    });
  }
  const AddBranchesParams params{
      .B = a.B,
      .N = a.N,
      .D = a.D,
      .type = type,
      .x = a.x,
      .branches = branches.data(),
      .num_branches = a.num_branches,
      .out = a.out,
      .stride_x_b = a.stride_x_b,
      .stride_x_n = a.stride_x_n,
      .stride_out_b = a.stride_out_b,
      .stride_out_n = a.stride_out_n,
  };
  parallel_for(
      a.B * a.N, (a.num_branches + 2) * a.D * size_of(type),
      [&](int64_t begin, int64_t end) { vector_loops().add_branches(params, begin, end); });
}

// Of the rows of x: the argument of that name, or what a row pass has just written.
template <class Args>
void gather_modulate(const Args& a, Type type, const void* x, int64_t stride_x_b,
                     int64_t stride_x_n) {
  if (a.B == 0 || a.S == 0 || a.D == 0) return;
  const ModulateParams params{
      .B = a.B,
      .N = a.N,
      .S = a.S,
      .D = a.D,
      .type = type,
      .eps = a.eps,
      .x = x,
      .indices = a.indices,
      .shift = a.shift,
      .scale = a.scale,
      .packed = a.packed,
      .stride_x_b = stride_x_b,
      .stride_x_n = stride_x_n,
      .stride_indices_b = a.stride_indices_b,
      .stride_shift_b = a.stride_shift_b,
      .stride_scale_b = a.stride_scale_b,
  };
  // normalising reads a row four times over
  parallel_for(a.B * a.S, 4 * a.D * size_of(type), [&](int64_t begin, int64_t end) {
    vector_loops().gather_modulate(params, begin, end);
  });
}

}  // namespace

tokencache_status tokencache_add_branches(const tokencache_add_branches_args* args,
                                          tokencache_device device, void* stream) {
  return run("add_branches", [&] {
    Call call("add_branches", args, device, stream);
    const auto& a = *args;
    call.expect_sizes(a.B, a.N, 0, a.D);
    const Type type = call.type_of(a.dtype);
    call.writes({"out", a.out, a.B, a.N, a.D, a.stride_out_b, a.stride_out_n, size_of(type)});
    expect_sum(call, a, size_of(type));
    add_branches(a, type);
  });
}

tokencache_status tokencache_gather_modulate(const tokencache_gather_modulate_args* args,
                                             tokencache_device device, void* stream) {
  return run("gather_modulate", [&] {
    Call call("gather_modulate", args, device, stream);
    const auto& a = *args;
    call.expect_sizes(a.B, a.N, a.S, a.D);
    const Type type = call.type_of(a.dtype);
    call.writes(contiguous("packed", a.packed, a.B, a.S, a.D, size_of(type)));
    call.reads({"x", a.x, a.B, a.N, a.D, a.stride_x_b, a.stride_x_n, size_of(type)});
    expect_modulation(call, a, size_of(type));
    gather_modulate(a, type, a.x, a.stride_x_b, a.stride_x_n);
  });
}

tokencache_status tokencache_row_pass(const tokencache_row_pass_args* args,
                                      tokencache_device device, void* stream) {
  return run("row_pass", [&] {
    Call call("row_pass", args, device, stream);
    const auto& a = *args;
    call.expect_sizes(a.B, a.N, a.S, a.D);
    const Type type = call.type_of(a.dtype);
    call.writes({"out", a.out, a.B, a.N, a.D, a.stride_out_b, a.stride_out_n, size_of(type)});
    call.writes(contiguous("packed", a.packed, a.B, a.S, a.D, size_of(type)));
    expect_sum(call, a, size_of(type));
    expect_modulation(call, a, size_of(type));
    // two loops: the few selected rows are still in a cache for the second
    add_branches(a, type);
    gather_modulate(a, type, a.out, a.stride_out_b, a.stride_out_n);
  });
}
