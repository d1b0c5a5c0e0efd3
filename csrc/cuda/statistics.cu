#include "cuda/heads.cuh"
#include "cuda/statistics.h"

// A map is made 64 by 64 at a time, and never in memory. One warp makes each sum, in one order, so
// that the result is always the same.
namespace tokencache {
namespace {

constexpr int kPlainWarps = 4;

// The log-sum-exps of one sample's head.
__device__ const float* lse_of(const AttentionReceivedParams& p, int64_t b, int64_t h) {
  return static_cast<const float*>(p.lse) + b * p.stride_lse_b + h * p.stride_lse_h;
}

__device__ void store_mean(const AttentionReceivedParams& p, int64_t b, int64_t h, int64_t n,
                           float sum) {
  const int64_t num_queries = p.map.S > 0 ? p.map.S : 1;
  static_cast<float*>(p.out)[(b * p.map.H + h) * p.map.N + n] = sum / num_queries;
}

template <class T, int Width>
__global__ void __launch_bounds__(kHeadThreads, kHeadBlocks)
    attention_received_kernel(AttentionReceivedParams p) {
  __shared__ float lse_of_stage[kHeadRows];
  using Rows = HeadRows<T, Width>;
  Rows& keys = *shared_memory<Rows>();
  Rows* stages = &keys + 1;  // twice queries
  const AttentionMapParams& map = p.map;
  const int64_t first_key = int64_t{blockIdx.x} * kHeadRows, h = blockIdx.y, b = blockIdx.z;
  const T* query = head_at<T>(map.query, b, h, map.stride_query_b, map.stride_query_h);
  const T* key = head_at<T>(map.key, b, h, map.stride_key_b, map.stride_key_h);
  const float* lse = lse_of(p, b, h);
  const auto copy_stage = [&](int64_t first_query) {
    stages[first_query / kHeadRows % 2].copy(query, map.stride_query_s, first_query, map.S, map.E);
  };

  keys.copy(key, map.stride_key_n, first_key, map.N, map.E);
  commit_copies();
  if (map.S > 0) copy_stage(0);
  commit_copies();
  wait_copies<1>();
  __syncthreads();
  uint32_t factor[Width / 16][4];
  keys.load(factor);

  const int lane = threadIdx.x % 32;
  const float scale = static_cast<float>(map.softmax_scale);
  float received[2] = {};  // by keys lane / 4 and lane / 4 + 8 of the warp's 16
  for (int64_t first_query = 0; first_query < map.S; first_query += kHeadRows) {
    if (first_query + kHeadRows < map.S) copy_stage(first_query + kHeadRows);
    commit_copies();
    if (threadIdx.x < kHeadRows) {
      const int64_t s = first_query + threadIdx.x;
      // the weights of a query that is not there are 0
      lse_of_stage[threadIdx.x] = s < map.S ? lse[s * p.stride_lse_s] : INFINITY;
    }
    wait_copies<1>();
    __syncthreads();
    float weights[kHeadRows / 8][4];
    stages[first_query / kHeadRows % 2].multiply(factor, weights);
    float of_stage[2] = {};  // shorter sums round less
#pragma unroll
    for (int j = 0; j < kHeadRows / 8; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float origin = lse_of_stage[j * 8 + lane % 4 * 2 + i % 2];
        of_stage[i / 2] += expf(weights[j][i] * scale - origin);
      }
    }
    received[0] += of_stage[0];
    received[1] += of_stage[1];
    __syncthreads();  // the next round's copies take this stage
  }
  wait_copies<0>();

#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float sum = sum_of_row(received[half]);
    const int64_t n = first_key + threadIdx.x / 32 * 16 + lane / 4 + half * 8;
    if (lane % 4 == 0 && n < map.N) store_mean(p, b, h, n, sum);
  }
}

