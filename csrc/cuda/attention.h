#pragma once

#include <cuda_runtime_api.h>

#include "params.h"

namespace tokencache {

// out = softmax(softmax_scale * query @ key.T) @ value; of each query's scores the log-sum-exp and,
// where it is asked for, of each row of the map the entropy.
cudaError_t attention_cuda(const AttentionParams& p, cudaStream_t stream);

}  // namespace tokencache
