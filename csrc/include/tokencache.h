/* The C API of the native library: the ops on raw memory, without torch and without Python.
 *
 * Every op takes a struct that describes its arguments. Strides count elements, as all of the
 * structs' letters: B samples, N tokens, S slots of selected tokens, D channels, L layers, P steps.
 * Rows have stride 1. An index outside [0, N) is an empty slot: it reads zeros and writes nothing.
 *
 * Every argument but the values of indices is checked before anything is written:
 *   - sizes are at least 0, N at most 2^31 - 1, S at most N;
 *   - a pointer is aligned to its element type and, unless its tensor is empty, not NULL;
 *   - a stride along which there is more than one element is at least 0;
 *   - a tensor spans less than 2^52 bytes;
 *   - the rows of a tensor that is written overlap neither each other nor another tensor.
 * That memory is really there, as large as described, is the caller's duty.
 *
 * On CUDA (TOKENCACHE_CUDA) a call launches kernels on the caller's stream and returns: it waits
 * for nothing and allocates nothing. The stream belongs to the thread's current device; NULL is the
 * default stream. Tensors lie in memory of that device and stay there until the stream has come by;
 * a call's structs and its array of branches lie in host memory and may go when it returns. Beside
 * the rules above
 *   - B * (N + S) is at most 2^31 - 1, and D at most 24576 where rows are normalised;
 *   - N is at most 2^30 where tokens are selected;
 *   - FLOAT64 is for moving rows only, which has no limits either.
 * Indices lie there too, where no call can look at them without waiting: kernels compare each with
 * N, and each position with S, where it is used, so that none reads or writes elsewhere. A call
 * with an empty problem tells whether there is a device, a driver and this library's CUDA half,
 * which is loaded by the first call; the first call of each op loads its kernels.
 *
 * The functions may be called from several threads at a time. */
#ifndef TOKENCACHE_H
#define TOKENCACHE_H

#include <stdint.h>

#if defined(__GNUC__)
#define TOKENCACHE_API __attribute__((visibility("default")))
#else
#define TOKENCACHE_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

typedef int32_t tokencache_status;
enum {
  TOKENCACHE_OK = 0,
  TOKENCACHE_INVALID_ARGUMENT = 1, /* nothing was written */
  TOKENCACHE_UNSUPPORTED = 2,      /* not to be had here; nothing was written */
  TOKENCACHE_OUT_OF_MEMORY = 3,    /* no memory to work in; results may be written in part */
  TOKENCACHE_CUDA_ERROR = 4        /* CUDA refused a launch, or tells of an earlier failure */
};

typedef int32_t tokencache_dtype;
enum {
  TOKENCACHE_FLOAT32 = 1,
  TOKENCACHE_FLOAT16 = 2,
  TOKENCACHE_BFLOAT16 = 3,
  TOKENCACHE_FLOAT64 = 4
};

/* Where all memory of a call lies, and who does the work. */
typedef int32_t tokencache_device;
enum {
  TOKENCACHE_CPU = 0, /* host memory; the stream must be NULL, and the work is done on return */
  TOKENCACHE_CUDA = 1 /* device memory; the work is done in the order of a cudaStream_t */
};

/* The version of the library, such as "0.1.0". */
TOKENCACHE_API const char* tokencache_version(void);

/* What was wrong with the last call of this thread that failed, as one sentence
 * "<op>: <argument> must <what>, got <what>"; empty if none has. Valid until the next one fails. */
TOKENCACHE_API const char* tokencache_error(void);

/* How many threads the calls of this process may use, at least 1; 0: one for each processor, as at
 * the start. They are started for each call that is large enough to gain from them. */
TOKENCACHE_API tokencache_status tokencache_set_num_threads(int64_t num_threads);

/* The instruction set that the calls of this process use on the CPU: "portable", "avx2" or
 * "avx512"; NULL: the best that the processor has, as at the start. */
TOKENCACHE_API tokencache_status tokencache_set_cpu_instructions(const char* name);

