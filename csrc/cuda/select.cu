#include "cuda/launch.h"
#include "cuda/select.h"
#include "cuda/warp.cuh"

// Scores become integers of the same order, keys. Counting them by their digits, 8 bits at a time
// from the highest, finds the smallest winner. Counting in the order of the tokens finds each one's
// slot. Atomics add whole numbers only, so every run is the same. A row of scores, of one layer and
// sample, has a block of its own with the keys in shared memory, or is split into parts for a block
// each. Parts do not wait for each other: the result for all goes to the next launch through the
// workspace.
namespace tokencache {
namespace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / 32;
// left alone, the assembler spills for more blocks on a multiprocessor
constexpr int kBlocks = 2;
constexpr int kMostTokens = 8192;  // of a block of its own
constexpr int kPart = 2048;        // tokens of a part
constexpr int kDigits = 4;
constexpr int kBins = 256;  // for the values of a digit
constexpr float kShrink = 0x1p-80f;

// The part of a row that a block has.
struct Part {
  int64_t row, layer, sample;
  int index, count;
  int first, end;  // its tokens

  __device__ Part(const SelectParams& p, int parts) {
    row = blockIdx.x / parts;
    layer = row / p.B;
    sample = row % p.B;
    index = static_cast<int>(blockIdx.x % parts);
    count = parts;
    first = parts == 1 ? 0 : index * kPart;
    end = static_cast<int>(parts == 1 || p.N - first < kPart ? p.N : first + kPart);
  }
};

// The least key that is taken, as far as its digits are known, and how many of the keys that begin
// with these are taken.
struct Threshold {
  uint32_t key;
  int wanted;
};

// Of the tokens so far: those above the threshold and those at it.
struct Counts {
  int above = 0, ties = 0;
};

// The sum of the squares of scores, and that of scores made so much smaller that it is finite.
struct Squares {
  float plain = 0, shrunk = 0;
};

// The workspace between the launches of one call, for each row.
struct Workspace {
  int* bins;         // [rows, kDigits, kBins]
  Squares* squares;  // [rows, parts]
  Counts* counts;    // [rows, parts]
};

// Orders like the score does: -0 is 0, and NaN is -inf.
__device__ uint32_t key_of(float score) {
  const uint32_t bits = __float_as_uint(score == score ? score + 0.0f : -INFINITY);
  return bits ^ (bits >> 31 ? 0xFFFFFFFF : 0x80000000);
}

__device__ const float* scores_of(const SelectParams& p, const Part& part) {
  return p.scores + part.row * p.N;
}

__device__ int32_t* staleness_of(const SelectParams& p, const Part& part) {
  return p.staleness + part.layer * p.stride_staleness_l + part.sample * p.stride_staleness_b;
}

__device__ int32_t* positions_of(const SelectParams& p, const Part& part, int64_t step) {
  return p.positions + (step * p.L * p.B + part.row) * p.N;
}

__device__ Threshold start_of(const SelectParams& p, const Part& part, int64_t step) {
  const int most = static_cast<int>(p.max_fresh);
  const int given = p.num_fresh == nullptr ? most : p.num_fresh[step * p.L + part.layer];
  return {0, min(max(given, 0), most)};
}

// The sum of the squares of the part's scores, NaN left out.
__device__ Squares sum_squares(const SelectParams& p, const Part& part) {
  const float* scores = scores_of(p, part);
  Squares sum;
  for (int n = part.first + threadIdx.x; n < part.end; n += kThreads) {
    const float score = scores[n] == scores[n] ? scores[n] : 0.0f;
    sum.plain += score * score;
    sum.shrunk += score * kShrink * (score * kShrink);
  }
  return {sum_of_block<kThreads>(sum.plain), sum_of_block<kThreads>(sum.shrunk)};
}

// The factor of scores, a power of two, and their divisor.
struct Norm {
  float factor = 1, norm = 1;
};

__device__ Norm norm_of(Squares squares) {
  if (squares.plain == INFINITY) return {kShrink, sqrtf(squares.shrunk)};
  return {1, fmaxf(sqrtf(squares.plain), 1e-12f)};
}

// Makes keys of combined scores, square by square of the grid, whose best one gains the bonus. The
// squares are spread over all threads of all parts. Rounded as the reference does: nothing is
// fused.
__device__ void make_keys(const SelectParams& p, const Part& part, Norm norm, uint32_t* keys) {
  const float* scores = scores_of(p, part);
  const int32_t* staleness = staleness_of(p, part);
  const int height = static_cast<int>(p.grid_height), width = static_cast<int>(p.grid_width);
  const int tile = static_cast<int>(p.tile);
  const int squares_across = (width + tile - 1) / tile;
  const int num_squares = (height + tile - 1) / tile * squares_across;
  for (int square = part.index * kThreads + threadIdx.x; square < num_squares;
       square += part.count * kThreads) {
    const int top = square / squares_across * tile, left = square % squares_across * tile;
    uint32_t best = 0;  // below every key
    int winner = 0;
    float winning = 0;
    for (int y = top; y < min(top + tile, height); ++y) {
      for (int x = left; x < min(left + tile, width); ++x) {
        const int token = y * width + x;
        const float gain = __fmul_rn(p.staleness_weight, static_cast<float>(staleness[token]));
        const float score = __fadd_rn(scores[token] * norm.factor / norm.norm, gain);
        const uint32_t key = key_of(score);
        keys[token] = key;
        if (key > best) {
          best = key;
          winner = token;
          winning = score;
        }
      }
    }
    keys[winner] = key_of(__fmul_rn(winning, 1.0f + p.bonus));
  }
}

// bins[d] += how many of the part's keys begin like the threshold and have the next digit d.
__device__ void count_digit(const Part& part, const uint32_t* keys, Threshold threshold, int digit,
                            int* bins) {
  const int shift = 8 * (kDigits - 1 - digit);
  const uint32_t known = digit == 0 ? 0 : 0xFFFFFFFF << (shift + 8);
  for (int n = part.first + threadIdx.x; n < part.end; n += kThreads) {
    if ((keys[n] & known) == threshold.key) atomicAdd(bins + (keys[n] >> shift) % kBins, 1);
  }
}

// The threshold with one digit more. Every warp finds it; a lane has eight bins.
__device__ Threshold add_digit(Threshold threshold, int digit, const int* bins) {
  constexpr int kBinsOfLane = kBins / 32;
  const int lane = threadIdx.x % 32;
  const int highest = kBins - 1 - lane * kBinsOfLane;
  int sum = 0;
  for (int i = 0; i < kBinsOfLane; ++i) sum += bins[highest - i];
  const int before = sum_of_lanes_before(sum);
  // the first lane within whose bins there are enough
  const int chosen = __ffs(__ballot_sync(0xFFFFFFFF, before + sum >= threshold.wanted)) - 1;
  int value = highest, seen = before;
  for (int i = 0; i + 1 < kBinsOfLane && seen + bins[value] < threshold.wanted; ++i) {
    seen += bins[value--];
  }
  const int shift = 8 * (kDigits - 1 - digit);
  return {threshold.key | __shfl_sync(0xFFFFFFFF, static_cast<uint32_t>(value) << shift, chosen),
          threshold.wanted - __shfl_sync(0xFFFFFFFF, seen, chosen)};
}

// Each warp has a run of the part's tokens.
struct Run {
  int first, end;

