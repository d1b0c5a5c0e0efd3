#include "cpu/select.h"

#include <algorithm>

#include "c_api/call.h"
#include "c_api/parallel.h"

using namespace tokencache;
using namespace tokencache::c_api;

namespace {

// Selecting takes as long for one token in one step as copying about so many bytes.
constexpr int64_t kBytesPerToken = 256;

// Of the workspace, in bytes.
constexpr int64_t kAlignment = 8;

// A kernel counts them, and the sides of a grid's squares, in 32 bits.
constexpr int64_t kMostTokensOfKernel = int64_t{1} << 30;

void expect_grid(const Call& call, const tokencache_select_tokens_args& a) {
  if (a.grid_height == 0 && a.grid_width == 0) return;
  call.expect_size("grid_height", a.grid_height);
  call.expect_size("grid_width", a.grid_width);
  call.expect_within("grid_height * grid_width", times(a.grid_height, a.grid_width), a.N, a.N);
  call.expect_within("tile", a.tile, 1, INT64_MAX);
}

// Where there is no step, there is nothing to read or to write.
int64_t layers_of(const tokencache_select_tokens_args& a) { return a.P == 0 ? 0 : a.L; }

bool is_empty(const tokencache_select_tokens_args& a) {
  return layers_of(a) == 0 || a.B == 0 || a.N == 0;
}

void expect_results(Call& call, const tokencache_select_tokens_args& a) {
  call.expect_size("L", a.L);
  call.expect_size("P", a.P);
  call.expect_sizes(a.B, a.N, 0, 0);
  if (call.cuda() != nullptr) call.expect_within("N", a.N, 0, kMostTokensOfKernel);
  call.expect_within("max_fresh", a.max_fresh, 0, a.N);
  expect_grid(call, a);
  const int64_t L = layers_of(a), steps = times(a.P, L);
  call.writes({"staleness", a.staleness, L, a.B, a.N, a.stride_staleness_l, a.stride_staleness_b,
               sizeof(int32_t)});
  call.writes(contiguous("indices", a.indices, steps, a.B, a.max_fresh, sizeof(int32_t)));
  call.writes(contiguous("positions", a.positions, steps, a.B, a.N, sizeof(int32_t)));
}

void expect_inputs(const Call& call, const tokencache_select_tokens_args& a) {
  const int64_t L = layers_of(a);
  call.reads(contiguous("scores", a.scores, L, a.B, a.N, sizeof(float)));
  if (a.num_fresh != nullptr) {
    call.reads(contiguous("num_fresh", a.num_fresh, 1, a.P, L, sizeof(int32_t)));
  }
}

SelectParams describe(const tokencache_select_tokens_args& a) {
  return {
      .L = a.L,
      .B = a.B,
      .N = a.N,
      .P = a.P,
      .max_fresh = a.max_fresh,
      .staleness_weight = a.staleness_weight,
      .normalize = a.normalize != 0,
      .grid_height = a.grid_height,
      .grid_width = a.grid_width,
      // a square larger than the grid is all of it
      .tile = std::min(a.tile, std::max(a.grid_height, a.grid_width)),
      .bonus = a.bonus,
      .scores = a.scores,
      .num_fresh = a.num_fresh,
      .staleness = a.staleness,
      .indices = a.indices,
      .positions = a.positions,
      .stride_staleness_l = taken(a.stride_staleness_l, a.L),
      .stride_staleness_b = taken(a.stride_staleness_b, a.B),
  };
}

int64_t workspace_of(const Call& call, const tokencache_select_tokens_args& a) {
  if (call.cuda() == nullptr || is_empty(a)) return 0;
  return (call.cuda()->select_workspace_bytes(describe(a)) + kAlignment - 1) / kAlignment *
         kAlignment;
}

}  // namespace

tokencache_status tokencache_select_tokens_workspace(const tokencache_select_tokens_args* args,
                                                     tokencache_device device, int64_t* bytes) {
  return run("select_tokens_workspace", [&] {
    Call call("select_tokens_workspace", args, device, nullptr);
    expect_results(call, *args);
    expect_inputs(call, *args);
    if (bytes == nullptr) {
      refuse("select_tokens_workspace", TOKENCACHE_INVALID_ARGUMENT,
             "bytes must not be NULL, got NULL");
    }
    *bytes = workspace_of(call, *args);
  });
}

tokencache_status tokencache_select_tokens(const tokencache_select_tokens_args* args,
                                           tokencache_device device, void* stream) {
  return run("select_tokens", [&] {
    Call call("select_tokens", args, device, stream);
    const auto& a = *args;
    expect_results(call, a);
    if (const int64_t bytes = workspace_of(call, a); bytes > 0) {
      call.expect_within("workspace_bytes", a.workspace_bytes, bytes, INT64_MAX);
      call.writes(contiguous("workspace", a.workspace, 1, 1, bytes / kAlignment, kAlignment));
    }
    expect_inputs(call, a);
    if (is_empty(a)) return;
    const SelectParams params = describe(a);
    if (const CudaLaunches* cuda = call.cuda()) {
      return call.expect_launched(cuda->select_tokens(params, a.workspace, stream));
    }
    parallel_for(a.L * a.B, a.P * a.N * kBytesPerToken,
                 [&](int64_t begin, int64_t end) { select_tokens_cpu(params, begin, end); });
  });
}

tokencache_status tokencache_invert_indices(const tokencache_invert_indices_args* args,
                                            tokencache_device device, void* stream) {
  return run("invert_indices", [&] {
    Call call("invert_indices", args, device, stream);
    const auto& a = *args;
    call.expect_sizes(a.B, a.N, a.S, 0);
    constexpr int64_t size = sizeof(int32_t);
    call.writes(contiguous("positions", a.positions, 1, a.B, a.N, size));
    call.reads({"indices", a.indices, a.B, 1, a.S, a.stride_indices_b, 0, size});
    if (a.B == 0 || a.N == 0) return;
    const InvertIndicesParams params{
        .B = a.B,
        .N = a.N,
        .S = a.S,
        .indices = a.indices,
        .positions = a.positions,
        .stride_indices_b = taken(a.stride_indices_b, a.B),
    };
    if (const CudaLaunches* cuda = call.cuda()) {
      return call.expect_launched(cuda->invert_indices(params, stream));
    }
    parallel_for(a.B, a.N * size,
                 [&](int64_t begin, int64_t end) { invert_indices_cpu(params, begin, end); });
  });
}
