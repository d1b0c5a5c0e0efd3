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

// One vector of each sample.
VectorParams vector_of(const void* data, int64_t stride_b) {
  return {.data = data, .stride_b = stride_b};
}

template <class Args>
std::vector<BranchParams> describe_branches(const Args& a) {
  std::vector<BranchParams> branches;
  for (int64_t j = 0; j < a.num_branches; ++j) {
    const tokencache_branch& one = a.branches[j];
    branches.push_back({
        .branch = one.branch,
        // without a gate its stride is any number
        .gate = vector_of(one.gate, one.gate == nullptr ? 0 : taken(one.stride_gate_b, a.B)),
        .norm = {},
        .stride_branch_b = taken(one.stride_branch_b, a.B),
        .stride_branch_n = taken(one.stride_branch_n, a.N),
    });
  }
  return branches;
}

template <class Args>
AddBranchesParams describe_sum(const Args& a, Type type,
                               const std::vector<BranchParams>& branches) {
  return {
      .B = a.B,
      .N = a.N,
      .D = a.D,
      .type = type,
      .x = a.x,
      .branches = branches.data(),
      .num_branches = a.num_branches,
      .out = a.out,
      .stride_x_b = taken(a.stride_x_b, a.B),
      .stride_x_n = taken(a.stride_x_n, a.N),
      .stride_out_b = taken(a.stride_out_b, a.B),
      .stride_out_n = taken(a.stride_out_n, a.N),
  };
}

// Of the rows of x: the argument of that name, or the output of a row pass.
template <class Args>
ModulateParams describe_modulation(const Args& a, Type type, const void* x, int64_t stride_x_b,
                                   int64_t stride_x_n) {
  return {
      .B = a.B,
      .N = a.N,
      .S = a.S,
      .D = a.D,
      .type = type,
      .norm = {.kind = NormKind::kLayer, .eps = a.eps},
      .x = x,
      .indices = a.indices,
      .shift = vector_of(a.shift, taken(a.stride_shift_b, a.B)),
      .scale = vector_of(a.scale, taken(a.stride_scale_b, a.B)),
      .packed = a.packed,
      .stride_x_b = taken(stride_x_b, a.B),
      .stride_x_n = taken(stride_x_n, a.N),
      .stride_indices_b = taken(a.stride_indices_b, a.B),
  };
}

void add_branches(const Call& call, const AddBranchesParams& p, void* stream) {
  if (p.B == 0 || p.N == 0 || p.D == 0) return;
  if (const CudaLaunches* cuda = call.cuda()) {
    return call.expect_launched(cuda->add_branches(p, stream));
  }
  parallel_for(p.B * p.N, (p.num_branches + 2) * p.D * size_of(p.type),
               [&](int64_t begin, int64_t end) { vector_loops().add_branches(p, begin, end); });
}

void gather_modulate(const Call& call, const ModulateParams& p, void* stream) {
  if (p.B == 0 || p.S == 0 || p.D == 0) return;
  if (const CudaLaunches* cuda = call.cuda()) {
    return call.expect_launched(cuda->gather_modulate(p, stream));
  }
  // normalising reads a row four times over
  parallel_for(p.B * p.S, 4 * p.D * size_of(p.type),
               [&](int64_t begin, int64_t end) { vector_loops().gather_modulate(p, begin, end); });
}

}  // namespace

tokencache_status tokencache_add_branches(const tokencache_add_branches_args* args,
                                          tokencache_device device, void* stream) {
  return run("add_branches", [&] {
    Call call("add_branches", args, device, stream);
    const auto& a = *args;
    call.expect_sizes(a.B, a.N, 0, a.D);
    const Type type = call.type_of(a.dtype);
    call.expect_kernel(type, times(a.B, a.N), 0);
    call.writes({"out", a.out, a.B, a.N, a.D, a.stride_out_b, a.stride_out_n, size_of(type)});
    expect_sum(call, a, size_of(type));
    const std::vector<BranchParams> branches = describe_branches(a);
    add_branches(call, describe_sum(a, type, branches), stream);
  });
}

tokencache_status tokencache_gather_modulate(const tokencache_gather_modulate_args* args,
                                             tokencache_device device, void* stream) {
  return run("gather_modulate", [&] {
    Call call("gather_modulate", args, device, stream);
    const auto& a = *args;
    call.expect_sizes(a.B, a.N, a.S, a.D);
    const Type type = call.type_of(a.dtype);
    call.expect_kernel(type, times(a.B, a.S), a.D);
    call.writes(contiguous("packed", a.packed, a.B, a.S, a.D, size_of(type)));
    call.reads({"x", a.x, a.B, a.N, a.D, a.stride_x_b, a.stride_x_n, size_of(type)});
    expect_modulation(call, a, size_of(type));
    gather_modulate(call, describe_modulation(a, type, a.x, a.stride_x_b, a.stride_x_n), stream);
  });
}

tokencache_status tokencache_row_pass(const tokencache_row_pass_args* args,
                                      tokencache_device device, void* stream) {
  return run("row_pass", [&] {
    Call call("row_pass", args, device, stream);
    const auto& a = *args;
    call.expect_sizes(a.B, a.N, a.S, a.D);
    const Type type = call.type_of(a.dtype);
    call.expect_kernel(type, times(a.B, a.N + a.S), a.D);
    call.writes({"out", a.out, a.B, a.N, a.D, a.stride_out_b, a.stride_out_n, size_of(type)});
    call.writes(contiguous("packed", a.packed, a.B, a.S, a.D, size_of(type)));
    expect_sum(call, a, size_of(type));
    expect_modulation(call, a, size_of(type));
    if (a.positions != nullptr) {
      call.reads(contiguous("positions", a.positions, 1, a.B, a.N, sizeof(int32_t)));
    }
    const std::vector<BranchParams> branches = describe_branches(a);
    const AddBranchesParams sum = describe_sum(a, type, branches);
    const ModulateParams modulation =
        describe_modulation(a, type, a.out, a.stride_out_b, a.stride_out_n);
    const bool is_packed = a.B > 0 && a.S > 0 && a.D > 0;
    if (call.cuda() != nullptr && a.positions != nullptr && is_packed) {
      return call.expect_launched(call.cuda()->row_pass(sum, modulation, a.positions, stream));
    }
    // on the CPU the few selected rows are still in a cache for the second part
    add_branches(call, sum, stream);
    gather_modulate(call, modulation, stream);
  });
}
