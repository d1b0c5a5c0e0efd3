/* An outsider's C program: of honest calls, one argument after another is spoiled. Every such call
 * is refused with a sentence, and not one byte of memory changes. */
#include <math.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <tokencache.h>

enum { B = 2, N = 6, S = 3, D = 4, L = 2, P = 2, GUARD = 64, SIZE = 2048, NUM_SLOTS = 8 };

typedef union {
  tokencache_gather_rows_args gather_rows;
  tokencache_scatter_rows_args scatter_rows;
  tokencache_add_branches_args add_branches;
  tokencache_gather_modulate_args gather_modulate;
  tokencache_row_pass_args row_pass;
  tokencache_select_tokens_args select_tokens;
  tokencache_invert_indices_args invert_indices;
  tokencache_blend_args blend;
} Args;

/* IN is a pointer that is read, SUM one that may also be the result, OPTIONAL one that may be NULL
 */
typedef enum { LENGTH, STRIDE, GRID, DTYPE, EPS, IN, SUM, OPTIONAL, OUT } Kind;

typedef struct {
  const char* name;
  size_t offset;
  Kind kind;
} Field;

typedef struct {
  const char* name;
  tokencache_status (*call)(const Args* args, tokencache_device device, void* stream);
  Args args;
  const Field* fields;
} Op;

/* a tensor for each slot, all of them between guards */
static union {
  double aligned;
  unsigned char bytes[NUM_SLOTS * SIZE];
} memory, before;
static tokencache_branch branches[1];
static tokencache_branch branches_before[1];
static int num_calls, num_failures;

static void* slot(int number) { return memory.bytes + number * SIZE + GUARD; }

static void expect(int is_true, const Op* op, const char* field, const char* what) {
  ++num_calls;
  if (is_true) return;
  ++num_failures;
  printf("%s, %s: %s; %s\n", op->name, field, what, tokencache_error());
}

static void expect_refused(const Op* op, const Args* args, tokencache_device device, void* stream,
                           const char* field) {
  const tokencache_status status = op->call(args, device, stream);
  const char* sentence = tokencache_error();
  const size_t length = strlen(op->name);
  expect(status == TOKENCACHE_INVALID_ARGUMENT, op, field, "is not refused");
  expect(!strncmp(sentence, op->name, length) && !strncmp(sentence + length, ": ", 2), op, field,
         "the sentence does not begin with the op");
  expect(strstr(sentence, " must ") && strstr(sentence, ", got "), op, field, "not a sentence");
  expect(!memcmp(&memory, &before, sizeof memory), op, field, "memory has changed");
}

#define WRAP(op)                                                                                 \
  static tokencache_status call_##op(const Args* args, tokencache_device device, void* stream) { \
    return tokencache_##op(args == NULL ? NULL : &args->op, device, stream);                     \
  }
WRAP(gather_rows)
WRAP(scatter_rows)
WRAP(add_branches)
WRAP(gather_modulate)
WRAP(row_pass)
WRAP(select_tokens)
WRAP(invert_indices)
WRAP(blend)

/* as many fields on a line as there is room for */
/* clang-format off */
#define F(name, kind) {#name, offsetof(ARGS, name), kind}
#define END {NULL, 0, LENGTH}

#define ARGS tokencache_gather_rows_args
static const Field fields_of_gather_rows[] = {
    F(B, LENGTH), F(N, LENGTH), F(S, LENGTH), F(D, LENGTH), F(dtype, DTYPE), F(x, IN),
    F(indices, IN), F(out, OUT), F(stride_x_b, STRIDE), F(stride_x_n, STRIDE),
    F(stride_indices_b, STRIDE), END};
#undef ARGS

#define ARGS tokencache_scatter_rows_args
static const Field fields_of_scatter_rows[] = {
    F(B, LENGTH), F(N, LENGTH), F(S, LENGTH), F(D, LENGTH), F(dtype, DTYPE), F(rows, IN),
    F(indices, IN), F(cache, OUT), F(stride_rows_b, STRIDE), F(stride_rows_s, STRIDE),
    F(stride_indices_b, STRIDE), F(stride_cache_b, STRIDE), F(stride_cache_n, STRIDE), END};
#undef ARGS

