#include "cuda/launch.h"
#include "cuda/modulate.h"
#include "cuda/number.cuh"
#include "cuda/warp.cuh"

// A block holds one row in shared memory, as float32: it is read and written once.
namespace tokencache {
namespace {

constexpr int kThreads = 128;
// left alone, the assembler spills for more blocks on a multiprocessor than memory can feed
constexpr int kBlocks = 8;
constexpr int kMostBranches = 64;  // a launch takes its branches by value

struct Branches {
  int64_t count;
  BranchParams of[kMostBranches];
};

template <class T>
__device__ const T* row_of(const void* base, int64_t offset) {
  return static_cast<const T*>(base) + offset;
}

// Normalises the row in shared memory and writes it, modulated, to the packed rows.
template <class T, int Width>
__device__ void modulate_row(const ModulateParams& p, const float* row, int64_t batch,
                             int64_t packed_row) {
  float total = 0;
  for (int64_t d = threadIdx.x; d < p.D; d += kThreads) total += row[d];
  const float mean = sum_of_block<kThreads>(total) / p.D;
  float squares = 0;
  for (int64_t d = threadIdx.x; d < p.D; d += kThreads) {
    squares += (row[d] - mean) * (row[d] - mean);
  }
  const float rstd = rsqrtf(sum_of_block<kThreads>(squares) / p.D + static_cast<float>(p.eps));

  const T* shift = row_of<T>(p.shift, batch * p.stride_shift_b);
  const T* scale = row_of<T>(p.scale, batch * p.stride_scale_b);
  T* packed = static_cast<T*>(p.packed) + packed_row * p.D;
  for (int64_t d = int64_t{threadIdx.x} * Width; d < p.D; d += kThreads * Width) {
    const auto shifts = Piece<T, Width>::load(shift + d);
    const auto scales = Piece<T, Width>::load(scale + d);
    Piece<T, Width> out;
    for (int i = 0; i < Width; ++i) {
      const float y = (row[d + i] - mean) * rstd;
      out.values[i] =
          from_float<T>(y * (1.0f + to_float(scales.values[i])) + to_float(shifts.values[i]));
    }
    out.store(packed + d);
  }
}

template <class T, int Width>
__device__ void clear_row(T* out, int64_t D) {
  Piece<T, Width> zero;
  for (int i = 0; i < Width; ++i) zero.values[i] = from_float<T>(0.0f);
  for (int64_t d = int64_t{threadIdx.x} * Width; d < D; d += kThreads * Width) zero.store(out + d);
}

// Of each sample the first N blocks sum a row each, and modulate it if it is selected; S more,
// where rows are packed, clear the empty slots.
template <class T, int Width>
__global__ void __launch_bounds__(kThreads, kBlocks)
    row_pass_kernel(AddBranchesParams p, Branches branches, ModulateParams modulate,
                    const int32_t* __restrict__ positions) {
  float* row = shared_memory<float>();
  const int64_t blocks_of_sample = gridDim.x / p.B;
  const int64_t batch = blockIdx.x / blocks_of_sample, n = blockIdx.x % blocks_of_sample;
  if (n >= p.N) {
    const int64_t slot = n - p.N;
    const int64_t token = modulate.indices[batch * modulate.stride_indices_b + slot];
    if (token < 0 || token >= p.N) {
      T* packed = static_cast<T*>(modulate.packed) + (batch * modulate.S + slot) * p.D;
      clear_row<T, Width>(packed, p.D);
    }
    return;
  }
  const T* x = row_of<T>(p.x, batch * p.stride_x_b + n * p.stride_x_n);
  T* out = static_cast<T*>(p.out) + batch * p.stride_out_b + n * p.stride_out_n;
  const int64_t position = positions == nullptr ? -1 : positions[batch * p.N + n];
  const bool is_selected = position >= 0 && position < modulate.S;
  for (int64_t d = int64_t{threadIdx.x} * Width; d < p.D; d += kThreads * Width) {
    const auto piece = Piece<T, Width>::load(x + d);
    float sum[Width];
    for (int i = 0; i < Width; ++i) sum[i] = to_float(piece.values[i]);
    for (int64_t j = 0; j < branches.count; ++j) {
      const BranchParams& one = branches.of[j];
      const T* branch =
          row_of<T>(one.branch, batch * one.stride_branch_b + n * one.stride_branch_n);
      const auto term = Piece<T, Width>::load(branch + d);
      if (one.gate == nullptr) {
        for (int i = 0; i < Width; ++i) sum[i] += to_float(term.values[i]);
      } else {
        const auto gate = Piece<T, Width>::load(row_of<T>(one.gate, batch * one.stride_gate_b) + d);
        for (int i = 0; i < Width; ++i)
          sum[i] += to_float(gate.values[i]) * to_float(term.values[i]);
      }
    }
    Piece<T, Width> rounded;
    for (int i = 0; i < Width; ++i) rounded.values[i] = from_float<T>(sum[i]);
    rounded.store(out + d);
    if (is_selected) {
      for (int i = 0; i < Width; ++i) row[d + i] = to_float(rounded.values[i]);
    }
  }
  if (!is_selected) return;
  __syncthreads();
  modulate_row<T, Width>(modulate, row, batch, batch * modulate.S + position);
}

template <class T, int Width>
__global__ void __launch_bounds__(kThreads, kBlocks) gather_modulate_kernel(ModulateParams p) {
  float* row = shared_memory<float>();
  const int64_t batch = blockIdx.x / p.S, slot = blockIdx.x % p.S;
  const int64_t token = p.indices[batch * p.stride_indices_b + slot];
  if (token < 0 || token >= p.N) {
    clear_row<T, Width>(static_cast<T*>(p.packed) + (batch * p.S + slot) * p.D, p.D);
    return;
  }
  const T* x = row_of<T>(p.x, batch * p.stride_x_b + token * p.stride_x_n);
  for (int64_t d = int64_t{threadIdx.x} * Width; d < p.D; d += kThreads * Width) {
    const auto piece = Piece<T, Width>::load(x + d);
    for (int i = 0; i < Width; ++i) row[d + i] = to_float(piece.values[i]);
  }
  __syncthreads();
  modulate_row<T, Width>(p, row, batch, batch * p.S + slot);
}

bool is_aligned(const AddBranchesParams& p) {
  const int64_t size = size_of(p.type);
  int64_t alignment =
      common_alignment(address(p.x), address(p.out), p.D * size, p.stride_x_b * size,
                       p.stride_x_n * size, p.stride_out_b * size, p.stride_out_n * size);
  for (int64_t j = 0; j < p.num_branches; ++j) {
    const BranchParams& one = p.branches[j];
    alignment = common_alignment(alignment, address(one.branch), address(one.gate),
                                 one.stride_branch_b * size, one.stride_branch_n * size,
                                 one.stride_gate_b * size);
  }
  return alignment == 16;
}

bool is_aligned(const ModulateParams& p) {
  const int64_t size = size_of(p.type);
  return common_alignment(address(p.x), address(p.shift), address(p.scale), address(p.packed),
                          p.D * size, p.stride_x_b * size, p.stride_x_n * size,
                          p.stride_shift_b * size, p.stride_scale_b * size) == 16;
}

cudaError_t launch_row_pass(const AddBranchesParams& p, const ModulateParams& modulate,
                            const int32_t* positions, bool is_aligned, cudaStream_t stream) {
  Branches branches{.count = p.num_branches, .of = {}};
  std::copy_n(p.branches, p.num_branches, branches.of);
  const int64_t bytes = positions == nullptr ? 0 : p.D * int64_t{sizeof(float)};
  const int64_t num_slots = positions == nullptr ? 0 : modulate.S;
  const auto blocks = size_of_grid(p.B * (p.N + num_slots));
  return with_pieces(p.type, is_aligned, [&](auto one, auto width) {
    return launch(row_pass_kernel<decltype(one), decltype(width)::value>, blocks, kThreads, bytes,
                  stream, p, branches, modulate, positions);
  });
}

}  // namespace

cudaError_t row_pass_cuda(const AddBranchesParams& sum, const ModulateParams& modulate,
                          const int32_t* positions, cudaStream_t stream) {
  AddBranchesParams part = sum;
  // more branches than a launch takes: the first ones go before, and the rest is added to them
  for (; part.num_branches > kMostBranches; part.num_branches -= kMostBranches) {
    AddBranchesParams first = part;
    first.num_branches = kMostBranches;
    const cudaError_t error = launch_row_pass(first, {}, nullptr, is_aligned(first), stream);
    if (error != cudaSuccess) return error;
    part.branches += kMostBranches;
    part.x = part.out;
    part.stride_x_b = part.stride_out_b;
    part.stride_x_n = part.stride_out_n;
  }
  const bool can_vectorise = is_aligned(part) && (positions == nullptr || is_aligned(modulate));
  return launch_row_pass(part, modulate, positions, can_vectorise, stream);
}

cudaError_t add_branches_cuda(const AddBranchesParams& p, cudaStream_t stream) {
  return row_pass_cuda(p, {}, nullptr, stream);
}

cudaError_t gather_modulate_cuda(const ModulateParams& p, cudaStream_t stream) {
  const int64_t bytes = p.D * int64_t{sizeof(float)};
  return with_pieces(p.type, is_aligned(p), [&](auto one, auto width) {
    return launch(gather_modulate_kernel<decltype(one), decltype(width)::value>,
                  size_of_grid(p.B * p.S), kThreads, bytes, stream, p);
  });
}

}  // namespace tokencache