// For float32, wide heads and rows that begin anywhere. A warp has a key, and a lane every 32nd
// query.
template <class T>
__global__ void __launch_bounds__(32 * kPlainWarps)
    plain_attention_received_kernel(AttentionReceivedParams p) {
  const AttentionMapParams& map = p.map;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t n = int64_t{blockIdx.x} * kPlainWarps + warp, h = blockIdx.y, b = blockIdx.z;
  if (n >= map.N) return;
  const T* query = head_at<T>(map.query, b, h, map.stride_query_b, map.stride_query_h);
  const T* key =
      head_at<T>(map.key, b, h, map.stride_key_b, map.stride_key_h) + n * map.stride_key_n;
  const float* lse = lse_of(p, b, h);
  const float scale = static_cast<float>(map.softmax_scale);
  float sum = 0;
  for (int64_t s = lane; s < map.S; s += 32) {
    const float score = dot(query + s * map.stride_query_s, key, map.E) * scale;
    sum += expf(score - lse[s * p.stride_lse_s]);
  }
  sum = sum_of_warp(sum);
  if (lane == 0) store_mean(p, b, h, n, sum);
}

// Of one row of the map, as far as it was seen.
struct RunningEntropy {
  float sum = 0;   // of -weight * log(weight)
  float mass = 0;  // of the weights: 1, but for the rounding of the log-sum-exps

  __device__ void add(float weight) {
    if (weight != 0) sum -= weight * logf(weight);
    mass += weight;
  }

  __device__ void add(const RunningEntropy& other) {
    sum += other.sum;
    mass += other.mass;
  }

  // That of the weights over their mass. Nothing was seen: 0.
  __device__ float value() const {
    const float entropy = mass == 0 ? 0.0f : sum / mass + logf(mass);
    return entropy < 0 ? 0.0f : entropy;  // a single weight, rounded
  }
};

// The map of all heads is averaged before its logarithm is taken: for each 64 keys, one head after
// another adds its weights.
template <class T, int Width>
__global__ void __launch_bounds__(kHeadThreads, kHeadBlocks)
    attention_entropy_kernel(AttentionEntropyParams p, const float* __restrict__ lse) {
  using Rows = HeadRows<T, Width>;
  Rows* stages = shared_memory<Rows>();  // twice queries and keys of one head
  const AttentionMapParams& map = p.map;
  const int64_t first_query = int64_t{blockIdx.x} * kHeadRows, b = blockIdx.z;
  const int64_t num_keys = num_keys_of(p.key_lengths, b, p.stride_key_lengths_b, map.N);
  const int64_t num_parts = (num_keys + kHeadRows - 1) / kHeadRows * map.H;
  const auto copy_stage = [&](int64_t part) {
    const int64_t first_key = part / map.H * kHeadRows, h = part % map.H;
    Rows* stage = stages + part % 2 * 2;
    stage[0].copy(head_at<T>(map.query, b, h, map.stride_query_b, map.stride_query_h),
                  map.stride_query_s, first_query, map.S, map.E);
    stage[1].copy(head_at<T>(map.key, b, h, map.stride_key_b, map.stride_key_h), map.stride_key_n,
                  first_key, num_keys, map.E);
  };

  const int lane = threadIdx.x % 32;
  const float scale = static_cast<float>(map.softmax_scale);
  const int64_t first_s = first_query + threadIdx.x / 32 * 16 + lane / 4;
  RunningEntropy entropy[2];           // of rows lane / 4 and lane / 4 + 8 of the warp's 16
  float total[kHeadRows / 8][4] = {};  // of the heads' weights
  if (num_parts > 0) copy_stage(0);
  commit_copies();
  for (int64_t part = 0; part < num_parts; ++part) {
    if (part + 1 < num_parts) copy_stage(part + 1);
    commit_copies();
    wait_copies<1>();
    __syncthreads();
    const int64_t first_key = part / map.H * kHeadRows, h = part % map.H;
    const Rows* stage = stages + part % 2 * 2;
    uint32_t factor[Width / 16][4];
    stage[0].load(factor);
    float weights[kHeadRows / 8][4];
    stage[1].multiply(factor, weights);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t s = first_s + half * 8;
      const float origin = s < map.S ? lse[(b * map.H + h) * map.S + s] : INFINITY;
      const bool is_last = h + 1 == map.H;
      RunningEntropy of_stage;  // shorter sums round less
#pragma unroll
      for (int j = 0; j < kHeadRows / 8; ++j) {
#pragma unroll
        for (int i = 2 * half; i < 2 * half + 2; ++i) {
          const bool is_there = first_key + j * 8 + lane % 4 * 2 + i % 2 < num_keys;
          if (is_there) total[j][i] += expf(weights[j][i] * scale - origin);
          if (!is_last) continue;
          of_stage.add(total[j][i] / map.H);
          total[j][i] = 0;
        }
      }
      entropy[half].add(of_stage);
    }
    __syncthreads();  // the next round's copies take this stage
  }
  wait_copies<0>();

