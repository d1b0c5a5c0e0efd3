#include "cuda/attention.h"
#include "cuda/heads.cuh"

// The map is made 64 queries by 64 keys at a time, and never whole: a query keeps the largest score
// so far, and its sums relative to that.
namespace tokencache {
namespace {

constexpr int kPlainWarps = 4;

// The machine's exponential has base 2. Off by |x| roundings, which a mean of values does not feel.
__device__ float fast_exp(float x) { return exp2f(x * 1.44269504f); }

// What a query has seen so far of its row of the map.
struct RunningSoftmax {
  float max = -INFINITY;
  float sum = 0;  // of the weights relative to max

  // Takes a larger max; returns what was summed before is to be multiplied by.
  __device__ float raise(float to) {
    const float before = max;
    max = fmaxf(max, to);
    const float factor = fast_exp(before - origin());
    sum *= factor;
    return factor;
  }

  // What scores are relative to: also where all of them are -inf, their weights are to be 0.
  __device__ float origin() const { return max == -INFINITY ? 0.0f : max; }

  __device__ float inverse() const { return sum == 0 ? 0.0f : 1.0f / sum; }

  __device__ float lse() const { return max + logf(sum); }
};

template <class T, int Width>
__global__ void __launch_bounds__(kHeadThreads, kHeadBlocks) attention_kernel(AttentionParams p) {
  extern __shared__ uint4 shared[];
  using Rows = HeadRows<T, Width>;
  Rows& queries = *reinterpret_cast<Rows*>(shared);
  Rows* stages = &queries + 1;  // twice keys and values
  const AttentionMapParams& map = p.map;
  const int64_t first_query = int64_t{blockIdx.x} * kHeadRows, h = blockIdx.y, b = blockIdx.z;
  const int64_t num_keys = num_keys_of(p.key_lengths, b, p.stride_key_lengths_b, map.N);
  const T* query = head_at<T>(map.query, b, h, map.stride_query_b, map.stride_query_h);
  const T* key = head_at<T>(map.key, b, h, map.stride_key_b, map.stride_key_h);
  const T* value = head_at<T>(p.value, b, h, p.stride_value_b, p.stride_value_h);
  const auto copy_stage = [&](int64_t first_key) {
    Rows* stage = stages + first_key / kHeadRows % 2 * 2;
    stage[0].copy(key, map.stride_key_n, first_key, num_keys, map.E);
    if (p.out != nullptr) stage[1].copy(value, p.stride_value_n, first_key, num_keys, map.E);
  };

  queries.copy(query, map.stride_query_s, first_query, map.S, map.E);
  commit_copies();
  if (num_keys > 0) copy_stage(0);
  commit_copies();
  wait_copies<1>();
  __syncthreads();
  uint32_t factor[Width / 16][4];
  queries.load(factor);

  const int lane = threadIdx.x % 32;
  const float scale = static_cast<float>(map.softmax_scale);
  RunningSoftmax softmax[2];      // of rows lane / 4 and lane / 4 + 8 of the warp's 16
  float sums[Width / 8][4] = {};  // of weighted values
  for (int64_t first_key = 0; first_key < num_keys; first_key += kHeadRows) {
    if (first_key + kHeadRows < num_keys) copy_stage(first_key + kHeadRows);
    commit_copies();
    wait_copies<1>();
    __syncthreads();
    const Rows* stage = stages + first_key / kHeadRows % 2 * 2;
    float weights[kHeadRows / 8][4];
    stage[0].multiply(factor, weights);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float max = -INFINITY;
#pragma unroll
      for (int j = 0; j < kHeadRows / 8; ++j) {
#pragma unroll
        for (int i = 2 * half; i < 2 * half + 2; ++i) {
          const bool is_there = first_key + j * 8 + lane % 4 * 2 + i % 2 < num_keys;
          weights[j][i] = is_there ? weights[j][i] * scale : -INFINITY;
          max = fmaxf(max, weights[j][i]);
        }
      }
      const float factor_before = softmax[half].raise(max_of_row(max));
      const float origin = softmax[half].origin();
      float sum = 0;  // shorter sums round less
#pragma unroll
      for (int j = 0; j < kHeadRows / 8; ++j) {
#pragma unroll
        for (int i = 2 * half; i < 2 * half + 2; ++i) {
          weights[j][i] = fast_exp(weights[j][i] - origin);
          sum += weights[j][i];
        }
      }
      softmax[half].sum += sum;  // this lane's; all four are added at the end
#pragma unroll
      for (int j = 0; j < Width / 8; ++j) {
        sums[j][2 * half] *= factor_before;
        sums[j][2 * half + 1] *= factor_before;
      }
    }
    if (p.out != nullptr) stage[1].mix(weights, sums);
    __syncthreads();  // the next round's copies take this stage
  }
  wait_copies<0>();

#pragma unroll
  for (int half = 0; half < 2; ++half) {
    softmax[half].sum = sum_of_row(softmax[half].sum);
    const int64_t s = first_query + threadIdx.x / 32 * 16 + lane / 4 + half * 8;
    if (s >= map.S) continue;
    if (lane % 4 == 0) p.lse[(b * map.H + h) * map.S + s] = softmax[half].lse();
    if (p.out == nullptr) continue;
    T* out = static_cast<T*>(p.out) + ((b * map.S + s) * map.H + h) * map.E;
    const float inverse = softmax[half].inverse();
#pragma unroll
    for (int j = 0; j < Width / 8; ++j) {
      const int column = j * 8 + lane % 4 * 2;
      if (column >= map.E) continue;
      Piece<T, 2>{from_float<T>(sums[j][2 * half] * inverse),
                  from_float<T>(sums[j][2 * half + 1] * inverse)}
          .store(out + column);
    }
  }
}

// For float32, wide heads and rows that begin anywhere. A warp has a query: a lane weighs every
// 32nd key, and sums every 32nd element of the values.
template <class T>
__global__ void __launch_bounds__(32 * kPlainWarps) plain_attention_kernel(AttentionParams p) {
  extern __shared__ uint4 shared[];
  const AttentionMapParams& map = p.map;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t s = int64_t{blockIdx.x} * kPlainWarps + warp, h = blockIdx.y, b = blockIdx.z;
  if (s >= map.S) return;
  const int64_t num_keys = num_keys_of(p.key_lengths, b, p.stride_key_lengths_b, map.N);
  const T* query =
      head_at<T>(map.query, b, h, map.stride_query_b, map.stride_query_h) + s * map.stride_query_s;
  const T* key = head_at<T>(map.key, b, h, map.stride_key_b, map.stride_key_h);
  const T* value = head_at<T>(p.value, b, h, p.stride_value_b, p.stride_value_h);
  const float scale = static_cast<float>(map.softmax_scale);
  const int64_t num_elements = p.out == nullptr ? 0 : map.E;
  float* sums = reinterpret_cast<float*>(shared) + warp * map.E;
  for (int64_t e = lane; e < num_elements; e += 32) sums[e] = 0;

  RunningSoftmax softmax;
  for (int64_t first_key = 0; first_key < num_keys; first_key += 32) {
    const int64_t n = first_key + lane;
    const float score =
        n < num_keys ? dot(query, key + n * map.stride_key_n, map.E) * scale : -INFINITY;
    const float factor = softmax.raise(max_of_warp(score));
    const float weight = fast_exp(score - softmax.origin());
    softmax.sum += sum_of_warp(weight);
    const int count = static_cast<int>(num_keys - first_key < 32 ? num_keys - first_key : 32);
    for (int64_t first_e = 0; first_e < num_elements; first_e += 32) {
      const int64_t e = first_e + lane;
      const bool is_there = e < num_elements;
      float sum = is_there ? sums[e] * factor : 0.0f;
      for (int k = 0; k < count; ++k) {
        const float weight_of_k = __shfl_sync(0xFFFFFFFF, weight, k);
        if (is_there) sum += weight_of_k * to_float(value[(first_key + k) * p.stride_value_n + e]);
      }
      if (is_there) sums[e] = sum;
    }
  }
  if (lane == 0) p.lse[(b * map.H + h) * map.S + s] = softmax.lse();
  T* out = static_cast<T*>(p.out) + ((b * map.S + s) * map.H + h) * map.E;
  for (int64_t e = lane; e < num_elements; e += 32) {
    out[e] = from_float<T>(sums[e] * softmax.inverse());
  }
}

bool is_aligned(const AttentionParams& p) {
  const int64_t size = size_of(p.map.type);
  return suits_tensor_cores(p.map) &&
         common_alignment(address(p.value), address(p.out), p.stride_value_b * size,
                          p.stride_value_n * size, p.stride_value_h * size) == 16;
}

}  // namespace

