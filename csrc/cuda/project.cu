#include "cuda/launch.h"
#include "cuda/number.cuh"
#include "cuda/project.h"
#include "cuda/warp.cuh"

// A warp has a head, and a lane every 32nd pair of its channels: it alone reads and writes them.
namespace tokencache {
namespace {

constexpr int kWarps = 4;

template <class T>
__device__ float element_at(const void* row, int64_t e) {
  return to_float(static_cast<const T*>(row)[e]);
}

// (x - mean) * rstd is the normalised x, before weight and bias.
struct Moments {
  float mean = 0, rstd = 1;
};

template <class T>
__device__ Moments moments_of(const FinishHeadsParams& p, const T* head) {
  const int lane = threadIdx.x % 32;
  float mean = 0;
  if (p.is_layer_norm) {
    for (int64_t e = lane; e < p.E; e += 32) mean += to_float(head[e]);
    mean = sum_of_warp(mean) / p.E;
  }
  float squares = 0;
  for (int64_t e = lane; e < p.E; e += 32) {
    const float centred = to_float(head[e]) - mean;
    squares += centred * centred;
  }
  const float rstd = 1.0f / sqrtf(sum_of_warp(squares) / p.E + static_cast<float>(p.eps));
  return {mean, rstd};
}

template <class T>
__global__ void __launch_bounds__(32 * kWarps) finish_heads_kernel(FinishHeadsParams p) {
  const int64_t index = int64_t{blockIdx.x} * kWarps + threadIdx.x / 32;
  if (index >= p.B * p.S * p.H) return;
  const int lane = threadIdx.x % 32;
  const int64_t row = index / p.H, b = row / p.S, slot = row % p.S;
  T* head = static_cast<T*>(p.rows) + index * p.E;
  const int64_t token = p.indices == nullptr ? slot : p.indices[b * p.stride_indices_b + slot];
  // an empty slot is turned like token 0
  const int64_t position = token >= 0 && token < p.N ? token : 0;
  const int64_t angles = b * p.stride_table_b + position * p.stride_table_t;

  Moments moments;
  if (p.weight != nullptr) moments = moments_of(p, head);
  for (int64_t first = 2 * lane; first < p.E; first += 64) {
    float pair[2] = {};
    const int count = first + 1 < p.E ? 2 : 1;
    for (int i = 0; i < count; ++i) {
      pair[i] = (to_float(head[first + i]) - moments.mean) * moments.rstd;
      if (p.weight != nullptr) pair[i] *= element_at<T>(p.weight, first + i);
      if (p.bias != nullptr) pair[i] += element_at<T>(p.bias, first + i);
    }
    if (p.cosine != nullptr) {
      const float cosine = element_at<float>(p.cosine, angles + first);
      const float sine = element_at<float>(p.sine, angles + first);
      const float even = pair[0], odd = pair[1];
      pair[0] = even * cosine - odd * sine;
      pair[1] = odd * cosine + even * sine;
    }
    for (int i = 0; i < count; ++i) head[first + i] = from_float<T>(pair[i]);
  }
}

}  // namespace

cudaError_t finish_heads_cuda(const FinishHeadsParams& p, cudaStream_t stream) {
  return with_type(p.type, [&](auto one) {
    const auto blocks = size_of_grid(ceil_div(p.B * p.S * p.H, kWarps));
    return launch(finish_heads_kernel<decltype(one)>, blocks, 32 * kWarps, 0, stream, p);
  });
}

}  // namespace tokencache
