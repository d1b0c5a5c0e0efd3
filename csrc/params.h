#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define TOKENCACHE_ON_BOTH __host__ __device__
#else
#define TOKENCACHE_ON_BOTH
#endif

// One plain struct per op: all that a loop or a kernel needs to know. Strides count elements.
namespace tokencache {

struct GatherRowsParams {
  int64_t B, N, S, D;

  const void* x;           // [B, N, D], unit stride along D
  const int32_t* indices;  // [B, S], unit stride along S; outside [0, N): an empty slot
  void* out;               // [B, S, D], contiguous

  int64_t stride_x_b, stride_x_n;
  int64_t stride_indices_b;
  int64_t element_size;  // in bytes; a copy does not care about the type
};

struct ScatterRowsParams {
  int64_t B, N, S, D;

  const void* rows;        // [B, S, D], unit stride along D
  const int32_t* indices;  // [B, S], unit stride along S; outside [0, N): an empty slot
  void* cache;             // [B, N, D], unit stride along D

  int64_t stride_rows_b, stride_rows_s;
  int64_t stride_indices_b;
  int64_t stride_cache_b, stride_cache_n;
  int64_t element_size;  // in bytes
};

enum class Type { kFloat64, kFloat32, kFloat16, kBfloat16 };

// A vector for each token, unit stride along D: row n of its sample, or of K rows that of the
// token's number. With a stride along N of 0, one for each sample.
struct VectorParams {
  const void* data = nullptr;  // [B, N, D] or [B, K, D], or null where there is none
  int64_t stride_b = 0, stride_n = 0;
  int64_t K = 0;                   // of numbered vectors
  const int32_t* index = nullptr;  // [B, N], unit stride along N, clipped to [0, K); or null for n
  int64_t stride_index_b = 0;

  TOKENCACHE_ON_BOTH int64_t offset(int64_t b, int64_t n) const {
    if (index != nullptr && stride_n != 0) {
      const int64_t number = index[b * stride_index_b + n];
      n = number < 0 ? 0 : number < K ? number : K - 1;
    }
    return b * stride_b + n * stride_n;
  }
};

enum class NormKind { kLayer, kRms, kNone };

// normalised * (weight_offset + weight) + bias
struct NormParams {
  NormKind kind = NormKind::kNone;
  double eps = 0;
  const void* weight = nullptr;  // [D], or null for a factor of 1
  const void* bias = nullptr;    // [D], or null
  double weight_offset = 0;
};

// One gated summand of a row pass.
struct BranchParams {
  const void* branch;  // [B, N, D], unit stride along D
  VectorParams gate;   // 1 where there is none
  NormParams norm;     // RMS or none, without a bias

  int64_t stride_branch_b, stride_branch_n;
};

struct AddBranchesParams {
  int64_t B, N, D;
  Type type;

  const void* x;  // [B, N, D], unit stride along D
  const BranchParams* branches;
  int64_t num_branches;
  void* out;  // [B, N, D], unit stride along D; may be x itself

  int64_t stride_x_b, stride_x_n;
  int64_t stride_out_b, stride_out_n;
};

struct ModulateParams {
  int64_t B, N, S, D;
  Type type;
  NormParams norm;

  const void* x;           // [B, N, D], unit stride along D
  const int32_t* indices;  // [B, S], unit stride along S; outside [0, N): an empty slot
  VectorParams shift;      // 0 where there is none
  VectorParams scale;      // as shift
  void* packed;            // [B, S, D], contiguous

  int64_t stride_x_b, stride_x_n;
  int64_t stride_indices_b;
};

enum class Activation { kNone, kGelu, kGeluTanh, kSilu };

// On its way a row may change its place: row (b, s) comes from row from[b, s] of x and goes to row
// to[b, s] of out; outside its range a row of zeros comes, and nothing goes.
struct LinearParams {
  int64_t B, S, K, O;
  int64_t N_x, N_out;
  Type type;
  Activation activation;
  bool residual;  // add to the old value of out

  const void* x;        // [B, N_x, K], unit stride along K
  const int32_t* from;  // [B, S], unit stride along S, or null for s
  const void* weight;   // [O, K], unit stride along K
  const void* bias;     // [O], or null
  const void* gate;     // [B, O], unit stride along O, or null for 1
  const void* factor;   // [B, S, O], contiguous, of a gated layer, or null for 1
  const int32_t* to;    // [B, S], unit stride along S, or null for s
  void* out;            // [B, N_out, O], unit stride along O

  int64_t stride_x_b, stride_x_n;
  int64_t stride_from_b;
  int64_t stride_weight_o;
  int64_t stride_gate_b;
  int64_t stride_to_b;
  int64_t stride_out_b, stride_out_n;
};

struct BlendParams {
  int64_t B, N, D;
  Type type;

