#pragma once

#include <cuda_runtime_api.h>

#include "params.h"

namespace tokencache {

// out = x + sum_j gate_j * norm_j(branch_j).
cudaError_t add_branches_cuda(const AddBranchesParams& p, cudaStream_t stream);

// packed[b, s] = norm(x[b, indices[b, s]]) * (1 + scale) + shift, an empty slot: 0.
cudaError_t gather_modulate_cuda(const ModulateParams& p, cudaStream_t stream);

// Both in one launch: sum.out is modulate.x, and positions (B, N) is the inverse of the indices.
cudaError_t row_pass_cuda(const AddBranchesParams& sum, const ModulateParams& modulate,
                          const int32_t* positions, cudaStream_t stream);

}  // namespace tokencache
