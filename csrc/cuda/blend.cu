#include "cuda/blend.h"
#include "cuda/launch.h"
#include "cuda/number.cuh"
#include "cuda/warp.cuh"

// A warp owns a row: sums over it have one order, and no atomics.
namespace tokencache {
namespace {

constexpr int kWarps = 4;  // rows of a block
// left alone, the assembler spills for more blocks on a multiprocessor of sm_80
constexpr int kBackwardBlocks = 8;

template <class T>
__device__ const T* row_of(const void* base, int64_t b, int64_t n, int64_t stride_b,
                           int64_t stride_n) {
  return static_cast<const T*>(base) + b * stride_b + n * stride_n;
}

__device__ float weight_of(const BlendParams& p, int64_t b, int64_t n) {
  return *row_of<float>(p.weight, b, n, p.stride_weight_b, p.stride_weight_n);
}

template <class T, int Width>
__global__ void __launch_bounds__(32 * kWarps) blend_kernel(BlendParams p) {
  const int64_t row = int64_t{blockIdx.x} * kWarps + threadIdx.x / 32;
  if (row >= p.B * p.N) return;
  const int64_t b = row / p.N, n = row % p.N;
  const float w = weight_of(p, b, n);
  const T* cached = row_of<T>(p.cached, b, n, p.stride_cached_b, p.stride_cached_n);
  const T* fresh = row_of<T>(p.fresh, b, n, p.stride_fresh_b, p.stride_fresh_n);
  T* out = static_cast<T*>(p.out) + row * p.D;
  for (int64_t d = threadIdx.x % 32 * Width; d < p.D; d += 32 * Width) {
    const auto old = Piece<T, Width>::load(cached + d);
    const auto now = Piece<T, Width>::load(fresh + d);
    Piece<T, Width> mixed;
    for (int i = 0; i < Width; ++i) {
      const float kept = (1.0f - w) * to_float(old.values[i]);
      mixed.values[i] = from_float<T>(kept + w * to_float(now.values[i]));
    }
    mixed.store(out + d);
  }
}

template <class T, int Width>
__global__ void __launch_bounds__(32 * kWarps, kBackwardBlocks)
    blend_backward_kernel(BlendBackwardParams p) {
  const BlendParams& f = p.forward;
  const int64_t row = int64_t{blockIdx.x} * kWarps + threadIdx.x / 32;
  if (row >= f.B * f.N) return;
  const int64_t b = row / f.N, n = row % f.N;
  const float w = weight_of(f, b, n);
  const T* grad = row_of<T>(p.grad, b, n, p.stride_grad_b, p.stride_grad_n);
  const T* cached = row_of<T>(f.cached, b, n, f.stride_cached_b, f.stride_cached_n);
  const T* fresh = row_of<T>(f.fresh, b, n, f.stride_fresh_b, f.stride_fresh_n);
  float total = 0;
  for (int64_t d = threadIdx.x % 32 * Width; d < f.D; d += 32 * Width) {
    const auto g = Piece<T, Width>::load(grad + d);
    const auto old = Piece<T, Width>::load(cached + d);
    const auto now = Piece<T, Width>::load(fresh + d);
    Piece<T, Width> of_fresh, of_cached;
    for (int i = 0; i < Width; ++i) {
      const float value = to_float(g.values[i]);
      total += (to_float(now.values[i]) - to_float(old.values[i])) * value;
      of_fresh.values[i] = from_float<T>(w * value);
      of_cached.values[i] = from_float<T>((1.0f - w) * value);
    }
    of_fresh.store(static_cast<T*>(p.grad_fresh) + row * f.D + d);
    if (p.grad_cached != nullptr) {
      of_cached.store(static_cast<T*>(p.grad_cached) + row * f.D + d);
    }
  }
  total = sum_of_warp(total);
  if (threadIdx.x % 32 == 0) static_cast<float*>(p.grad_weight)[row] = total;
}

int64_t alignment_of(const BlendParams& p) {
  const int64_t size = size_of(p.type);
  return common_alignment(address(p.cached), address(p.fresh), address(p.out), p.D * size,
                          p.stride_cached_b * size, p.stride_cached_n * size,
                          p.stride_fresh_b * size, p.stride_fresh_n * size);
}

int64_t alignment_of(const BlendBackwardParams& p) {
  const int64_t size = size_of(p.forward.type);
  return common_alignment(alignment_of(p.forward), address(p.grad), address(p.grad_cached),
                          address(p.grad_fresh), p.stride_grad_b * size, p.stride_grad_n * size);
}

unsigned int grid_of(const BlendParams& p) { return size_of_grid(ceil_div(p.B * p.N, kWarps)); }

}  // namespace

cudaError_t blend_cuda(const BlendParams& p, cudaStream_t stream) {
  return with_pieces(p.type, alignment_of(p) == 16, [&](auto one, auto width) {
    return launch(blend_kernel<decltype(one), decltype(width)::value>, grid_of(p), 32 * kWarps, 0,
                  stream, p);
  });
}

cudaError_t blend_backward_cuda(const BlendBackwardParams& p, cudaStream_t stream) {
  return with_pieces(p.forward.type, alignment_of(p) == 16, [&](auto one, auto width) {
    return launch(blend_backward_kernel<decltype(one), decltype(width)::value>, grid_of(p.forward),
                  32 * kWarps, 0, stream, p);
  });
}

}  // namespace tokencache
