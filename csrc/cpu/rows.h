#pragma once

#include "params.h"

// Each function does the part [begin, end) of its op, so that the caller brings the threads.
namespace tokencache {

// out[b, s] = x[b, indices[b, s]], an empty slot: 0; the part counts the B * S rows of out.
void gather_rows_cpu(const GatherRowsParams& p, int64_t begin, int64_t end);

// cache[b, indices[b, s]] = rows[b, s]; the part counts the B * N rows of the cache.
void scatter_rows_cpu(const ScatterRowsParams& p, int64_t begin, int64_t end);

}  // namespace tokencache