cudaError_t attention_cuda(const AttentionParams& p, cudaStream_t stream) {
  const AttentionMapParams& map = p.map;
  return with_type(map.type, [&](auto one) {
    using T = decltype(one);
    if constexpr (sizeof(T) == 2) {
      if (is_aligned(p)) {
        return with_head_width(map.E, [&](auto width) {
          constexpr int kBytes = 5 * sizeof(HeadRows<T, decltype(width)::value>);
          auto* kernel = attention_kernel<T, decltype(width)::value>;
          const cudaError_t error = allow_shared(kernel, kBytes);
          if (error != cudaSuccess) return error;
          const dim3 grid = grid_of_heads(map.S, kHeadRows, map);
          kernel<<<grid, kHeadThreads, kBytes, stream>>>(p);
          return cudaGetLastError();
        });
      }
    }
    auto* kernel = plain_attention_kernel<T>;
    const int64_t bytes = kPlainWarps * map.E * int64_t{sizeof(float)};
    if (const cudaError_t error = allow_shared(kernel, bytes); error != cudaSuccess) return error;
    const dim3 grid = grid_of_heads(map.S, kPlainWarps, map);
    kernel<<<grid, 32 * kPlainWarps, bytes, stream>>>(p);
    return cudaGetLastError();
  });
}

}  // namespace tokencache
