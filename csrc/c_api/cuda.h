#pragma once

#include "params.h"
#include "tokencache.h"

// The interface of libtokencache_cuda to libtokencache: the kernels and CUDA's runtime. It lies
// beside it and is loaded by the first call for CUDA, so that nobody else needs it.
namespace tokencache::c_api {

// TOKENCACHE_OK, or why there was no launch.
struct CudaAnswer {
  tokencache_status status;
  const char* reason;
};

struct CudaLaunches {
  CudaAnswer (*find_device)();

  CudaAnswer (*gather_rows)(const GatherRowsParams& p, void* stream);
  CudaAnswer (*scatter_rows)(const ScatterRowsParams& p, void* stream);
  CudaAnswer (*add_branches)(const AddBranchesParams& p, void* stream);
  CudaAnswer (*gather_modulate)(const ModulateParams& p, void* stream);
  CudaAnswer (*row_pass)(const AddBranchesParams& sum, const ModulateParams& modulate,
                         const int32_t* positions, void* stream);
  int64_t (*select_workspace_bytes)(const SelectParams& p);
  CudaAnswer (*select_tokens)(const SelectParams& p, void* workspace, void* stream);
  CudaAnswer (*invert_indices)(const InvertIndicesParams& p, void* stream);
  CudaAnswer (*blend)(const BlendParams& p, void* stream);
};

// Asked once in a process: the launches, or why there is no device for them.
struct Cuda {
  const CudaLaunches* launches;
  CudaAnswer answer;
};
const Cuda& find_cuda();

}  // namespace tokencache::c_api

// The one symbol of libtokencache_cuda.
extern "C" TOKENCACHE_API const tokencache::c_api::CudaLaunches tokencache_cuda_launches;
