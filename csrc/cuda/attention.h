#pragma once

#include <cuda_runtime_api.h>

#include "params.h"

namespace tokencache {

// out = softmax(softmax_scale * query @ key.T) @ value and the log-sum-exp of each query's scores.
cudaError_t attention_cuda(const AttentionParams& p, cudaStream_t stream);

}  // namespace tokencache