#pragma unroll
  for (int half = 0; half < 2; ++half) {
    RunningEntropy& row = entropy[half];
    row = {sum_of_row(row.sum), sum_of_row(row.mass)};
    const int64_t s = first_s + half * 8;
    if (lane % 4 == 0 && s < map.S) static_cast<float*>(p.out)[b * map.S + s] = row.value();
  }
}

// For float32, wide heads and rows that begin anywhere. A warp has a query, and a lane every 32nd
// key.
template <class T>
__global__ void __launch_bounds__(32 * kPlainWarps)
    plain_attention_entropy_kernel(AttentionEntropyParams p, const float* __restrict__ lse) {
  const AttentionMapParams& map = p.map;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t s = int64_t{blockIdx.x} * kPlainWarps + warp, b = blockIdx.z;
  if (s >= map.S) return;
  const int64_t num_keys = num_keys_of(p.key_lengths, b, p.stride_key_lengths_b, map.N);
  const float scale = static_cast<float>(map.softmax_scale);
  RunningEntropy entropy;
  for (int64_t n = lane; n < num_keys; n += 32) {
    float total = 0;
    for (int64_t h = 0; h < map.H; ++h) {
      const T* query = head_at<T>(map.query, b, h, map.stride_query_b, map.stride_query_h);
      const T* key = head_at<T>(map.key, b, h, map.stride_key_b, map.stride_key_h);
      const float score =
          dot(query + s * map.stride_query_s, key + n * map.stride_key_n, map.E) * scale;
      total += expf(score - lse[(b * map.H + h) * map.S + s]);
    }
    entropy.add(total / map.H);
  }
  entropy = {sum_of_warp(entropy.sum), sum_of_warp(entropy.mass)};
  if (lane == 0) static_cast<float*>(p.out)[b * map.S + s] = entropy.value();
}

// A factor, a power of two, that keeps squares from overflowing, and its inverse from vanishing.
constexpr float kShrink = 0x1p-80f, kGrow = 0x1p80f;

// The factor by which a row of such squares has a norm between the limits.
__device__ float factor_of(float squares) {
  return squares == INFINITY ? kShrink : squares < 1e-12f ? kGrow : 1.0f;
}

template <class T>
__global__ void __launch_bounds__(32 * kPlainWarps) head_norms_kernel(HeadNormsParams p) {
  const int64_t row = int64_t{blockIdx.x} * kPlainWarps + threadIdx.x / 32;
  if (row >= p.B * p.N) return;
  const int lane = threadIdx.x % 32;
  float total = 0;
  for (int64_t h = 0; h < p.H; ++h) {
    const T* x =
        head_at<T>(p.x, row / p.N, h, p.stride_x_b, p.stride_x_h) + row % p.N * p.stride_x_n;
    const auto measure = [&](float factor) {
      float squares = 0;
      for (int64_t e = lane; e < p.E; e += 32) {
        const float value = to_float(x[e]) * factor;
        squares += value * value;
      }
      return sqrtf(sum_of_warp(squares)) / factor;
    };
    const float norm = measure(1);
    total += norm == INFINITY ? measure(kShrink) : norm;
  }
  if (lane == 0) static_cast<float*>(p.out)[row] = total / p.H;
}

