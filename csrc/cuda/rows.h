#pragma once

#include <cuda_runtime_api.h>

#include "params.h"

// Each function launches its op on a stream and returns the launch's error.
namespace tokencache {

// out[b, s] = x[b, indices[b, s]], an empty slot: 0.
cudaError_t gather_rows_cuda(const GatherRowsParams& p, cudaStream_t stream);

// cache[b, indices[b, s]] = rows[b, s], an empty slot writes nothing.
cudaError_t scatter_rows_cuda(const ScatterRowsParams& p, cudaStream_t stream);

}  // namespace tokencache
