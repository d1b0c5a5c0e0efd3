#include "cuda/launch.h"
#include "cuda/linear.h"
#include "cuda/number.cuh"
#include "cuda/tensor_core.cuh"

// Rows are gathered as they are read, and scattered as they are written: neither takes a pass of
// its own. A block makes one tile of the product. It leaves it in shared memory, from where bias,
// activation, gate and old value are added in whole pieces of rows.
namespace tokencache {
namespace {

// The unit of a product's columns: 128 bytes of each row at a time.
constexpr int kDepth = 64;

// The tile of a block, whose warps stand in a grid over it.
template <int Rows, int Columns, int WarpRows, int WarpColumns>
struct Tile {
  static constexpr int kRows = Rows, kColumns = Columns;
  static constexpr int kWarpColumns = WarpColumns;
  static constexpr int kThreads = 32 * WarpRows * WarpColumns;
  static constexpr int kRowsOfWarp = Rows / WarpRows, kColumnsOfWarp = Columns / WarpColumns;
  static constexpr int kStages = 3;  // parts of the depth that are in shared memory
  static constexpr int kStageSize = (Rows + Columns) * kDepth;
  static constexpr int kPitch = Columns + 8;  // of sums: rows begin in different banks
  static constexpr int kBytes = kStages * kStageSize * 2;
  static_assert(Rows * kPitch * 4 <= kBytes, "the sums take the place of the stages");
};

using LargeTile = Tile<128, 128, 2, 4>;
using SmallTile = Tile<64, 64, 2, 2>;

// The row of a token, or null where there is none.
template <class T>
__device__ T* row_at(T* base, int64_t b, int64_t n, int64_t N, int64_t stride_b, int64_t stride_n) {
  return n < 0 || n >= N ? nullptr : base + b * stride_b + n * stride_n;
}

// The row that packed row m is read from, or null.
template <class T>
__device__ const T* source_of(const LinearParams& p, int64_t m) {
  if (m >= p.B * p.S) return nullptr;
  const int64_t b = m / p.S, s = m % p.S;
  const int64_t n = p.from == nullptr ? s : p.from[b * p.stride_from_b + s];
  return row_at(static_cast<const T*>(p.x), b, n, p.N_x, p.stride_x_b, p.stride_x_n);
}

// The row that packed row m is written to, or null.
template <class T>
__device__ T* destination_of(const LinearParams& p, int64_t m) {
  if (m >= p.B * p.S) return nullptr;
  const int64_t b = m / p.S, s = m % p.S;
  const int64_t n = p.to == nullptr ? s : p.to[b * p.stride_to_b + s];
  return row_at(static_cast<T*>(p.out), b, n, p.N_out, p.stride_out_b, p.stride_out_n);
}

__device__ float activate(float x, Activation activation) {
  switch (activation) {
    case Activation::kGelu:
      return 0.5f * x * (1.0f + erff(x * 0.70710678f));
    case Activation::kGeluTanh:
      return 0.5f * x * (1.0f + tanhf(0.79788456f * (x + 0.044715f * x * x * x)));
    case Activation::kSilu:
      return x / (1.0f + expf(-x));
    default:
      return x;
  }
}

// Finishes the sums of a tile, that lie in shared memory, and writes them, Width at a time.
template <class T, int Width, class Tile>
__device__ void store_tile(const LinearParams& p, const float* sums, int64_t first_m,
                           int64_t first_o) {
  constexpr int kPieces = Tile::kColumns / Width;  // of a row
  for (int i = threadIdx.x; i < Tile::kRows * kPieces; i += Tile::kThreads) {
    const int row = i / kPieces, column = i % kPieces * Width;
    const int64_t m = first_m + row, o = first_o + column;
    T* out = destination_of<T>(p, m);
    if (out == nullptr || o >= p.O) continue;
    Piece<float, Width> value = Piece<float, Width>::load(sums + row * Tile::kPitch + column);
    if (p.bias != nullptr) {
      const auto bias = Piece<T, Width>::load(static_cast<const T*>(p.bias) + o);
      for (int j = 0; j < Width; ++j) value.values[j] += to_float(bias.values[j]);
    }
    for (int j = 0; j < Width; ++j) value.values[j] = activate(value.values[j], p.activation);
    if (p.factor != nullptr) {
      const auto factor = Piece<T, Width>::load(static_cast<const T*>(p.factor) + m * p.O + o);
      for (int j = 0; j < Width; ++j) value.values[j] *= to_float(factor.values[j]);
    }
    if (p.gate != nullptr) {
      const T* row_of_gate = static_cast<const T*>(p.gate) + m / p.S * p.stride_gate_b;
      const auto gate = Piece<T, Width>::load(row_of_gate + o);
      for (int j = 0; j < Width; ++j) value.values[j] *= to_float(gate.values[j]);
    }
    if (p.residual) {
      const auto old = Piece<T, Width>::load(out + o);
      for (int j = 0; j < Width; ++j) value.values[j] += to_float(old.values[j]);
    }
    Piece<T, Width> rounded;
    for (int j = 0; j < Width; ++j) rounded.values[j] = from_float<T>(value.values[j]);
    rounded.store(out + o);
  }
}

// Where the 8 elements of a piece of a row lie in a stage: mixed, so that eight rows of one column
// are in different banks.
__device__ int place_of(int row, int piece) { return row * kDepth + (piece ^ row % 8) * 8; }

// The tile in one part of the depth: sums += rows @ weight_rows.T.
template <class T, class Tile>
__device__ void multiply_stage(float (&sums)[Tile::kRowsOfWarp / 16][Tile::kColumnsOfWarp / 8][4],
                               const T* rows, const T* weight_rows) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int first_row = warp / Tile::kWarpColumns * Tile::kRowsOfWarp;
  const int first_column = warp % Tile::kWarpColumns * Tile::kColumnsOfWarp;
  for (int k = 0; k < kDepth / 16; ++k) {
    uint32_t a[Tile::kRowsOfWarp / 16][4];
    for (int i = 0; i < Tile::kRowsOfWarp / 16; ++i) {
      const int row = first_row + i * 16 + lane % 16;
      load_matrices(a[i], rows + place_of(row, 2 * k + lane / 16));
    }
    for (int j = 0; j < Tile::kColumnsOfWarp / 16; ++j) {
      uint32_t b[4];  // two times 8 columns
      const int column = first_column + j * 16 + lane / 16 * 8 + lane % 8;
      load_matrices(b, weight_rows + place_of(column, 2 * k + lane / 8 % 2));
      for (int i = 0; i < Tile::kRowsOfWarp / 16; ++i) {
        multiply_add<T>(sums[i][2 * j], a[i], b[0], b[1]);
        multiply_add<T>(sums[i][2 * j + 1], a[i], b[2], b[3]);
      }
    }
  }
}

// Every row begins at 16 bytes, and so does every piece of 8 elements.
template <class T, class Tile>
__global__ void __launch_bounds__(Tile::kThreads) linear_kernel(LinearParams p) {
  T* stages = shared_memory<T>();
  const int64_t first_m = int64_t{blockIdx.x} * Tile::kRows;
  const int64_t first_o = int64_t{blockIdx.y} * Tile::kColumns;

  // a thread copies one piece of every kStep-th row
  constexpr int kStep = Tile::kThreads / (kDepth / 8);
  const int first_copy = threadIdx.x / (kDepth / 8), piece = threadIdx.x % (kDepth / 8);
  const T* rows[Tile::kRows / kStep];
  for (int i = 0; i < Tile::kRows / kStep; ++i) {
    rows[i] = source_of<T>(p, first_m + first_copy + i * kStep);
  }
  const T* weight_rows[Tile::kColumns / kStep];
  for (int i = 0; i < Tile::kColumns / kStep; ++i) {
    weight_rows[i] = row_at(static_cast<const T*>(p.weight), 0, first_o + first_copy + i * kStep,
                            p.O, 0, p.stride_weight_o);
  }
  const auto copy_stage = [&](int part) {
    T* stage = stages + part % Tile::kStages * Tile::kStageSize;
    const int64_t k = int64_t{part} * kDepth + piece * 8;
    for (int i = 0; i < Tile::kRows / kStep; ++i) {
      const bool is_there = rows[i] != nullptr && k < p.K;
      copy_async(stage + place_of(first_copy + i * kStep, piece), is_there ? rows[i] + k : p.x,
                 is_there);
    }
    stage += Tile::kRows * kDepth;
    for (int i = 0; i < Tile::kColumns / kStep; ++i) {
      const bool is_there = weight_rows[i] != nullptr && k < p.K;
      copy_async(stage + place_of(first_copy + i * kStep, piece),
                 is_there ? weight_rows[i] + k : p.weight, is_there);
    }
  };

  float sums[Tile::kRowsOfWarp / 16][Tile::kColumnsOfWarp / 8][4] = {};
  const int num_parts = static_cast<int>((p.K + kDepth - 1) / kDepth);
  for (int part = 0; part < Tile::kStages - 1; ++part) {
    if (part < num_parts) copy_stage(part);
    commit_copies();  // a group for every part, also an empty one: so they can be counted
  }
  for (int part = 0; part < num_parts; ++part) {
    wait_copies<Tile::kStages - 2>();  // this part has come
    __syncthreads();                   // for every thread; and all are done with the part before
    const int ahead = part + Tile::kStages - 1;
    if (ahead < num_parts) copy_stage(ahead);
    commit_copies();
    const T* stage = stages + part % Tile::kStages * Tile::kStageSize;
    multiply_stage<T, Tile>(sums, stage, stage + Tile::kRows * kDepth);
  }
  wait_copies<0>();
  __syncthreads();

  float* tile = shared_memory<float>();
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int row = warp / Tile::kWarpColumns * Tile::kRowsOfWarp + lane / 4;
  const int column = warp % Tile::kWarpColumns * Tile::kColumnsOfWarp + lane % 4 * 2;
  for (int i = 0; i < Tile::kRowsOfWarp / 16; ++i) {
    for (int j = 0; j < Tile::kColumnsOfWarp / 8; ++j) {
      float* upper = tile + (row + i * 16) * Tile::kPitch + column + j * 8;
      const auto& sum = sums[i][j];
      Piece<float, 2>{sum[0], sum[1]}.store(upper);
      Piece<float, 2>{sum[2], sum[3]}.store(upper + 8 * Tile::kPitch);
    }
  }
  __syncthreads();
  store_tile<T, 8, Tile>(p, tile, first_m, first_o);
}

// For float32, which tensor cores would round, and for rows that begin anywhere.
struct PlainTile {
  static constexpr int kRows = 64, kColumns = 64, kThreads = 256;
  static constexpr int kDepth = 16;
  static constexpr int kPitch = kColumns + 8;
};

// Element k of a row, as float32; 0 where there is none.
template <class T>
__device__ float element_at(const T* row, int64_t k, int64_t K) {
  return row == nullptr || k >= K ? 0.0f : to_float(row[k]);
}

// A thread makes 4 by 4 sums, with rows and columns 16 apart.
template <class T>
__global__ void __launch_bounds__(PlainTile::kThreads) plain_linear_kernel(LinearParams p) {
  using Tile = PlainTile;
  __shared__ float rows_part[Tile::kDepth][Tile::kRows + 1];
  __shared__ float weight_part[Tile::kDepth][Tile::kColumns + 1];
  __shared__ float tile[Tile::kRows * Tile::kPitch];
  const int64_t first_m = int64_t{blockIdx.x} * Tile::kRows;
  const int64_t first_o = int64_t{blockIdx.y} * Tile::kColumns;
  const int y = threadIdx.x / 16, x = threadIdx.x % 16;
  const T* rows[4];
  const T* weight_rows[4];
  for (int i = 0; i < 4; ++i) {
    rows[i] = source_of<T>(p, first_m + y + i * 16);
    weight_rows[i] =
        row_at(static_cast<const T*>(p.weight), 0, first_o + y + i * 16, p.O, 0, p.stride_weight_o);
  }
  float sums[4][4] = {};
  for (int64_t k = 0; k < p.K; k += Tile::kDepth) {
    for (int i = 0; i < 4; ++i) {
      rows_part[x][y + i * 16] = element_at(rows[i], k + x, p.K);
      weight_part[x][y + i * 16] = element_at(weight_rows[i], k + x, p.K);
    }
    __syncthreads();
    for (int d = 0; d < Tile::kDepth; ++d) {
      for (int i = 0; i < 4; ++i) {
        for (int j = 0; j < 4; ++j) {
          sums[i][j] += rows_part[d][y + i * 16] * weight_part[d][x + j * 16];
        }
      }
    }
    __syncthreads();
  }
  for (int i = 0; i < 4; ++i) {
    for (int j = 0; j < 4; ++j) tile[(y + i * 16) * Tile::kPitch + x + j * 16] = sums[i][j];
  }
  __syncthreads();
  store_tile<T, 1, Tile>(p, tile, first_m, first_o);
}

bool is_aligned(const LinearParams& p) {
  const int64_t size = size_of(p.type);
  return common_alignment(address(p.x), address(p.weight), address(p.bias), address(p.gate),
                          address(p.factor), address(p.out), p.K * size, p.O * size,
                          p.stride_x_b * size, p.stride_x_n * size, p.stride_weight_o * size,
                          p.stride_gate_b * size, p.stride_out_b * size,
                          p.stride_out_n * size) == 16;
}

template <class Tile>
dim3 grid_of(const LinearParams& p) {
  return {size_of_grid(ceil_div(p.B * p.S, Tile::kRows)),
          size_of_grid(ceil_div(p.O, Tile::kColumns))};
}

template <class T, class Tile>
cudaError_t launch_linear(const LinearParams& p, cudaStream_t stream) {
  return launch(linear_kernel<T, Tile>, grid_of<Tile>(p), Tile::kThreads, Tile::kBytes, stream, p);
}

// Whether there is a large tile for each multiprocessor.
bool fills_device(const LinearParams& p) {
  int device = 0, multiprocessors = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  const dim3 grid = grid_of<LargeTile>(p);
  return int64_t{grid.x} * grid.y >= multiprocessors;
}

}  // namespace

cudaError_t linear_cuda(const LinearParams& p, cudaStream_t stream) {
  return with_type(p.type, [&](auto one) {
    using T = decltype(one);
    if constexpr (sizeof(T) == 2) {
      if (is_aligned(p)) {
        return fills_device(p) ? launch_linear<T, LargeTile>(p, stream)
                               : launch_linear<T, SmallTile>(p, stream);
      }
    }
    return launch(plain_linear_kernel<T>, grid_of<PlainTile>(p), PlainTile::kThreads, 0, stream, p);
  });
}

}  // namespace tokencache
