#pragma once

#include <cuda_runtime_api.h>

#include "params.h"

namespace tokencache {

// Normalises and rotates the projected heads in place.
cudaError_t finish_heads_cuda(const FinishHeadsParams& p, cudaStream_t stream);

}  // namespace tokencache