/* out[b, s] = x[b, indices[b, s]]; an empty slot: 0. */
typedef struct tokencache_gather_rows_args {
  int64_t B, N, S, D;
  tokencache_dtype dtype;

  const void* x;          /* [B, N, D] */
  const int32_t* indices; /* [B, S]; a token may be named several times */
  void* out;              /* [B, S, D], contiguous */

  int64_t stride_x_b, stride_x_n;
  int64_t stride_indices_b;
} tokencache_gather_rows_args;

TOKENCACHE_API tokencache_status tokencache_gather_rows(const tokencache_gather_rows_args* args,
                                                        tokencache_device device, void* stream);

/* cache[b, indices[b, s]] = rows[b, s]; all other rows keep their values. */
typedef struct tokencache_scatter_rows_args {
  int64_t B, N, S, D;
  tokencache_dtype dtype;

  const void* rows;       /* [B, S, D] */
  const int32_t* indices; /* [B, S]; of a token's rows one stays, on CUDA parts of several */
  void* cache;            /* [B, N, D] */

  int64_t stride_rows_b, stride_rows_s;
  int64_t stride_indices_b;
  int64_t stride_cache_b, stride_cache_n;
} tokencache_scatter_rows_args;

TOKENCACHE_API tokencache_status tokencache_scatter_rows(const tokencache_scatter_rows_args* args,
                                                         tokencache_device device, void* stream);

/* One gated summand of a row pass. */
typedef struct tokencache_branch {
  const void* branch; /* [B, N, D] */
  const void* gate;   /* [B, D], or NULL for 1 */

  int64_t stride_branch_b, stride_branch_n;
  int64_t stride_gate_b;
} tokencache_branch;

/* The most branches of one call. */
#define TOKENCACHE_MAX_BRANCHES 256

/* out = x + sum_j gate_j * branch_j, added in this order. */
typedef struct tokencache_add_branches_args {
  int64_t B, N, D;
  tokencache_dtype dtype;

  const void* x; /* [B, N, D] */
  const tokencache_branch* branches;
  int64_t num_branches;
  void* out; /* [B, N, D]; may be x itself, with its strides */

  int64_t stride_x_b, stride_x_n;
  int64_t stride_out_b, stride_out_n;
} tokencache_add_branches_args;

TOKENCACHE_API tokencache_status tokencache_add_branches(const tokencache_add_branches_args* args,
                                                         tokencache_device device, void* stream);

/* packed[b, s] = layer_norm(x[b, indices[b, s]]) * (1 + scale[b]) + shift[b]; an empty slot: 0. */
typedef struct tokencache_gather_modulate_args {
  int64_t B, N, S, D;
  tokencache_dtype dtype;
  double eps; /* added to the variance; at least 0 */

  const void* x;          /* [B, N, D] */
  const int32_t* indices; /* [B, S] */
  const void* shift;      /* [B, D] */
  const void* scale;      /* [B, D] */
  void* packed;           /* [B, S, D], contiguous */

  int64_t stride_x_b, stride_x_n;
  int64_t stride_indices_b;
  int64_t stride_shift_b, stride_scale_b;
} tokencache_gather_modulate_args;

TOKENCACHE_API tokencache_status tokencache_gather_modulate(
    const tokencache_gather_modulate_args* args, tokencache_device device, void* stream);

/* A row pass: out = x + sum_j gate_j * branch_j for all tokens, and for the selected ones
 * packed[b, s] = layer_norm(out[b, indices[b, s]]) * (1 + scale[b]) + shift[b]. */
