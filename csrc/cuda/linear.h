#pragma once

#include <cuda_runtime_api.h>

#include "params.h"

namespace tokencache {

// out[to(b, s)] = [old value +] [gate[b] *] [factor[b, s] *] activation(x[from(b, s)] @ weight.T +
// bias).
cudaError_t linear_cuda(const LinearParams& p, cudaStream_t stream);

}  // namespace tokencache
