#include "cpu/rows.h"

#include "c_api/call.h"
#include "c_api/parallel.h"

using namespace tokencache;
using namespace tokencache::c_api;

tokencache_status tokencache_gather_rows(const tokencache_gather_rows_args* args,
                                         tokencache_device device, void* stream) {
  return run("gather_rows", [&] {
    Call call("gather_rows", args, device, stream);
    const auto& a = *args;
    call.expect_sizes(a.B, a.N, a.S, a.D);
    const int64_t size = size_of(call.type_of(a.dtype));
    call.writes(contiguous("out", a.out, a.B, a.S, a.D, size));
    call.reads({"x", a.x, a.B, a.N, a.D, a.stride_x_b, a.stride_x_n, size});
    call.reads({"indices", a.indices, a.B, 1, a.S, a.stride_indices_b, 0, sizeof(int32_t)});
    if (a.B == 0 || a.S == 0 || a.D == 0) return;
    const GatherRowsParams params{
        .B = a.B,
        .N = a.N,
        .S = a.S,
        .D = a.D,
        .x = a.x,
        .indices = a.indices,
        .out = a.out,
        .stride_x_b = taken(a.stride_x_b, a.B),
        .stride_x_n = taken(a.stride_x_n, a.N),
        .stride_indices_b = taken(a.stride_indices_b, a.B),
        .element_size = size,
    };
    if (const CudaLaunches* cuda = call.cuda()) {
      return call.expect_launched(cuda->gather_rows(params, stream));
    }
    parallel_for(a.B * a.S, a.D * size,
                 [&](int64_t begin, int64_t end) { gather_rows_cpu(params, begin, end); });
  });
}

tokencache_status tokencache_scatter_rows(const tokencache_scatter_rows_args* args,
                                          tokencache_device device, void* stream) {
  return run("scatter_rows", [&] {
    Call call("scatter_rows", args, device, stream);
    const auto& a = *args;
    call.expect_sizes(a.B, a.N, a.S, a.D);
    const int64_t size = size_of(call.type_of(a.dtype));
    call.writes({"cache", a.cache, a.B, a.N, a.D, a.stride_cache_b, a.stride_cache_n, size});
    call.reads({"rows", a.rows, a.B, a.S, a.D, a.stride_rows_b, a.stride_rows_s, size});
    call.reads({"indices", a.indices, a.B, 1, a.S, a.stride_indices_b, 0, sizeof(int32_t)});
    if (a.B == 0 || a.S == 0 || a.D == 0) return;
    const ScatterRowsParams params{
        .B = a.B,
        .N = a.N,
        .S = a.S,
        .D = a.D,
        .rows = a.rows,
        .indices = a.indices,
        .cache = a.cache,
        .stride_rows_b = taken(a.stride_rows_b, a.B),
        .stride_rows_s = taken(a.stride_rows_s, a.S),
        .stride_indices_b = taken(a.stride_indices_b, a.B),
        .stride_cache_b = taken(a.stride_cache_b, a.B),
        .stride_cache_n = taken(a.stride_cache_n, a.N),
        .element_size = size,
    };
    if (const CudaLaunches* cuda = call.cuda()) {
      return call.expect_launched(cuda->scatter_rows(params, stream));
    }
    // on average, a row of the cache is written S / N times
    parallel_for(a.B * a.N, a.D * size * a.S / a.N,
                 [&](int64_t begin, int64_t end) { scatter_rows_cpu(params, begin, end); });
  });
}