typedef struct tokencache_row_pass_args {
  int64_t B, N, S, D;
  tokencache_dtype dtype;
  double eps; /* added to the variance; at least 0 */

  const void* x; /* [B, N, D] */
  const tokencache_branch* branches;
  int64_t num_branches;
  const int32_t* indices; /* [B, S] */
  /* [B, N], contiguous, the inverse of indices, each of which names its token once; or NULL. Makes
   * one launch of two on CUDA, and nothing of it is read on the CPU. */
  const int32_t* positions;
  const void* shift; /* [B, D] */
  const void* scale; /* [B, D] */
  void* out;         /* [B, N, D]; may be x itself, with its strides */
  void* packed;      /* [B, S, D], contiguous */

  int64_t stride_x_b, stride_x_n;
  int64_t stride_indices_b;
  int64_t stride_shift_b, stride_scale_b;
  int64_t stride_out_b, stride_out_n;
} tokencache_row_pass_args;

TOKENCACHE_API tokencache_status tokencache_row_pass(const tokencache_row_pass_args* args,
                                                     tokencache_device device, void* stream);

/* For P steps in turn: score = scores / max(norm(scores), 1e-12) + staleness_weight * staleness,
 * the norm over the tokens and only if normalize; the best of every tile x tile square of the grid
 * times 1 + bonus. The num_fresh highest scores are fresh; ties go to the lowest index, NaN ranks
 * below every number. Then staleness is 0 where fresh, and 1 more elsewhere. */
typedef struct tokencache_select_tokens_args {
  int64_t L, B, N, P;
  int64_t max_fresh; /* at most N */
  float staleness_weight;
  int32_t normalize;               /* 0 or 1 */
  int64_t grid_height, grid_width; /* N = height * width, row by row; both 0: no bonus */
  int64_t tile;                    /* at least 1 where there is a grid */
  float bonus;

  const float* scores;      /* [L, B, N], contiguous */
  const int32_t* num_fresh; /* [P, L], contiguous, clamped to [0, max_fresh]; NULL: max_fresh */
  int32_t* staleness;       /* [L, B, N], updated */
  int32_t* indices;         /* [P, L, B, max_fresh], contiguous: ascending, filled up with -1 */
  int32_t* positions;       /* [P, L, B, N], contiguous: the slot of each token, or -1 */
  void* workspace;          /* on CUDA, memory of the device, aligned to 8 bytes; see below */

  int64_t stride_staleness_l, stride_staleness_b;
  int64_t workspace_bytes;
} tokencache_select_tokens_args;

/* How many bytes of workspace these arguments need: none on the CPU, nor where N is small. Until
 * the stream has come by, no other call may work in them. */
TOKENCACHE_API tokencache_status tokencache_select_tokens_workspace(
    const tokencache_select_tokens_args* args, tokencache_device device, int64_t* bytes);

TOKENCACHE_API tokencache_status tokencache_select_tokens(const tokencache_select_tokens_args* args,
                                                          tokencache_device device, void* stream);

/* positions[b, indices[b, s]] = s, and -1 for every other token. */
typedef struct tokencache_invert_indices_args {
  int64_t B, N, S;

  const int32_t* indices; /* [B, S] */
  int32_t* positions;     /* [B, N], contiguous */

  int64_t stride_indices_b;
} tokencache_invert_indices_args;

TOKENCACHE_API tokencache_status tokencache_invert_indices(
    const tokencache_invert_indices_args* args, tokencache_device device, void* stream);

/* out = (1 - weight) * cached + weight * fresh. */
typedef struct tokencache_blend_args {
  int64_t B, N, D;
  tokencache_dtype dtype;

  const void* cached; /* [B, N, D] */
  const void* fresh;  /* [B, N, D] */
  const void* weight; /* [B, N], of float64 if dtype is that, else of float32 */
  void* out;          /* [B, N, D], contiguous */

  int64_t stride_cached_b, stride_cached_n;
  int64_t stride_fresh_b, stride_fresh_n;
  int64_t stride_weight_b, stride_weight_n; /* 0 where tokens share a weight */
} tokencache_blend_args;

TOKENCACHE_API tokencache_status tokencache_blend(const tokencache_blend_args* args,
                                                  tokencache_device device, void* stream);

#ifdef __cplusplus
}
#endif

#endif /* TOKENCACHE_H */
