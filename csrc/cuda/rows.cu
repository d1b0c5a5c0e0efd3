#include "cuda/launch.h"
#include "cuda/rows.h"

// A row is copied in pieces of up to 16 bytes; one thread moves one piece at a time.
namespace tokencache {
namespace {

constexpr int kThreads = 256;

// All sizes and strides of a copy in pieces.
struct CopyParams {
  int64_t num_pieces, S, N, pieces_per_row;
  int64_t stride_packed_b, stride_packed_s;  // of the packed rows
  int64_t stride_full_b, stride_full_n;      // of the full-length tensor
  const int32_t* indices;
  int64_t stride_indices_b;
};

// packed[b, s] = full[b, indices[b, s]], an empty slot: 0.
template <class Piece>
__global__ void __launch_bounds__(kThreads)
    gather_rows_kernel(CopyParams p, const Piece* __restrict__ full, Piece* __restrict__ packed) {
  const int64_t stride = int64_t{gridDim.x} * kThreads;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < p.num_pieces; i += stride) {
    const int64_t row = i / p.pieces_per_row, piece = i % p.pieces_per_row;
    const int64_t batch = row / p.S, slot = row % p.S;
    const int64_t token = p.indices[batch * p.stride_indices_b + slot];
    Piece value{};
    if (token >= 0 && token < p.N) {
      value = full[batch * p.stride_full_b + token * p.stride_full_n + piece];
    }
    packed[batch * p.stride_packed_b + slot * p.stride_packed_s + piece] = value;
  }
}

// full[b, indices[b, s]] = packed[b, s], an empty slot writes nothing.
template <class Piece>
__global__ void __launch_bounds__(kThreads)
    scatter_rows_kernel(CopyParams p, const Piece* __restrict__ packed, Piece* __restrict__ full) {
  const int64_t stride = int64_t{gridDim.x} * kThreads;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < p.num_pieces; i += stride) {
    const int64_t row = i / p.pieces_per_row, piece = i % p.pieces_per_row;
    const int64_t batch = row / p.S, slot = row % p.S;
    const int64_t token = p.indices[batch * p.stride_indices_b + slot];
    if (token < 0 || token >= p.N) continue;
    full[batch * p.stride_full_b + token * p.stride_full_n + piece] =
        packed[batch * p.stride_packed_b + slot * p.stride_packed_s + piece];
  }
}

// Calls f with the widest type of piece that fits, and how many elements count one piece.
template <class F>
cudaError_t with_piece(int64_t bytes, int64_t element_size, F f) {
  switch (bytes) {
    case 16:
      return f(uint4{}, 16 / element_size);
    case 8:
      return f(uint64_t{}, 8 / element_size);
    case 4:
      return f(uint32_t{}, 4 / element_size);
    case 2:
      return f(uint16_t{}, 2 / element_size);
    default:
      return f(uint8_t{}, 1);
  }
}

}  // namespace

cudaError_t gather_rows_cuda(const GatherRowsParams& p, cudaStream_t stream) {
  const int64_t size = p.element_size;
  const int64_t bytes = common_alignment(address(p.x), address(p.out), p.D * size,
                                         p.stride_x_b * size, p.stride_x_n * size);
  return with_piece(bytes, size, [&](auto piece, int64_t elements) {
    using Piece = decltype(piece);
    const int64_t width = p.D / elements;
    const CopyParams copy{
        .num_pieces = p.B * p.S * width,
        .S = p.S,
        .N = p.N,
        .pieces_per_row = width,
        .stride_packed_b = p.S * width,
        .stride_packed_s = width,
        .stride_full_b = p.stride_x_b / elements,
        .stride_full_n = p.stride_x_n / elements,
        .indices = p.indices,
        .stride_indices_b = p.stride_indices_b,
    };
    return launch(gather_rows_kernel<Piece>, grid_for(copy.num_pieces, kThreads), kThreads, 0,
                  stream, copy, static_cast<const Piece*>(p.x), static_cast<Piece*>(p.out));
  });
}

cudaError_t scatter_rows_cuda(const ScatterRowsParams& p, cudaStream_t stream) {
  const int64_t size = p.element_size;
  const int64_t bytes =
      common_alignment(address(p.rows), address(p.cache), p.D * size, p.stride_rows_b * size,
                       p.stride_rows_s * size, p.stride_cache_b * size, p.stride_cache_n * size);
  return with_piece(bytes, size, [&](auto piece, int64_t elements) {
    using Piece = decltype(piece);
    const int64_t width = p.D / elements;
    const CopyParams copy{
        .num_pieces = p.B * p.S * width,
        .S = p.S,
        .N = p.N,
        .pieces_per_row = width,
        .stride_packed_b = p.stride_rows_b / elements,
        .stride_packed_s = p.stride_rows_s / elements,
        .stride_full_b = p.stride_cache_b / elements,
        .stride_full_n = p.stride_cache_n / elements,
        .indices = p.indices,
        .stride_indices_b = p.stride_indices_b,
    };
    return launch(scatter_rows_kernel<Piece>, grid_for(copy.num_pieces, kThreads), kThreads, 0,
                  stream, copy, static_cast<const Piece*>(p.rows), static_cast<Piece*>(p.cache));
  });
}

}  // namespace tokencache
