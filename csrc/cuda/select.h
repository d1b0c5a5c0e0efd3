#pragma once

#include <cuda_runtime_api.h>

#include "params.h"

namespace tokencache {

// For each step in turn: combine the scores, take the top tokens (ties go to the lowest index, NaN
// ranks below everything), update the staleness. The workspace has as many bytes as asked for.
cudaError_t select_tokens_cuda(const SelectParams& p, void* workspace, cudaStream_t stream);
int64_t select_workspace_bytes(const SelectParams& p);

// positions[b, indices[b, s]] = s, and -1 for the others; of a repeated index the last slot stays.
cudaError_t invert_indices_cuda(const InvertIndicesParams& p, cudaStream_t stream);

}  // namespace tokencache