  const void* cached;  // [B, N, D], unit stride along D
  const void* fresh;   // [B, N, D], unit stride along D
  const void* weight;  // [B, N], float64 if the type is, else float32; strides may be 0
  void* out;           // [B, N, D], contiguous

  int64_t stride_cached_b, stride_cached_n;
  int64_t stride_fresh_b, stride_fresh_n;
  int64_t stride_weight_b, stride_weight_n;
};

struct BlendBackwardParams {
  BlendParams forward;  // its out is not looked at

  const void* grad;   // [B, N, D], unit stride along D
  void* grad_cached;  // [B, N, D], contiguous, or null where it is not needed
  void* grad_fresh;   // [B, N, D], contiguous
  void* grad_weight;  // [B, N], contiguous, in the weights' type

  int64_t stride_grad_b, stride_grad_n;
};

// The map softmax(softmax_scale * query[b, s, h] @ key[b, :, h]).
struct AttentionMapParams {
  int64_t B, S, N, H, E;
  Type type;
  double softmax_scale;

  const void* query;  // [B, S, H, E], unit stride along E
  const void* key;    // [B, N, H, E], unit stride along E

  int64_t stride_query_b, stride_query_s, stride_query_h;
  int64_t stride_key_b, stride_key_n, stride_key_h;
};

struct AttentionParams {
  AttentionMapParams map;

  const void* value;           // [B, N, H, E], unit stride along E
  const int32_t* key_lengths;  // [B], or null for N everywhere
  void* out;                   // [B, S, H, E], contiguous, or null for the LSE alone
  // float64 where the type is that, else float32
  void* lse;      // [B, H, S], contiguous
  void* entropy;  // [B, H, S], contiguous, or null where it is not wanted

  int64_t stride_value_b, stride_value_n, stride_value_h;
  int64_t stride_key_lengths_b;
};

// Of statistics: float64 where the inputs' type is that, else float32.
struct AttentionReceivedParams {
  AttentionMapParams map;

  const void* lse;  // [B, H, S], or null to compute it
  void* out;        // [B, H, N], contiguous

  int64_t stride_lse_b, stride_lse_h, stride_lse_s;
};

struct AttentionEntropyParams {
  AttentionMapParams map;

  const int32_t* key_lengths;  // [B], or null for N everywhere
  const void* lse;             // [B, H, S], contiguous; on the CPU it may be null
  void* out;                   // [B, S], contiguous

  int64_t stride_key_lengths_b;
};

struct HeadNormsParams {
  int64_t B, N, H, E;
  Type type;

  const void* x;  // [B, N, H, E], unit stride along E
  void* out;      // [B, N], contiguous

  int64_t stride_x_b, stride_x_n, stride_x_h;
};

struct TokenChangeParams {
  int64_t B, N, D;
  Type type;
  bool is_cosine;  // else relative_l1

  const void* new_rows;  // [B, N, D], unit stride along D
  const void* old_rows;  // [B, N, D], unit stride along D
  void* out;             // [B, N], contiguous

  int64_t stride_new_b, stride_new_n;
  int64_t stride_old_b, stride_old_n;
};

struct FinishHeadsParams {
  int64_t B, N, S, H, E;
  Type type;
  bool is_layer_norm;  // else RMS
  double eps;

  void* rows;              // [B, S, H, E], contiguous
  const int32_t* indices;  // [B, S], unit stride along S, or null for slot = token
  const void* weight;      // [E], or null for no norm
  const void* bias;        // [E], or null
  // float64 where the type is that, else float32
  const void* cosine;  // [B, T, E], T >= N, unit stride along E, or null for no rotation
  const void* sine;    // as cosine

  int64_t stride_indices_b;
  int64_t stride_table_b, stride_table_t;
};

struct SelectParams {
  int64_t L, B, N, P;  // layers, samples, tokens, steps
  int64_t max_fresh;
  float staleness_weight;
  bool normalize;
  int64_t grid_height, grid_width;  // 0: no spatial bonus
  int64_t tile;
  float bonus;

  const float* scores;       // [L, B, N], contiguous
  const int32_t* num_fresh;  // [P, L], contiguous, or null for max_fresh everywhere
  int32_t* staleness;        // [L, B, N], unit stride along N, updated
  int32_t* indices;          // [P, L, B, max_fresh], contiguous
  int32_t* positions;        // [P, L, B, N], contiguous

  int64_t stride_staleness_l, stride_staleness_b;
};

struct InvertIndicesParams {
  int64_t B, N, S;

  const int32_t* indices;  // [B, S], unit stride along S; outside [0, N): an empty slot
  int32_t* positions;      // [B, N], contiguous

  int64_t stride_indices_b;
};

}  // namespace tokencache
