#pragma once

#include <cuda_runtime_api.h>

#include "params.h"

namespace tokencache {

// out[b, h, n] = mean_s exp(softmax_scale * query[b, s, h] @ key[b, n, h] - lse[b, h, s]).
cudaError_t attention_received_cuda(const AttentionReceivedParams& p, cudaStream_t stream);

// out[b, s] = -sum_n p log p, p[n] the mean over the heads of exp(score[b, h, s, n] - lse[b, h,
// s]).
cudaError_t attention_entropy_cuda(const AttentionEntropyParams& p, cudaStream_t stream);

// out[b, n] = mean_h |x[b, n, h]|.
cudaError_t head_norms_cuda(const HeadNormsParams& p, cudaStream_t stream);

// out[b, n] = 1 - cos(new, old), or |new - old|_1 / |old|_1.
cudaError_t token_change_cuda(const TokenChangeParams& p, cudaStream_t stream);

}  // namespace tokencache
