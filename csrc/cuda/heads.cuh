#pragma once

#include <cstdint>

#include "cuda/launch.h"
#include "cuda/number.cuh"
#include "cuda/tensor_core.cuh"
#include "cuda/warp.cuh"

// Shared by attention and its statistics: products of the rows of one head with each other, 64 by
// 64 at a time. A block's four warps make 16 rows of them each.
namespace tokencache {

constexpr int kHeadRows = 64;
constexpr int kHeadThreads = 128;
// left alone, the assembler spills for more blocks on a multiprocessor
constexpr int kHeadBlocks = 2;

// Rows of one head in shared memory, each Width elements wide, behind the head's E: zeros.
template <class T, int Width>
struct HeadRows {
  // an odd number of pieces of 16 bytes: eight rows of one column are in different banks
  static constexpr int kPitch = Width + 8;
  static_assert(Width % 16 == 0);

  T values[kHeadRows * kPitch];

  // Starts to copy rows first to first + 63; those from end on are zeros.
  __device__ void copy(const T* rows, int64_t stride, int64_t first, int64_t end, int64_t E) {
    constexpr int kPieces = Width / 8;
    for (int i = threadIdx.x; i < kHeadRows * kPieces; i += kHeadThreads) {
      const int row = i / kPieces, column = i % kPieces * 8;
      const bool is_there = first + row < end && column < E;
      copy_async(values + row * kPitch + column,
                 is_there ? rows + (first + row) * stride + column : rows, is_there);
    }
  }

  // This warp's 16 rows, as the first factor of a product.
  __device__ void load(uint32_t (&factor)[Width / 16][4]) const {
    const int row = threadIdx.x / 32 * 16 + threadIdx.x % 16, piece = threadIdx.x % 32 / 16;
#pragma unroll
    for (int k = 0; k < Width / 16; ++k) {
      load_matrices(factor[k], values + row * kPitch + k * 16 + piece * 8);
    }
  }

  // products = factor @ values.T: of the 16 rows with each of the 64.
  __device__ void multiply(const uint32_t (&factor)[Width / 16][4],
                           float (&products)[kHeadRows / 8][4]) const {
    const int lane = threadIdx.x % 32;
    const int row = lane / 16 * 8 + lane % 8, piece = lane / 8 % 2;
#pragma unroll
    for (int j = 0; j < kHeadRows / 8; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) products[j][i] = 0;
    }
#pragma unroll
    for (int k = 0; k < Width / 16; ++k) {
#pragma unroll
      for (int j = 0; j < kHeadRows / 16; ++j) {
        uint32_t b[4];  // two times 8 of the 64 rows
        load_matrices(b, values + (j * 16 + row) * kPitch + k * 16 + piece * 8);
        multiply_add<T>(products[2 * j], factor[k], b[0], b[1]);
        multiply_add<T>(products[2 * j + 1], factor[k], b[2], b[3]);
      }
    }
  }

  // sums += weights @ values: the 64 rows mixed, for each of 16 rows of weights.
  __device__ void mix(const float (&weights)[kHeadRows / 8][4], float (&sums)[Width / 8][4]) const {
    const int row = threadIdx.x % 16, piece = threadIdx.x % 32 / 16;
#pragma unroll
    for (int k = 0; k < kHeadRows / 16; ++k) {
      const auto& left = weights[2 * k];
      const auto& right = weights[2 * k + 1];
      const uint32_t a[4] = {pack<T>(left[0], left[1]), pack<T>(left[2], left[3]),
                             pack<T>(right[0], right[1]), pack<T>(right[2], right[3])};
#pragma unroll
      for (int j = 0; j < Width / 16; ++j) {
        uint32_t b[4];  // two times 8 columns
        load_transposed(b, values + (k * 16 + row) * kPitch + j * 16 + piece * 8);
        multiply_add<T>(sums[2 * j], a, b[0], b[1]);
        multiply_add<T>(sums[2 * j + 1], a, b[2], b[3]);
      }
    }
  }
};

// Calls f with the width that heads of E elements are padded to.
template <class F>
cudaError_t with_head_width(int64_t E, F f) {
  if (E <= 64) return f(std::integral_constant<int, 64>{});
  if (E <= 80) return f(std::integral_constant<int, 80>{});
  return f(std::integral_constant<int, 128>{});
}

constexpr int64_t kMostHeadWidth = 128;

// Whether the tensor cores take these heads: all their pieces of 16 bytes begin at 16 bytes.
inline bool suits_tensor_cores(const AttentionMapParams& p) {
  const int64_t size = size_of(p.type);
  return size == 2 && p.E <= kMostHeadWidth &&
         common_alignment(address(p.query), address(p.key), p.E * size, p.stride_query_b * size,
                          p.stride_query_s * size, p.stride_query_h * size, p.stride_key_b * size,
                          p.stride_key_n * size, p.stride_key_h * size) == 16;
}

// A block for every so many rows of every head.
inline dim3 grid_of_heads(int64_t rows, int64_t rows_per_block, const AttentionMapParams& p) {
  return {size_of_grid(ceil_div(rows, rows_per_block)), size_of_grid(p.H), size_of_grid(p.B)};
}

// The first row of one sample's head.
template <class T>
__device__ const T* head_at(const void* base, int64_t b, int64_t h, int64_t stride_b,
                            int64_t stride_h) {
  return static_cast<const T*>(base) + b * stride_b + h * stride_h;
}

// How many of N keys a sample has; null: all.
__device__ inline int64_t num_keys_of(const int32_t* key_lengths, int64_t b, int64_t stride,
                                      int64_t N) {
  if (key_lengths == nullptr) return N;
  const int64_t length = key_lengths[b * stride];
  return length < 0 ? 0 : length > N ? N : length;
}

template <class T>
__device__ float dot(const T* a, const T* b, int64_t E) {
  float sums[4] = {};  // shorter sums round less
  for (int64_t first = 0; first < E; first += 4) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (first + i < E) sums[i] += to_float(a[first + i]) * to_float(b[first + i]);
    }
  }
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

}  // namespace tokencache
