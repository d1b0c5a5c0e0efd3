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
constexpr int kMostBranches = 32;  // a launch takes its branches by value

struct Branches {
  int64_t count;
  bool has_norms;
  BranchParams of[kMostBranches];
};
// older drivers take no more, and every launch copies it
static_assert(sizeof(AddBranchesParams) + sizeof(Branches) + sizeof(ModulateParams) <= 4080);

template <class T>
__device__ const T* row_of(const void* base, int64_t offset) {
  return static_cast<const T*>(base) + offset;
}

// The row of a token, or null where there is none.
template <class T>
__device__ const T* vector_at(const VectorParams& p, int64_t b, int64_t n) {
  return p.data == nullptr ? nullptr : row_of<T>(p.data, p.offset(b, n));
}

// values[i] = values[i] * (offset + of[i]), or as it is where that is null.
template <class T, int Width>
__device__ void multiply(float (&values)[Width], const T* of, float offset) {
  if (of == nullptr) return;
  const auto factors = Piece<T, Width>::load(of);
  for (int i = 0; i < Width; ++i) values[i] *= offset + to_float(factors.values[i]);
}

template <class T, int Width>
__device__ void add(float (&values)[Width], const T* of) {
  if (of == nullptr) return;
  const auto terms = Piece<T, Width>::load(of);
  for (int i = 0; i < Width; ++i) values[i] += to_float(terms.values[i]);
}

template <class T>
__device__ const T* at(const T* row, int64_t d) {
  return row == nullptr ? nullptr : row + d;
}

// Normalises the row in shared memory and writes it, modulated, to the packed rows.
template <class T, int Width>
__device__ void modulate_row(const ModulateParams& p, const float* row, int64_t batch, int64_t n,
                             int64_t packed_row) {
  float mean = 0, rstd = 1;
  if (p.norm.kind == NormKind::kLayer) {
    float total = 0;
    for (int64_t d = threadIdx.x; d < p.D; d += kThreads) total += row[d];
    mean = sum_of_block<kThreads>(total) / p.D;
  }
  if (p.norm.kind != NormKind::kNone) {
    float squares = 0;
    for (int64_t d = threadIdx.x; d < p.D; d += kThreads) {
      squares += (row[d] - mean) * (row[d] - mean);
    }
    rstd = rsqrtf(sum_of_block<kThreads>(squares) / p.D + static_cast<float>(p.norm.eps));
  }
  const T* weight = static_cast<const T*>(p.norm.weight);
  const T* bias = static_cast<const T*>(p.norm.bias);
  const T* shift = vector_at<T>(p.shift, batch, n);
  const T* scale = vector_at<T>(p.scale, batch, n);
  T* packed = static_cast<T*>(p.packed) + packed_row * p.D;
  for (int64_t d = int64_t{threadIdx.x} * Width; d < p.D; d += kThreads * Width) {
    float y[Width];
    for (int i = 0; i < Width; ++i) y[i] = (row[d + i] - mean) * rstd;
    multiply<T, Width>(y, at(weight, d), static_cast<float>(p.norm.weight_offset));
    add<T, Width>(y, at(bias, d));
    multiply<T, Width>(y, at(scale, d), 1.0f);
    add<T, Width>(y, at(shift, d));
    Piece<T, Width> out;
    for (int i = 0; i < Width; ++i) out.values[i] = from_float<T>(y[i]);
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
  __shared__ float rstd_of[kMostBranches];  // of a branch's row, where it is normalised
  for (int64_t j = 0; branches.has_norms && j < branches.count; ++j) {
    const BranchParams& one = branches.of[j];
    if (one.norm.kind == NormKind::kNone) continue;
    const T* branch = row_of<T>(one.branch, batch * one.stride_branch_b + n * one.stride_branch_n);
    float squares = 0;
    for (int64_t d = threadIdx.x; d < p.D; d += kThreads) {
      squares += to_float(branch[d]) * to_float(branch[d]);
    }
    squares = sum_of_block<kThreads>(squares);
    if (threadIdx.x == 0) rstd_of[j] = rsqrtf(squares / p.D + static_cast<float>(one.norm.eps));
  }
  if (branches.has_norms) __syncthreads();
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
      const auto loaded = Piece<T, Width>::load(branch + d);
      float term[Width];
      for (int i = 0; i < Width; ++i) term[i] = to_float(loaded.values[i]);
      if (one.norm.kind != NormKind::kNone) {
        for (int i = 0; i < Width; ++i) term[i] *= rstd_of[j];
        multiply<T, Width>(term, at(static_cast<const T*>(one.norm.weight), d),
                           static_cast<float>(one.norm.weight_offset));
      }
      multiply<T, Width>(term, at(vector_at<T>(one.gate, batch, n), d), 0.0f);
      for (int i = 0; i < Width; ++i) sum[i] += term[i];
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
  modulate_row<T, Width>(modulate, row, batch, n, batch * modulate.S + position);
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
  modulate_row<T, Width>(p, row, batch, token, batch * p.S + slot);
}

int64_t alignment_of(const VectorParams& p, int64_t size) {
  return common_alignment(address(p.data), p.stride_b * size, p.stride_n * size);
}

bool is_aligned(const AddBranchesParams& p) {
  const int64_t size = size_of(p.type);
  int64_t alignment =
      common_alignment(address(p.x), address(p.out), p.D * size, p.stride_x_b * size,
                       p.stride_x_n * size, p.stride_out_b * size, p.stride_out_n * size);
  for (int64_t j = 0; j < p.num_branches; ++j) {
    const BranchParams& one = p.branches[j];
    alignment = common_alignment(alignment, address(one.branch), one.stride_branch_b * size,
                                 one.stride_branch_n * size, alignment_of(one.gate, size),
                                 address(one.norm.weight));
  }
  return alignment == 16;
}

bool is_aligned(const ModulateParams& p) {
  const int64_t size = size_of(p.type);
  return common_alignment(address(p.x), alignment_of(p.shift, size), alignment_of(p.scale, size),
                          address(p.norm.weight), address(p.norm.bias), address(p.packed),
                          p.D * size, p.stride_x_b * size, p.stride_x_n * size) == 16;
}

cudaError_t launch_row_pass(const AddBranchesParams& p, const ModulateParams& modulate,
                            const int32_t* positions, bool is_aligned, cudaStream_t stream) {
  Branches branches{.count = p.num_branches, .has_norms = false, .of = {}};
  std::copy_n(p.branches, p.num_branches, branches.of);
  for (int64_t j = 0; j < p.num_branches; ++j) {
    branches.has_norms |= branches.of[j].norm.kind != NormKind::kNone;
  }
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