#define ARGS tokencache_add_branches_args
static const Field fields_of_add_branches[] = {
    F(B, LENGTH), F(N, LENGTH), F(D, LENGTH), F(dtype, DTYPE), F(x, SUM), F(branches, IN),
    F(num_branches, LENGTH), F(out, OUT), F(stride_x_b, STRIDE), F(stride_x_n, STRIDE),
    F(stride_out_b, STRIDE), F(stride_out_n, STRIDE), END};
#undef ARGS

#define ARGS tokencache_gather_modulate_args
static const Field fields_of_gather_modulate[] = {
    F(B, LENGTH), F(N, LENGTH), F(S, LENGTH), F(D, LENGTH), F(dtype, DTYPE), F(eps, EPS), F(x, IN),
    F(indices, IN), F(shift, IN), F(scale, IN), F(packed, OUT), F(stride_x_b, STRIDE),
    F(stride_x_n, STRIDE), F(stride_indices_b, STRIDE), F(stride_shift_b, STRIDE),
    F(stride_scale_b, STRIDE), END};
#undef ARGS

#define ARGS tokencache_row_pass_args
static const Field fields_of_row_pass[] = {
    F(B, LENGTH), F(N, LENGTH), F(S, LENGTH), F(D, LENGTH), F(dtype, DTYPE), F(eps, EPS), F(x, SUM),
    F(branches, IN), F(num_branches, LENGTH), F(indices, IN), F(positions, OPTIONAL), F(shift, IN),
    F(scale, IN), F(out, OUT), F(packed, OUT), F(stride_x_b, STRIDE), F(stride_x_n, STRIDE),
    F(stride_indices_b, STRIDE), F(stride_shift_b, STRIDE), F(stride_scale_b, STRIDE),
    F(stride_out_b, STRIDE), F(stride_out_n, STRIDE), END};
#undef ARGS

#define ARGS tokencache_select_tokens_args
static const Field fields_of_select_tokens[] = {
    F(L, LENGTH), F(B, LENGTH), F(N, LENGTH), F(P, LENGTH), F(max_fresh, LENGTH),
    F(grid_height, GRID), F(grid_width, GRID), F(scores, IN), F(num_fresh, OPTIONAL),
    F(staleness, OUT), F(indices, OUT), F(positions, OUT), F(stride_staleness_l, STRIDE),
    F(stride_staleness_b, STRIDE), END};
#undef ARGS

#define ARGS tokencache_invert_indices_args
static const Field fields_of_invert_indices[] = {
    F(B, LENGTH), F(N, LENGTH), F(S, LENGTH), F(indices, IN), F(positions, OUT),
    F(stride_indices_b, STRIDE), END};
#undef ARGS

#define ARGS tokencache_blend_args
static const Field fields_of_blend[] = {
    F(B, LENGTH), F(N, LENGTH), F(D, LENGTH), F(dtype, DTYPE), F(cached, IN), F(fresh, IN),
    F(weight, IN), F(out, OUT), F(stride_cached_b, STRIDE), F(stride_cached_n, STRIDE),
    F(stride_fresh_b, STRIDE), F(stride_fresh_n, STRIDE), F(stride_weight_b, STRIDE),
    F(stride_weight_n, STRIDE), END};
#undef ARGS

/* clang-format on */
#define OP(name) {#name, call_##name, {{0}}, fields_of_##name}
static Op ops[] = {OP(gather_rows), OP(scatter_rows),  OP(add_branches),   OP(gather_modulate),
                   OP(row_pass),    OP(select_tokens), OP(invert_indices), OP(blend)};
enum { NUM_OPS = sizeof ops / sizeof *ops };

static int64_t stride_of(const char* name) {
  const char last = name[strlen(name) - 1];
  const int is_indices = strstr(name, "indices") != NULL;
  if (strstr(name, "staleness")) return last == 'l' ? B * N : N;
  if (strstr(name, "weight")) return last == 'b' ? N : 1;
  if (strstr(name, "shift") || strstr(name, "scale")) return D;
  return last != 'b' ? D : is_indices ? S : strstr(name, "rows") ? S * D : N * D;
}

static int64_t length_of(const char* name) {
  static const char letters[] = "BNSDLP";
  static const int64_t lengths[] = {B, N, S, D, L, P};
  const char* letter = name[1] == '\0' ? strchr(letters, name[0]) : NULL;
  return letter ? lengths[letter - letters] : !strcmp(name, "num_branches") ? 1 : S;
}

static void* at(Args* args, const Field* field) { return (char*)args + field->offset; }

