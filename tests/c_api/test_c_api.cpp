// The C API from C++: for the sanitizers, which see every access (docs/c-api.md). All memory is
// exactly as large as it is said to be.
#include <tokencache.h>

#include <atomic>
#include <climits>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <string>
#include <thread>
#include <vector>

namespace {

std::atomic<int> num_failures{0};

#define EXPECT(condition)                                                                 \
  do {                                                                                    \
    if (!(condition)) {                                                                   \
      ++num_failures;                                                                     \
      std::printf("%s:%d: %s; %s\n", __FILE__, __LINE__, #condition, tokencache_error()); \
    }                                                                                     \
  } while (false)

// Indices as a hostile caller gives them: many outside [0, N), many repeated.
std::vector<int32_t> wild_indices(int64_t count, int64_t N, unsigned seed) {
  const std::vector<int32_t> far{-1, INT32_MIN, INT32_MAX, static_cast<int32_t>(N), -2};
  std::mt19937 random(seed);
  std::vector<int32_t> indices(count);
  for (int32_t& index : indices) {
    index = random() % 3 == 0 ? far[random() % far.size()] : static_cast<int32_t>(random() % N);
  }
  return indices;
}

std::vector<float> ramp(int64_t count, float first = 0) {
  std::vector<float> values(count);
  for (int64_t i = 0; i < count; ++i) values[i] = first + 0.001f * static_cast<float>(i % 1009);
  return values;
}

bool is_live(int32_t index, int64_t N) { return index >= 0 && index < N; }

void move_rows(int64_t B, int64_t N, int64_t S, int64_t D, unsigned seed) {
  const std::vector<float> x = ramp(B * N * D), rows = ramp(B * S * D, 2);
  const std::vector<int32_t> indices = wild_indices(B * S, N, seed);
  std::vector<float> out(B * S * D, NAN), cache = x, wanted = x;

  tokencache_gather_rows_args gather{};
  gather.B = B, gather.N = N, gather.S = S, gather.D = D;
  gather.dtype = TOKENCACHE_FLOAT32;
  gather.x = x.data(), gather.indices = indices.data(), gather.out = out.data();
  gather.stride_x_b = N * D, gather.stride_x_n = D, gather.stride_indices_b = S;
  EXPECT(tokencache_gather_rows(&gather, TOKENCACHE_CPU, nullptr) == TOKENCACHE_OK);
  tokencache_scatter_rows_args scatter{};
  scatter.B = B, scatter.N = N, scatter.S = S, scatter.D = D;
  scatter.dtype = TOKENCACHE_FLOAT32;
  scatter.rows = rows.data(), scatter.indices = indices.data(), scatter.cache = cache.data();
  scatter.stride_rows_b = S * D, scatter.stride_rows_s = D, scatter.stride_indices_b = S;
  scatter.stride_cache_b = N * D, scatter.stride_cache_n = D;
  EXPECT(tokencache_scatter_rows(&scatter, TOKENCACHE_CPU, nullptr) == TOKENCACHE_OK);

  for (int64_t row = 0; row < B * S; ++row) {
    const int32_t token = indices[row];
    for (int64_t d = 0; d < D; ++d) {
      const int64_t place = (row / S * N + token) * D + d;
      EXPECT(out[row * D + d] == (is_live(token, N) ? x[place] : 0.0f));
      if (is_live(token, N)) wanted[place] = rows[row * D + d];
    }
  }
  EXPECT(cache == wanted);
}

// In every type, and in place; the rows of x with a gap behind each.
void pass_rows(tokencache_dtype dtype, int64_t size, int64_t B, int64_t N, int64_t S, int64_t D) {
  const int64_t stride = D + 3, gap = 3 * size;
  const int64_t bytes = (B * N * stride - 3) * size;  // no gap behind the last
  std::vector<char> x(bytes, 1);
  const std::vector<char> branch(B * N * D * size), gate(B * D * size), before = x;
  const std::vector<int32_t> indices = wild_indices(B * S, N, 7);
  std::vector<char> packed(B * S * D * size, 77);
  const std::vector<tokencache_branch> branches{
      {branch.data(), gate.data(), N * D, D, D},
      {branch.data(), nullptr, N * D, D, 0},
      {branch.data(), gate.data(), 0, 0, 0},  // one row for all
  };

  tokencache_row_pass_args args{};
  args.B = B, args.N = N, args.S = S, args.D = D;
  args.dtype = dtype, args.eps = 1e6;  // so that the rounding of the mean does not show
  args.x = x.data(), args.out = x.data(), args.packed = packed.data();
  args.branches = branches.data(), args.num_branches = 3;
  args.indices = indices.data(), args.shift = gate.data(), args.scale = gate.data();
  args.stride_x_b = args.stride_out_b = N * stride;
  args.stride_x_n = args.stride_out_n = stride;
  args.stride_indices_b = S, args.stride_shift_b = args.stride_scale_b = D;
  EXPECT(tokencache_row_pass(&args, TOKENCACHE_CPU, nullptr) == TOKENCACHE_OK);

  // every branch is 0, so x keeps its value, and rows of one number normalise to 0
  EXPECT(x == before);
  EXPECT(packed == std::vector<char>(packed.size(), 0));

  tokencache_blend_args blend{};
  const std::vector<double> weight(B * N, 0.0);
  std::vector<char> out(B * N * D * size, 77);
  blend.B = B, blend.N = N, blend.D = D;
  blend.dtype = dtype;
  blend.cached = x.data(), blend.fresh = branch.data(), blend.weight = weight.data();
  blend.out = out.data();
  blend.stride_cached_b = N * stride, blend.stride_cached_n = stride;
  blend.stride_fresh_b = N * D, blend.stride_fresh_n = D;
  blend.stride_weight_b = N, blend.stride_weight_n = 1;
  EXPECT(tokencache_blend(&blend, TOKENCACHE_CPU, nullptr) == TOKENCACHE_OK);
  for (int64_t row = 0; row < B * N; ++row) {
    EXPECT(!std::memcmp(&out[row * D * size], &x[row * (D * size + gap)], D * size));
  }
}

void select_and_invert(int64_t L, int64_t B, int64_t N, int64_t P, int64_t max_fresh) {
  std::vector<float> scores = ramp(L * B * N);
  scores[0] = NAN, scores[N - 1] = INFINITY;
  std::vector<int32_t> staleness(L * B * N, INT32_MAX);
  std::vector<int32_t> indices(P * L * B * max_fresh), positions(P * L * B * N), num_fresh(P * L);
  for (int64_t i = 0; i < P * L; ++i) num_fresh[i] = i % 2 ? INT32_MIN : INT32_MAX;

  tokencache_select_tokens_args select{};
  select.L = L, select.B = B, select.N = N, select.P = P, select.max_fresh = max_fresh;
  select.staleness_weight = 0.5f, select.normalize = 1, select.bonus = 0.4f;
  select.grid_height = 1, select.grid_width = N, select.tile = INT64_MAX;
  select.scores = scores.data(), select.num_fresh = num_fresh.data();
  select.staleness = staleness.data();
  select.indices = indices.data(), select.positions = positions.data();
  select.stride_staleness_l = B * N, select.stride_staleness_b = N;
  EXPECT(tokencache_select_tokens(&select, TOKENCACHE_CPU, nullptr) == TOKENCACHE_OK);

  std::vector<int32_t> inverse(P * L * B * N, 77);
  tokencache_invert_indices_args invert{};
  invert.B = P * L * B, invert.N = N, invert.S = max_fresh;
  invert.indices = indices.data(), invert.positions = inverse.data();
  invert.stride_indices_b = max_fresh;
  EXPECT(tokencache_invert_indices(&invert, TOKENCACHE_CPU, nullptr) == TOKENCACHE_OK);
  EXPECT(inverse == positions);
}

struct Hostile {
  const char* sentence;
  void (*spoil)(tokencache_scatter_rows_args& args);
};

// A refused call writes nothing, and its sentence names the fault.
void refuse_hostile_arguments() {
  const std::vector<Hostile> cases{
      {"B must be at least 0, got -1", [](auto& args) { args.B = -1; }},
      {"N must be in [0, 2147483647], got -2", [](auto& args) { args.N = -2; }},
      {"N must be in [0, 2147483647], got 9223372036854775807",
       [](auto& args) { args.N = INT64_MAX; }},
      {"S must be at most N = 5, got 6", [](auto& args) { args.S = 6; }},
      {"D must be at least 0, got -9223372036854775808", [](auto& args) { args.D = INT64_MIN; }},
      {"dtype must be one of TOKENCACHE_FLOAT32, FLOAT16, BFLOAT16 and FLOAT64, got 0",
       [](auto& args) { args.dtype = 0; }},
      {"cache must not be NULL, got NULL", [](auto& args) { args.cache = nullptr; }},
      {"rows must not be NULL, got NULL", [](auto& args) { args.rows = nullptr; }},
      {"indices must not be NULL, got NULL", [](auto& args) { args.indices = nullptr; }},
      {"cache must be aligned to 4 bytes, got ",
       [](auto& args) { args.cache = static_cast<char*>(args.cache) + 1; }},
      {"cache must have strides of at least 0, got (-20, 4)",
       [](auto& args) { args.stride_cache_b = -20; }},
      {"cache must have rows that do not overlap, got sizes (2, 5, 4) with strides (20, 3, 1)",
       [](auto& args) { args.stride_cache_n = 3; }},
      {"cache must have rows that do not overlap, got sizes (2, 5, 4) with strides (19, 4, 1)",
       [](auto& args) { args.stride_cache_b = 19; }},
      {"cache must span less than 2^52 bytes", [](auto& args) { args.stride_cache_b = INT64_MAX; }},
      {"rows must span less than 2^52 bytes", [](auto& args) { args.stride_rows_s = INT64_MAX; }},
      {"cache must span less than 2^52 bytes", [](auto& args) { args.D = INT64_MAX; }},
      {"cache must span less than 2^52 bytes", [](auto& args) { args.B = INT64_MAX; }},
      {"rows must not overlap cache, which is written", [](auto& args) { args.rows = args.cache; }},
      {"indices must not overlap cache, which is written",
       [](auto& args) { args.indices = static_cast<const int32_t*>(args.cache) + 39; }},
  };
  const int64_t B = 2, N = 5, S = 3, D = 4;
  const std::vector<float> rows = ramp(B * S * D);
  const std::vector<int32_t> indices(B * S, 1);
  std::vector<float> cache(B * N * D, 1.5f);
  const std::vector<float> before = cache;
  for (const Hostile& hostile : cases) {
    tokencache_scatter_rows_args args{};
    args.B = B, args.N = N, args.S = S, args.D = D;
    args.dtype = TOKENCACHE_FLOAT32;
    args.rows = rows.data(), args.indices = indices.data(), args.cache = cache.data();
    args.stride_rows_b = S * D, args.stride_rows_s = D, args.stride_indices_b = S;
    args.stride_cache_b = N * D, args.stride_cache_n = D;
    hostile.spoil(args);
    EXPECT(tokencache_scatter_rows(&args, TOKENCACHE_CPU, nullptr) == TOKENCACHE_INVALID_ARGUMENT);
    EXPECT(std::string(tokencache_error()).rfind("scatter_rows: ", 0) == 0);
    EXPECT(std::string(tokencache_error()).find(hostile.sentence) == 14);
    EXPECT(cache == before);
  }
}

// Options beside the tensors, with nothing to work on.
void refuse_hostile_options() {
  for (const double eps : {-1.0, double{INFINITY}, double{NAN}}) {
    tokencache_gather_modulate_args args{};
    args.dtype = TOKENCACHE_FLOAT32, args.eps = eps;
    EXPECT(tokencache_gather_modulate(&args, TOKENCACHE_CPU, nullptr) ==
           TOKENCACHE_INVALID_ARGUMENT);
  }
  for (const int64_t num_branches : {int64_t{-1}, int64_t{257}, INT64_MAX, int64_t{1}}) {
    tokencache_add_branches_args args{};
    args.dtype = TOKENCACHE_FLOAT32, args.num_branches = num_branches;  // and no branches
    EXPECT(tokencache_add_branches(&args, TOKENCACHE_CPU, nullptr) == TOKENCACHE_INVALID_ARGUMENT);
  }
  for (const int64_t side : {int64_t{-3}, int64_t{0}, int64_t{3}, INT64_MAX, INT64_MIN}) {
    tokencache_select_tokens_args args{};
    args.N = 6, args.grid_height = side, args.grid_width = 2, args.tile = side == 3 ? 0 : 1;
    EXPECT(tokencache_select_tokens(&args, TOKENCACHE_CPU, nullptr) == TOKENCACHE_INVALID_ARGUMENT);
  }
  for (const int64_t max_fresh : {int64_t{-1}, int64_t{7}}) {
    tokencache_select_tokens_args args{};
    args.N = 6, args.max_fresh = max_fresh;
    EXPECT(tokencache_select_tokens(&args, TOKENCACHE_CPU, nullptr) == TOKENCACHE_INVALID_ARGUMENT);
  }
}

void refuse_what_is_not_there() {
  tokencache_gather_rows_args args{};
  args.dtype = TOKENCACHE_FLOAT32;
  int anything = 0;
  EXPECT(tokencache_gather_rows(nullptr, TOKENCACHE_CPU, nullptr) == TOKENCACHE_INVALID_ARGUMENT);
  EXPECT(tokencache_gather_rows(&args, 99, nullptr) == TOKENCACHE_INVALID_ARGUMENT);
  EXPECT(tokencache_gather_rows(&args, TOKENCACHE_CPU, &anything) == TOKENCACHE_INVALID_ARGUMENT);
  EXPECT(tokencache_set_num_threads(-1) == TOKENCACHE_INVALID_ARGUMENT);
  EXPECT(tokencache_set_cpu_instructions("sse9") == TOKENCACHE_UNSUPPORTED);
  EXPECT(tokencache_gather_rows(&args, TOKENCACHE_CPU, nullptr) == TOKENCACHE_OK);  // empty
}

// Columns of one array may be read and written side by side.
void scatter_between_columns() {
  const int64_t N = 6, D = 4, stride = 3 * D;
  std::vector<float> both = ramp(N * stride - D);
  const std::vector<float> before = both;
  const std::vector<int32_t> indices{5, 0, 3};
  tokencache_scatter_rows_args args{};
  args.B = 1, args.N = N, args.S = 3, args.D = D;
  args.dtype = TOKENCACHE_FLOAT32;
  args.indices = indices.data();
  args.rows = both.data(), args.stride_rows_s = stride;
  args.cache = both.data() + D, args.stride_cache_n = stride;
  EXPECT(tokencache_scatter_rows(&args, TOKENCACHE_CPU, nullptr) == TOKENCACHE_OK);
  for (int64_t s = 0; s < 3; ++s) {
    EXPECT(!std::memcmp(&both[indices[s] * stride + D], &before[s * stride], D * sizeof(float)));
  }
  args.cache = both.data() + D - 1;
  EXPECT(tokencache_scatter_rows(&args, TOKENCACHE_CPU, nullptr) == TOKENCACHE_INVALID_ARGUMENT);
}

// Calls from several threads, each of which may use several, with an error of its own.
void call_from_many_threads() {
  std::vector<std::thread> callers;
  for (int caller = 0; caller < 3; ++caller) {
    callers.emplace_back([caller] {
      tokencache_gather_rows_args args{};
      args.B = -100 - caller;
      EXPECT(tokencache_gather_rows(&args, TOKENCACHE_CPU, nullptr) == TOKENCACHE_INVALID_ARGUMENT);
      tokencache_set_num_threads(2 + caller);
      move_rows(2, 500, 300, 1200, static_cast<unsigned>(caller));
      const std::string own = "got " + std::to_string(-100 - caller);
      EXPECT(std::string(tokencache_error()).find(own) != std::string::npos);
    });
  }
  for (std::thread& caller : callers) caller.join();
}

}  // namespace

int main() {
  tokencache_set_num_threads(4);
  EXPECT(tokencache_error()[0] == '\0');
  move_rows(3, 7, 5, 9, 0);
  move_rows(1, 700, 650, 900, 1);  // enough for several threads
  for (const char* instructions : {"avx512", "avx2", "portable"}) {
    if (tokencache_set_cpu_instructions(instructions) != TOKENCACHE_OK) continue;
    pass_rows(TOKENCACHE_FLOAT32, 4, 2, 7, 3, 13);
    pass_rows(TOKENCACHE_FLOAT16, 2, 2, 7, 3, 13);
    pass_rows(TOKENCACHE_BFLOAT16, 2, 2, 7, 3, 13);
    pass_rows(TOKENCACHE_FLOAT64, 8, 1, 7, 7, 13);
    pass_rows(TOKENCACHE_BFLOAT16, 2, 2, 300, 150, 1153);  // several threads
    select_and_invert(2, 3, 37, 3, 11);
    select_and_invert(3, 2, 1021, 4, 300);  // several threads
  }
  EXPECT(tokencache_set_cpu_instructions(nullptr) == TOKENCACHE_OK);
  scatter_between_columns();
  refuse_hostile_arguments();
  refuse_hostile_options();
  refuse_what_is_not_there();
  call_from_many_threads();
  std::printf("%s\n", num_failures == 0 ? "all is well" : "failed");
  return num_failures == 0 ? 0 : 1;
}