  __device__ explicit Run(const Part& part) {
    const int length = (part.end - part.first + kThreads - 1) / kThreads * 32;
    first = part.first + static_cast<int>(threadIdx.x / 32) * length;
    end = min(first + length, part.end);
  }
};

// How many of a part's tokens are above the threshold and at it: of each warp's run, in shared
// memory.
__device__ const Counts* count_tokens(const Part& part, const uint32_t* keys, Threshold threshold) {
  __shared__ Counts of_warp[kWarps];
  const Run run(part);
  Counts counts;
  for (int start = run.first; start < run.end; start += 32) {
    const int token = start + threadIdx.x % 32;
    const bool is_there = token < run.end;
    counts.above += __popc(__ballot_sync(0xFFFFFFFF, is_there && keys[token] > threshold.key));
    counts.ties += __popc(__ballot_sync(0xFFFFFFFF, is_there && keys[token] == threshold.key));
  }
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = counts;
  __syncthreads();
  return of_warp;
}

// The sum of the first counts, for every lane.
__device__ Counts sum_counts(const Counts* counts, int end) {
  Counts sum;
  for (int i = threadIdx.x % 32; i < end; i += 32) {
    sum.above += counts[i].above;
    sum.ties += counts[i].ties;
  }
  return {sum_of_warp(sum.above), sum_of_warp(sum.ties)};
}

// Writes all results of a part; of the tokens before it there are so many.
__device__ void write_tokens(const SelectParams& p, const Part& part, int64_t step,
                             const uint32_t* keys, Threshold threshold, Counts before) {
  int32_t* staleness = staleness_of(p, part);
  int32_t* positions = positions_of(p, part, step);
  int32_t* indices = p.indices + (step * p.L * p.B + part.row) * p.max_fresh;
  const Counts of_part = sum_counts(count_tokens(part, keys, threshold), threadIdx.x / 32);
  int above_before = before.above + of_part.above, ties_before = before.ties + of_part.ties;
  const uint32_t lanes_before = (1u << threadIdx.x % 32) - 1;
  const Run run(part);
  for (int start = run.first; start < run.end; start += 32) {
    const int token = start + threadIdx.x % 32;
    const bool is_there = token < run.end;
    // keys may lie where positions go: a lane reads its own before it writes it
    const bool is_above = is_there && keys[token] > threshold.key;
    const bool is_tie = is_there && keys[token] == threshold.key;
    const uint32_t all_above = __ballot_sync(0xFFFFFFFF, is_above);
    const uint32_t all_ties = __ballot_sync(0xFFFFFFFF, is_tie);
    const int ties = ties_before + __popc(all_ties & lanes_before);
    const bool is_fresh = is_above || (is_tie && ties < threshold.wanted);
    if (is_there) {
      const int slot =
          above_before + __popc(all_above & lanes_before) + min(ties, threshold.wanted);
      positions[token] = is_fresh ? slot : -1;
      if (is_fresh) indices[slot] = token;
      // unsigned: it may begin at any number, and wraps as the reference does
      staleness[token] = is_fresh ? 0 : static_cast<uint32_t>(staleness[token]) + 1;
    }
    above_before += __popc(all_above);
    ties_before += __popc(all_ties);
  }
  // of the slots that a part's numbers of tokens also count, those that stay empty
  const int wanted = start_of(p, part, step).wanted;
  for (int slot = part.first + threadIdx.x; slot < min(part.end, static_cast<int>(p.max_fresh));
       slot += kThreads) {
    if (slot >= wanted) indices[slot] = -1;
  }
}

__global__ void __launch_bounds__(kThreads, kBlocks) select_tokens_kernel(SelectParams p) {
  __shared__ int bins[kBins];
  uint32_t* keys = shared_memory<uint32_t>();
  const Part part(p, 1);
  const Norm norm = p.normalize ? norm_of(sum_squares(p, part)) : Norm{};
  for (int64_t step = 0; step < p.P; ++step) {
    make_keys(p, part, norm, keys);
    Threshold threshold = start_of(p, part, step);
    for (int digit = 0; digit < kDigits; ++digit) {
      if (threadIdx.x < kBins) bins[threadIdx.x] = 0;
      __syncthreads();
      count_digit(part, keys, threshold, digit, bins);
      __syncthreads();
      threshold = add_digit(threshold, digit, bins);
      __syncthreads();  // the bins were read
    }
    write_tokens(p, part, step, keys, threshold, {});
    __syncthreads();  // the next step reads staleness that other threads wrote
  }
}

__global__ void __launch_bounds__(kThreads)
    measure_parts_kernel(SelectParams p, int parts, Workspace workspace) {
  const Part part(p, parts);
  const Squares squares = sum_squares(p, part);
  if (threadIdx.x == 0) workspace.squares[blockIdx.x] = squares;
}

// Until they are known, the place of the positions holds the keys.
__device__ uint32_t* keys_of(const SelectParams& p, const Part& part, int64_t step) {
  return reinterpret_cast<uint32_t*>(positions_of(p, part, step));
}

// One block of it on a multiprocessor is enough: the compiler may use the registers that it needs.
__global__ void __launch_bounds__(kThreads, 1)
    make_keys_kernel(SelectParams p, int parts, Workspace workspace, int64_t step) {
  const Part part(p, parts);
  Norm norm;
  if (p.normalize) {
    Squares squares;
    for (int i = threadIdx.x; i < parts; i += kThreads) {
      squares.plain += workspace.squares[part.row * parts + i].plain;
      squares.shrunk += workspace.squares[part.row * parts + i].shrunk;
    }
    norm = norm_of({sum_of_block<kThreads>(squares.plain), sum_of_block<kThreads>(squares.shrunk)});
  }
  make_keys(p, part, norm, keys_of(p, part, step));
}

// The threshold with all digits that were counted.
__device__ Threshold threshold_of(const SelectParams& p, const Part& part, int64_t step,
                                  const int* bins, int digits) {
  Threshold threshold = start_of(p, part, step);
  for (int digit = 0; digit < digits; ++digit) {
    threshold = add_digit(threshold, digit, bins + digit * kBins);
  }
  return threshold;
}

__global__ void __launch_bounds__(kThreads)
    count_digit_kernel(SelectParams p, int parts, Workspace workspace, int64_t step, int digit) {
  __shared__ int of_part[kBins];
  const Part part(p, parts);
  int* bins = workspace.bins + part.row * kDigits * kBins;
  if (threadIdx.x < kBins) of_part[threadIdx.x] = 0;
  __syncthreads();
  const Threshold threshold = threshold_of(p, part, step, bins, digit);
  count_digit(part, keys_of(p, part, step), threshold, digit, of_part);
  __syncthreads();
  if (threadIdx.x < kBins && of_part[threadIdx.x] > 0) {
    atomicAdd(bins + digit * kBins + threadIdx.x, of_part[threadIdx.x]);
  }
}

__global__ void __launch_bounds__(kThreads)
    count_parts_kernel(SelectParams p, int parts, Workspace workspace, int64_t step) {
  const Part part(p, parts);
  const int* bins = workspace.bins + part.row * kDigits * kBins;
  const Threshold threshold = threshold_of(p, part, step, bins, kDigits);
  const Counts* of_warp = count_tokens(part, keys_of(p, part, step), threshold);
  const Counts counts = sum_counts(of_warp, kWarps);
  if (threadIdx.x == 0) workspace.counts[blockIdx.x] = counts;
}

__global__ void __launch_bounds__(kThreads)
    write_parts_kernel(SelectParams p, int parts, Workspace workspace, int64_t step) {
  const Part part(p, parts);
  const int* bins = workspace.bins + part.row * kDigits * kBins;
  const Threshold threshold = threshold_of(p, part, step, bins, kDigits);
  const Counts before = sum_counts(workspace.counts + part.row * parts, part.index);
  write_tokens(p, part, step, keys_of(p, part, step), threshold, before);
}

__global__ void __launch_bounds__(kThreads) invert_indices_kernel(InvertIndicesParams p) {
  const int64_t stride = int64_t{gridDim.x} * kThreads;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < p.B * p.S; i += stride) {
    const int64_t b = i / p.S, slot = i % p.S;
    const int64_t token = p.indices[b * p.stride_indices_b + slot];
    if (token >= 0 && token < p.N) {
      atomicMax(p.positions + b * p.N + token, static_cast<int32_t>(slot));
    }
  }
}

