#include "cpu/rows.h"

#include <algorithm>
#include <cstddef>
#include <cstring>

namespace tokencache {

void gather_rows_cpu(const GatherRowsParams& p, int64_t begin, int64_t end) {
  const auto row_bytes = static_cast<size_t>(p.D * p.element_size);
  const auto* x = static_cast<const char*>(p.x);
  auto* destination = static_cast<char*>(p.out) + begin * p.D * p.element_size;

  for (int64_t row = begin; row < end; ++row, destination += row_bytes) {
    const int64_t batch = row / p.S;
    const int64_t token = p.indices[batch * p.stride_indices_b + row % p.S];
    if (token < 0 || token >= p.N) {
      std::memset(destination, 0, row_bytes);
      continue;
    }
    const int64_t offset = batch * p.stride_x_b + token * p.stride_x_n;
    std::memcpy(destination, x + offset * p.element_size, row_bytes);
  }
}

// A part owns rows of the cache, not slots: a token named twice has one writer, and its last slot
// stays whole. Reading every index of the sample for that costs little beside the rows.
void scatter_rows_cpu(const ScatterRowsParams& p, int64_t begin, int64_t end) {
  const auto row_bytes = static_cast<size_t>(p.D * p.element_size);
  const auto* rows = static_cast<const char*>(p.rows);
  auto* cache = static_cast<char*>(p.cache);

  for (int64_t batch = begin / p.N; batch * p.N < end; ++batch) {
    const int64_t first = std::max<int64_t>(begin - batch * p.N, 0);
    const int64_t last = std::min(end - batch * p.N, p.N);
    for (int64_t slot = 0; slot < p.S; ++slot) {
      const int64_t token = p.indices[batch * p.stride_indices_b + slot];
      if (token < first || token >= last) continue;  // another part's row, or an empty slot
      const int64_t source = batch * p.stride_rows_b + slot * p.stride_rows_s;
      const int64_t target = batch * p.stride_cache_b + token * p.stride_cache_n;
      std::memcpy(cache + target * p.element_size, rows + source * p.element_size, row_bytes);
    }
  }
}

}  // namespace tokencache