static void put(Args* args, const Field* field, const void* value, size_t size) {
  memcpy(at(args, field), value, size);
}

static void put_number(Args* args, const Field* field, int64_t number) {
  put(args, field, &number, sizeof number);
}

static void put_pointer(Args* args, const Field* field, const void* pointer) {
  put(args, field, &pointer, sizeof pointer);
}

static void* pointer_in(const Args* args, const Field* field) {
  void* pointer;
  memcpy(&pointer, (const char*)args + field->offset, sizeof pointer);
  return pointer;
}

/* One tensor a slot; indices are repeated and far outside [0, N). */
static void make_honest(Op* op) {
  const tokencache_dtype dtype = TOKENCACHE_FLOAT32;
  const Field* field;
  int number = 0;
  for (field = op->fields; field->name; ++field) {
    const int is_height = !strcmp(field->name, "grid_height");
    switch (field->kind) {
      case LENGTH:
        put_number(&op->args, field, length_of(field->name));
        break;
      case STRIDE:
        put_number(&op->args, field, stride_of(field->name));
        break;
      case GRID:
        put_number(&op->args, field, is_height ? 2 : N / 2);
        break;
      case DTYPE:
        put(&op->args, field, &dtype, sizeof dtype);
        break;
      case EPS:
        break;
      default:
        put_pointer(&op->args, field,
                    strcmp(field->name, "branches") ? slot(number++) : (void*)branches);
    }
  }
  if (!strcmp(op->name, "select_tokens")) op->args.select_tokens.tile = 2;
}

static void fill_memory(void) {
  static const int32_t wild[] = {0, 5, 5, -1, INT32_MIN, INT32_MAX, N, 2};
  size_t i;
  for (i = 0; i < sizeof memory; i += sizeof(int32_t)) {
    memcpy(memory.bytes + i, &wild[i / sizeof(int32_t) % 8], sizeof(int32_t));
  }
  /* the last slot, which no op of one branch has to itself */
  branches[0].branch = slot(NUM_SLOTS - 1);
  branches[0].gate = slot(NUM_SLOTS - 1);
  branches[0].stride_branch_b = N * D;
  branches[0].stride_branch_n = D;
  branches[0].stride_gate_b = D;
  before = memory;
  branches_before[0] = branches[0];
}

static void spoil_number(const Op* op, const Field* field, tokencache_device device) {
  static const int64_t hostile[] = {-1, INT64_MIN, INT64_MAX, (int64_t)1 << 52, (int64_t)1 << 62};
  size_t i;
  for (i = 0; i < sizeof hostile / sizeof *hostile; ++i) {
    Args args = op->args;
    put_number(&args, field, hostile[i]);
    expect_refused(op, &args, device, NULL, field->name);
  }
}

static void spoil_dtype(const Op* op, const Field* field, tokencache_device device) {
  static const tokencache_dtype hostile[] = {0, 5, -1, INT32_MAX, INT32_MIN};
  size_t i;
  for (i = 0; i < sizeof hostile / sizeof *hostile; ++i) {
    Args args = op->args;
    put(&args, field, &hostile[i], sizeof *hostile);
    expect_refused(op, &args, device, NULL, field->name);
  }
}

static void spoil_eps(const Op* op, const Field* field, tokencache_device device) {
  const double hostile[] = {-1e-9, -HUGE_VAL, HUGE_VAL, HUGE_VAL - HUGE_VAL};
  size_t i;
  for (i = 0; i < sizeof hostile / sizeof *hostile; ++i) {
    Args args = op->args;
    put(&args, field, &hostile[i], sizeof *hostile);
    expect_refused(op, &args, device, NULL, field->name);
  }
}

/* NULL, one byte off, at the end of the address space, and over every tensor that is written. */
static void spoil_pointer(const Op* op, const Field* field, tokencache_device device) {
  char* honest = pointer_in(&op->args, field);
  const Field* other;
  Args args = op->args;
  if (field->kind != OPTIONAL) {
    put_pointer(&args, field, NULL);
    expect_refused(op, &args, device, NULL, field->name);
  }
  put_pointer(&args, field, honest + 1);
  expect_refused(op, &args, device, NULL, field->name);
  put_pointer(&args, field, (void*)(UINTPTR_MAX - 7));
  expect_refused(op, &args, device, NULL, field->name);
  for (other = op->fields; other->name; ++other) {
    if (other->kind != OUT || other == field) continue;
    /* a sum in place is honest; four bytes further on, it is not */
    put_pointer(&args, field, (char*)pointer_in(&op->args, other) + (field->kind == SUM ? 4 : 0));
    expect_refused(op, &args, device, NULL, field->name);
  }
}