// How many blocks a row has.
int64_t num_parts_of(const SelectParams& p) {
  return p.N <= kMostTokens ? 1 : ceil_div(p.N, kPart);
}

// The same problem with a grid in any case: without a bonus it is one line of squares of one token.
SelectParams with_grid(SelectParams p) {
  if (p.grid_height == 0) {
    p.grid_height = p.tile = 1;
    p.grid_width = p.N;
    p.bonus = 0;
  }
  p.tile = std::min(p.tile, std::max(p.grid_height, p.grid_width));
  return p;
}

int64_t bytes_of_bins(const SelectParams& p) {
  return p.L * p.B * kDigits * kBins * int64_t{sizeof(int)};
}

cudaError_t select_in_parts(const SelectParams& p, void* memory, cudaStream_t stream) {
  const int64_t rows = p.L * p.B;
  const int parts = static_cast<int>(num_parts_of(p));
  const unsigned int grid = size_of_grid(rows * parts);
  char* behind_bins = static_cast<char*>(memory) + bytes_of_bins(p);
  auto* counts = reinterpret_cast<Counts*>(behind_bins);
  const Workspace workspace{
      .bins = static_cast<int*>(memory),
      .squares = reinterpret_cast<Squares*>(counts + rows * parts),
      .counts = counts,
  };
  cudaError_t error = cudaSuccess;
  // one launch after another, as long as all is well
  const auto then = [&](auto kernel, auto... more) {
    if (error != cudaSuccess) return;
    error = launch(kernel, grid, kThreads, 0, stream, p, parts, workspace, more...);
  };
  if (p.normalize) then(measure_parts_kernel);
  for (int64_t step = 0; step < p.P; ++step) {
    if (error == cudaSuccess) error = cudaMemsetAsync(memory, 0, bytes_of_bins(p), stream);
    then(make_keys_kernel, step);
    for (int digit = 0; digit < kDigits; ++digit) then(count_digit_kernel, step, digit);
    then(count_parts_kernel, step);
    then(write_parts_kernel, step);
  }
  return error;
}

}  // namespace

int64_t select_workspace_bytes(const SelectParams& p) {
  if (num_parts_of(p) == 1) return 0;
  return bytes_of_bins(p) +
         p.L * p.B * num_parts_of(p) * static_cast<int64_t>(sizeof(Counts) + sizeof(Squares));
}

cudaError_t select_tokens_cuda(const SelectParams& p, void* workspace, cudaStream_t stream) {
  const SelectParams on_grid = with_grid(p);
  if (num_parts_of(p) > 1) return select_in_parts(on_grid, workspace, stream);
  return launch(select_tokens_kernel, size_of_grid(p.L * p.B), kThreads,
                p.N * int64_t{sizeof(uint32_t)}, stream, on_grid);
}

cudaError_t invert_indices_cuda(const InvertIndicesParams& p, cudaStream_t stream) {
  // each byte of -1
  const cudaError_t error = cudaMemsetAsync(p.positions, 0xFF, p.B * p.N * sizeof(int32_t), stream);
  if (error != cudaSuccess || p.S == 0) return error;
  return launch(invert_indices_kernel, grid_for(p.B * p.S, kThreads), kThreads, 0, stream, p);
}

}  // namespace tokencache
