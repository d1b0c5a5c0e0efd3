#pragma once

#include <cuda_runtime_api.h>

#include "params.h"

namespace tokencache {

// out = (1 - weight) * cached + weight * fresh.
cudaError_t blend_cuda(const BlendParams& p, cudaStream_t stream);

// The gradients of that.
cudaError_t blend_backward_cuda(const BlendBackwardParams& p, cudaStream_t stream);

}  // namespace tokencache
