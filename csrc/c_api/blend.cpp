#include "c_api/call.h"
#include "c_api/parallel.h"
#include "cpu/vector.h"

using namespace tokencache;
using namespace tokencache::c_api;

tokencache_status tokencache_blend(const tokencache_blend_args* args, tokencache_device device,
                                   void* stream) {
  return run("blend", [&] {
    Call call("blend", args, device, stream);
    const auto& a = *args;
    call.expect_sizes(a.B, a.N, 0, a.D);
    const Type type = call.type_of(a.dtype);
    call.expect_kernel(type, times(a.B, a.N), 0);
    const int64_t size = size_of(type);
    const int64_t weight_size = type == Type::kFloat64 ? sizeof(double) : sizeof(float);
    // where there is no channel, nothing is weighted
    const int64_t weight_width = a.D == 0 ? 0 : 1;
    call.writes(contiguous("out", a.out, a.B, a.N, a.D, size));
    call.reads({"cached", a.cached, a.B, a.N, a.D, a.stride_cached_b, a.stride_cached_n, size});
    call.reads({"fresh", a.fresh, a.B, a.N, a.D, a.stride_fresh_b, a.stride_fresh_n, size});
    call.reads({"weight", a.weight, a.B, a.N, weight_width, a.stride_weight_b, a.stride_weight_n,
                weight_size});
    if (a.B == 0 || a.N == 0 || a.D == 0) return;
    const BlendParams params{
        .B = a.B,
        .N = a.N,
        .D = a.D,
        .type = type,
        .cached = a.cached,
        .fresh = a.fresh,
        .weight = a.weight,
        .out = a.out,
        .stride_cached_b = taken(a.stride_cached_b, a.B),
        .stride_cached_n = taken(a.stride_cached_n, a.N),
        .stride_fresh_b = taken(a.stride_fresh_b, a.B),
        .stride_fresh_n = taken(a.stride_fresh_n, a.N),
        .stride_weight_b = taken(a.stride_weight_b, a.B),
        .stride_weight_n = taken(a.stride_weight_n, a.N),
    };
    if (const CudaLaunches* cuda = call.cuda()) {
      return call.expect_launched(cuda->blend(params, stream));
    }
    parallel_for(a.B * a.N, 3 * a.D * size,
                 [&](int64_t begin, int64_t end) { vector_loops().blend(params, begin, end); });
  });
}