static void spoil_branches(const Op* op, tokencache_device device) {
  static const int64_t strides[] = {-1, INT64_MIN, INT64_MAX};
  size_t i;
  branches[0].branch = NULL;
  expect_refused(op, &op->args, device, NULL, "branches[0].branch");
  branches[0] = branches_before[0];
  branches[0].gate = (const char*)branches[0].gate + 2;
  expect_refused(op, &op->args, device, NULL, "branches[0].gate");
  branches[0] = branches_before[0];
  for (i = 0; i < 3; ++i) {
    branches[0].stride_branch_n = strides[i];
    expect_refused(op, &op->args, device, NULL, "branches[0].stride_branch_n");
    branches[0] = branches_before[0];
    branches[0].stride_gate_b = strides[i];
    expect_refused(op, &op->args, device, NULL, "branches[0].stride_gate_b");
    branches[0] = branches_before[0];
  }
}

static void spoil_one_after_another(const Op* op, tokencache_device device) {
  const Field* field;
  expect_refused(op, NULL, device, NULL, "args");
  for (field = op->fields; field->name; ++field) {
    switch (field->kind) {
      case LENGTH:
      case STRIDE:
      case GRID:
        spoil_number(op, field, device);
        break;
      case DTYPE:
        spoil_dtype(op, field, device);
        break;
      case EPS:
        spoil_eps(op, field, device);
        break;
      default:
        spoil_pointer(op, field, device);
    }
    if (!strcmp(field->name, "branches")) spoil_branches(op, device);
  }
}

static void spoil_device(const Op* op) {
  static const tokencache_device hostile[] = {2, -1, INT32_MAX, INT32_MIN};
  size_t i;
  for (i = 0; i < sizeof hostile / sizeof *hostile; ++i) {
    expect_refused(op, &op->args, hostile[i], NULL, "device");
  }
  expect_refused(op, &op->args, TOKENCACHE_CPU, slot(0), "stream");
}

/* Where there is no GPU, an honest call says so; where there is one, hostile calls are refused. */
static void ask_for_cuda(const Op* op) {
  Args nothing;
  tokencache_status status;
  memset(&nothing, 0, sizeof nothing);
  nothing.gather_rows.dtype = TOKENCACHE_FLOAT32;
  if (tokencache_gather_rows(&nothing.gather_rows, TOKENCACHE_CUDA, NULL) == TOKENCACHE_OK) {
    spoil_one_after_another(op, TOKENCACHE_CUDA);
    return;
  }
  status = op->call(&op->args, TOKENCACHE_CUDA, NULL);
  expect(status == TOKENCACHE_UNSUPPORTED, op, "device", "CUDA is not said to be missing");
  expect(strstr(tokencache_error(), "device must ") && strstr(tokencache_error(), ", got "), op,
         "device", "not a sentence");
  expect(!memcmp(&memory, &before, sizeof memory), op, "device", "memory has changed");
}

/* The indices are wild, and only results change. */
static void call_honestly(const Op* op) {
  const Field* field;
  expect(op->call(&op->args, TOKENCACHE_CPU, NULL) == TOKENCACHE_OK, op, "all", "is refused");
  for (field = op->fields; field->name; ++field) {
    const size_t begin = (size_t)((unsigned char*)pointer_in(&op->args, field) - memory.bytes);
    if (field->kind != OUT) continue;
    expect(memcmp(memory.bytes + begin, before.bytes + begin, SIZE - 2 * GUARD) != 0, op,
           field->name, "is not written");
    memcpy(memory.bytes + begin, before.bytes + begin, SIZE - 2 * GUARD);
  }
  expect(!memcmp(&memory, &before, sizeof memory), op, "all", "a guard has changed");
}

int main(void) {
  int i;
  fill_memory();
  for (i = 0; i < NUM_OPS; ++i) {
    make_honest(&ops[i]);
    spoil_one_after_another(&ops[i], TOKENCACHE_CPU);
    spoil_device(&ops[i]);
    ask_for_cuda(&ops[i]);
    call_honestly(&ops[i]);
  }
  printf("%d of %d expectations failed\n", num_failures, num_calls);
  return num_failures == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
