#include <cuda_runtime_api.h>

#include "c_api/cuda.h"
#include "cuda/blend.h"
#include "cuda/modulate.h"
#include "cuda/rows.h"
#include "cuda/select.h"

// libtokencache_cuda: see c_api/cuda.h. The arguments were checked on the other side.
namespace tokencache::c_api {
namespace {

CudaAnswer answer(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return {TOKENCACHE_OK, nullptr};
    case cudaErrorInsufficientDriver:
    case cudaErrorStubLibrary:
      return {TOKENCACHE_UNSUPPORTED,
              "there is no driver, or only one older than " TOKENCACHE_CUDA_VERSION};
    case cudaErrorNoDevice:
      return {TOKENCACHE_UNSUPPORTED, "the driver shows no GPU to this process"};
    case cudaErrorNoKernelImageForDevice:
      return {TOKENCACHE_UNSUPPORTED,
              "its kernels were built for other GPUs, " TOKENCACHE_CUDA_ARCHITECTURES};
    case cudaErrorMemoryAllocation:
      return {TOKENCACHE_OUT_OF_MEMORY, cudaGetErrorString(error)};
    default:
      return {TOKENCACHE_CUDA_ERROR, cudaGetErrorString(error)};
  }
}

CudaAnswer find_device() {
  int count = 0;
  return answer(cudaGetDeviceCount(&count));
}

// One function that is given a stream, for each op.
template <auto launch, class... Params>
CudaAnswer run_on(Params... params, void* stream) {
  return answer(launch(params..., static_cast<cudaStream_t>(stream)));
}

}  // namespace
}  // namespace tokencache::c_api

using namespace tokencache;
using namespace tokencache::c_api;

extern const CudaLaunches tokencache_cuda_launches = {
    .find_device = find_device,
    .gather_rows = run_on<gather_rows_cuda, const GatherRowsParams&>,
    .scatter_rows = run_on<scatter_rows_cuda, const ScatterRowsParams&>,
    .add_branches = run_on<add_branches_cuda, const AddBranchesParams&>,
    .gather_modulate = run_on<gather_modulate_cuda, const ModulateParams&>,
    .row_pass =
        run_on<row_pass_cuda, const AddBranchesParams&, const ModulateParams&, const int32_t*>,
    .select_workspace_bytes = select_workspace_bytes,
    .select_tokens = run_on<select_tokens_cuda, const SelectParams&, void*>,
    .invert_indices = run_on<invert_indices_cuda, const InvertIndicesParams&>,
    .blend = run_on<blend_cuda, const BlendParams&>,
};