template <class T, int Width>
__global__ void __launch_bounds__(32 * kPlainWarps) token_change_kernel(TokenChangeParams p) {
  const int64_t row = int64_t{blockIdx.x} * kPlainWarps + threadIdx.x / 32;
  if (row >= p.B * p.N) return;
  const int lane = threadIdx.x % 32;
  const int64_t b = row / p.N, n = row % p.N;
  const T* new_row = static_cast<const T*>(p.new_rows) + b * p.stride_new_b + n * p.stride_new_n;
  const T* old_row = static_cast<const T*>(p.old_rows) + b * p.stride_old_b + n * p.stride_old_n;
  float dots, new_squares, old_squares, moved, size;
  const auto measure = [&](float new_factor, float old_factor) {
    dots = new_squares = old_squares = moved = size = 0;
    for (int64_t d = int64_t{lane} * Width; d < p.D; d += 32 * Width) {
      const auto new_piece = Piece<T, Width>::load(new_row + d);
      const auto old_piece = Piece<T, Width>::load(old_row + d);
      for (int i = 0; i < Width; ++i) {
        const float now = to_float(new_piece.values[i]) * new_factor;
        const float old = to_float(old_piece.values[i]) * old_factor;
        dots += now * old;
        new_squares += now * now;
        old_squares += old * old;
        moved += fabsf(now - old);
        size += fabsf(old);
      }
    }
    dots = sum_of_warp(dots);
    new_squares = sum_of_warp(new_squares);
    old_squares = sum_of_warp(old_squares);
    moved = sum_of_warp(moved);
    size = sum_of_warp(size);
  };
  measure(1, 1);
  const float new_factor = factor_of(new_squares), old_factor = factor_of(old_squares);
  if (p.is_cosine && (new_factor != 1 || old_factor != 1)) measure(new_factor, old_factor);
  const float distance =
      1 - dots / (fmaxf(sqrtf(new_squares), 1e-8f) * fmaxf(sqrtf(old_squares), 1e-8f));
  if (lane == 0) {
    static_cast<float*>(p.out)[row] = p.is_cosine ? distance : moved / fmaxf(size, 1e-12f);
  }
}

}  // namespace

cudaError_t attention_received_cuda(const AttentionReceivedParams& p, cudaStream_t stream) {
  const AttentionMapParams& map = p.map;
  return with_type(map.type, [&](auto one) {
    using T = decltype(one);
    if constexpr (sizeof(T) == 2) {
      if (suits_tensor_cores(map)) {
        return with_head_width(map.E, [&](auto width) {
          constexpr int kBytes = 3 * sizeof(HeadRows<T, decltype(width)::value>);
          return launch(attention_received_kernel<T, decltype(width)::value>,
                        grid_of_heads(map.N, kHeadRows, map), kHeadThreads, kBytes, stream, p);
        });
      }
    }
    const dim3 grid = grid_of_heads(map.N, kPlainWarps, map);
    return launch(plain_attention_received_kernel<T>, grid, 32 * kPlainWarps, 0, stream, p);
  });
}

cudaError_t attention_entropy_cuda(const AttentionEntropyParams& p, cudaStream_t stream) {
  const auto* lse = static_cast<const float*>(p.lse);
  AttentionMapParams map = p.map;
  map.H = 1;  // a block takes all heads
  return with_type(map.type, [&](auto one) {
    using T = decltype(one);
    if constexpr (sizeof(T) == 2) {
      if (suits_tensor_cores(map)) {
        return with_head_width(map.E, [&](auto width) {
          constexpr int kBytes = 4 * sizeof(HeadRows<T, decltype(width)::value>);
          return launch(attention_entropy_kernel<T, decltype(width)::value>,
                        grid_of_heads(map.S, kHeadRows, map), kHeadThreads, kBytes, stream, p, lse);
        });
      }
    }
    const dim3 grid = grid_of_heads(map.S, kPlainWarps, map);
    return launch(plain_attention_entropy_kernel<T>, grid, 32 * kPlainWarps, 0, stream, p, lse);
  });
}

cudaError_t head_norms_cuda(const HeadNormsParams& p, cudaStream_t stream) {
  return with_type(p.type, [&](auto one) {
    const auto blocks = size_of_grid(ceil_div(p.B * p.N, kPlainWarps));
    return launch(head_norms_kernel<decltype(one)>, blocks, 32 * kPlainWarps, 0, stream, p);
  });
}

cudaError_t token_change_cuda(const TokenChangeParams& p, cudaStream_t stream) {
  const int64_t size = size_of(p.type);
  const bool is_aligned =
      common_alignment(address(p.new_rows), address(p.old_rows), p.D * size, p.stride_new_b * size,
                       p.stride_new_n * size, p.stride_old_b * size, p.stride_old_n * size) == 16;
  return with_pieces(p.type, is_aligned, [&](auto one, auto width) {
    const auto blocks = size_of_grid(ceil_div(p.B * p.N, kPlainWarps));
    return launch(token_change_kernel<decltype(one), decltype(width)::value>, blocks,
                  32 * kPlainWarps, 0, stream, p);
  });
}

}  // namespace tokencache
