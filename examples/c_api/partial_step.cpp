// One partial step of a sub-layer on host memory, through the C API: select tokens, add the cached
// branch to all of them, compute the selected ones afresh, and put them into the cache.
#include <tokencache.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <stdexcept>
#include <vector>

namespace {

constexpr int64_t B = 2, N = 64, S = 16, D = 96;

// Every call answers with a status; the sentence says which argument was wrong, and how.
void check(tokencache_status status) {
  if (status != TOKENCACHE_OK) throw std::runtime_error(tokencache_error());
}

void expect(bool is_true, const char* what) {
  if (!is_true) throw std::runtime_error(what);
}

std::vector<float> random_rows(int64_t count) {
  std::vector<float> rows(count);
  for (float& value : rows) value = static_cast<float>(std::rand()) / RAND_MAX - 0.5f;
  return rows;
}

void run() {
  std::vector<float> x = random_rows(B * N * D), cache = random_rows(B * N * D);
  const std::vector<float> gate = random_rows(B * D), shift = random_rows(B * D);
  const std::vector<float> scale = random_rows(B * D), scores = random_rows(B * N);
  const std::vector<float> x_before = x, cache_before = cache;

  // which tokens: the S with the highest score, for each of the B samples
  std::vector<int32_t> staleness(B * N, 3), indices(B * S), positions(B * N);
  tokencache_select_tokens_args select{};
  select.L = 1, select.B = B, select.N = N, select.P = 1;
  select.max_fresh = S;
  select.normalize = 1;
  select.scores = scores.data();
  select.staleness = staleness.data();
  select.indices = indices.data();
  select.positions = positions.data();
  select.stride_staleness_l = B * N, select.stride_staleness_b = N;
  check(tokencache_select_tokens(&select, TOKENCACHE_CPU, nullptr));
  for (int64_t i = 0; i < B * N; ++i) {
    expect(staleness[i] == (positions[i] >= 0 ? 0 : 4), "fresh tokens are not stale, others older");
    if (positions[i] >= 0) {
      expect(indices[i / N * S + positions[i]] == i % N, "positions are the inverse of indices");
    }
  }

  // all tokens: x += gate * cache; the selected ones normalised and modulated, packed
  std::vector<float> packed(B * S * D);
  const tokencache_branch branch{cache.data(), gate.data(), N * D, D, D};
  tokencache_row_pass_args row_pass{};
  row_pass.B = B, row_pass.N = N, row_pass.S = S, row_pass.D = D;
  row_pass.dtype = TOKENCACHE_FLOAT32;
  row_pass.eps = 1e-6;
  row_pass.x = x.data(), row_pass.out = x.data();
  row_pass.branches = &branch;
  row_pass.num_branches = 1;
  row_pass.indices = indices.data();
  row_pass.shift = shift.data(), row_pass.scale = scale.data();
  row_pass.packed = packed.data();
  row_pass.stride_x_b = row_pass.stride_out_b = N * D;
  row_pass.stride_x_n = row_pass.stride_out_n = D;
  row_pass.stride_indices_b = S;
  row_pass.stride_shift_b = row_pass.stride_scale_b = D;
  check(tokencache_row_pass(&row_pass, TOKENCACHE_CPU, nullptr));
  for (int64_t i = 0; i < B * N * D; ++i) {
    const float wanted = x_before[i] + gate[i / (N * D) * D + i % D] * cache_before[i];
    expect(std::abs(x[i] - wanted) < 1e-6f, "the gated branch is added");
  }
  for (int64_t row = 0; row < B * S; ++row) {
    double total = 0;
    for (int64_t d = 0; d < D; ++d) {
      const int64_t channel = row / S * D + d;
      total += (packed[row * D + d] - shift[channel]) / (1 + scale[channel]);
    }
    expect(std::abs(total / D) < 1e-5, "without its modulation, a packed row has mean 0");
  }

  // a model would now run its MLP on the packed rows; here they go into the cache as they are
  tokencache_scatter_rows_args scatter{};
  scatter.B = B, scatter.N = N, scatter.S = S, scatter.D = D;
  scatter.dtype = TOKENCACHE_FLOAT32;
  scatter.rows = packed.data();
  scatter.indices = indices.data();
  scatter.cache = cache.data();
  scatter.stride_rows_b = S * D, scatter.stride_rows_s = D;
  scatter.stride_indices_b = S;
  scatter.stride_cache_b = N * D, scatter.stride_cache_n = D;
  check(tokencache_scatter_rows(&scatter, TOKENCACHE_CPU, nullptr));
  for (int64_t i = 0; i < B * N * D; ++i) {
    if (positions[i / D] < 0) expect(cache[i] == cache_before[i], "stale rows keep their values");
  }

  // and back: the scattered rows are gathered
  std::vector<float> gathered(B * S * D);
  tokencache_gather_rows_args gather{};
  gather.B = B, gather.N = N, gather.S = S, gather.D = D;
  gather.dtype = TOKENCACHE_FLOAT32;
  gather.x = cache.data();
  gather.indices = indices.data();
  gather.out = gathered.data();
  gather.stride_x_b = N * D, gather.stride_x_n = D;
  gather.stride_indices_b = S;
  check(tokencache_gather_rows(&gather, TOKENCACHE_CPU, nullptr));
  expect(gathered == packed, "what was scattered is gathered");

  // a mistake is told, and nothing is written
  gather.S = N + 1;
  expect(tokencache_gather_rows(&gather, TOKENCACHE_CPU, nullptr) == TOKENCACHE_INVALID_ARGUMENT,
         "more slots than tokens are refused");
  std::printf("refused, as it should be: %s\n", tokencache_error());
}

}  // namespace

int main() {
  try {
    run();
  } catch (const std::exception& error) {
    std::printf("failed: %s\n", error.what());
    return 1;
  }
  std::printf("tokencache %s: %ld of %ld tokens selected, passed, scattered and gathered\n",
              tokencache_version(), static_cast<long>(S), static_cast<long>(N));
}
