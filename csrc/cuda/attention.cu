#include <cfloat>

#include "cuda/attention.h"
#include "cuda/heads.cuh"

// The map is made 64 queries by 64 keys at a time, and never whole: a query keeps the largest score
// so far, and its sums relative to that. The entropy of its row is one more of these sums.
namespace tokencache {
namespace {

constexpr int kPlainWarps = 4;

// The machine's exponential has base 2. Off by |x| roundings, which a mean of values does not feel.
__device__ float fast_exp(float x) { return exp2f(x * 1.44269504f); }

// The state of a query after the keys so far: maximum, sum, moment.
struct RunningSoftmax {
  float max = -INFINITY;
  float sum = 0;     // of the weights relative to max
  float moment = 0;  // of weight * (score - max), for the entropy

  // Takes a larger max; returns the factor of the sums before.
  __device__ float raise(float to) {
    const float before = max, origin_before = origin();
    max = fmaxf(max, to);
    const float factor = fast_exp(before - origin());
    moment = (moment + sum * (origin_before - origin())) * factor;
    sum *= factor;
    return factor;
  }

  // The term of a key in the moment; an absent key, with a score of -inf, adds 0.
  __device__ static float moment_of(float weight, float score) {
    return weight * fmaxf(score, -FLT_MAX);
  }

  // The origin of scores: if all of them are -inf, their weights must still be 0.
  __device__ float origin() const { return max == -INFINITY ? 0.0f : max; }

  __device__ float inverse() const { return sum == 0 ? 0.0f : 1.0f / sum; }

  __device__ float lse() const { return max + logf(sum); }

  // -sum p log p, no difference of large numbers. No key at all: 0.
  __device__ float entropy() const { return sum == 0 ? 0.0f : logf(sum) - moment / sum; }
};

// The log-sum-exp of a query's row and, WithEntropy, its entropy.
template <bool WithEntropy>
__device__ void store_sums(const AttentionParams& p, int64_t b, int64_t h, int64_t s,
                           const RunningSoftmax& softmax) {
  const int64_t row = (b * p.map.H + h) * p.map.S + s;
  static_cast<float*>(p.lse)[row] = softmax.lse();
  if constexpr (WithEntropy) static_cast<float*>(p.entropy)[row] = softmax.entropy();
}

template <class T, int Width, bool WithEntropy>
__global__ void __launch_bounds__(kHeadThreads, kHeadBlocks) attention_kernel(AttentionParams p) {
  using Rows = HeadRows<T, Width>;
  Rows& queries = *shared_memory<Rows>();
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
      float sum = 0, moment = 0;  // shorter sums round less
#pragma unroll
      for (int j = 0; j < kHeadRows / 8; ++j) {
#pragma unroll
        for (int i = 2 * half; i < 2 * half + 2; ++i) {
          const float score = weights[j][i] - origin;
          weights[j][i] = fast_exp(score);
          sum += weights[j][i];
          if constexpr (WithEntropy) moment += RunningSoftmax::moment_of(weights[j][i], score);
        }
      }
      softmax[half].sum += sum;  // this lane's; all four are added at the end
      softmax[half].moment += moment;
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
    softmax[half].moment = sum_of_row(softmax[half].moment);
    const int64_t s = first_query + threadIdx.x / 32 * 16 + lane / 4 + half * 8;
    if (s >= map.S) continue;
    if (lane % 4 == 0) store_sums<WithEntropy>(p, b, h, s, softmax[half]);
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
template <class T, bool WithEntropy>
__global__ void __launch_bounds__(32 * kPlainWarps) plain_attention_kernel(AttentionParams p) {
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
  float* sums = shared_memory<float>() + warp * map.E;
  for (int64_t e = lane; e < num_elements; e += 32) sums[e] = 0;

  RunningSoftmax softmax;
  for (int64_t first_key = 0; first_key < num_keys; first_key += 32) {
    const int64_t n = first_key + lane;
    const float score =
        n < num_keys ? dot(query, key + n * map.stride_key_n, map.E) * scale : -INFINITY;
    const float factor = softmax.raise(max_of_warp(score));
    const float relative = score - softmax.origin();
    const float weight = fast_exp(relative);
    softmax.sum += sum_of_warp(weight);
    if constexpr (WithEntropy) {
      softmax.moment += sum_of_warp(RunningSoftmax::moment_of(weight, relative));
    }
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
  if (lane == 0) store_sums<WithEntropy>(p, b, h, s, softmax);
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

template <bool WithEntropy>
cudaError_t launch_attention(const AttentionParams& p, cudaStream_t stream) {
  const AttentionMapParams& map = p.map;
  return with_type(map.type, [&](auto one) {
    using T = decltype(one);
    if constexpr (sizeof(T) == 2) {
      if (is_aligned(p)) {
        return with_head_width(map.E, [&](auto width) {
          constexpr int kBytes = 5 * sizeof(HeadRows<T, decltype(width)::value>);
          return launch(attention_kernel<T, decltype(width)::value, WithEntropy>,
                        grid_of_heads(map.S, kHeadRows, map), kHeadThreads, kBytes, stream, p);
        });
      }
    }
    const int64_t bytes = kPlainWarps * map.E * int64_t{sizeof(float)};
    return launch(plain_attention_kernel<T, WithEntropy>, grid_of_heads(map.S, kPlainWarps, map),
                  32 * kPlainWarps, bytes, stream, p);
  });
}

}  // namespace

cudaError_t attention_cuda(const AttentionParams& p, cudaStream_t stream) {
  return p.entropy == nullptr ? launch_attention<false>(p, stream)
                              : launch_attention<true>(p, stream);
}

}  // namespace tokencache
