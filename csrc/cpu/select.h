#pragma once

#include "params.h"

namespace tokencache {

// For each step in turn: combine the scores, take the top tokens (ties go to the lowest index, NaN
// ranks below everything), update the staleness. The part counts the L * B rows of scores.
void select_tokens_cpu(const SelectParams& p, int64_t begin, int64_t end);

// positions[b, indices[b, s]] = s, and -1 for the others; the part counts the B samples.
void invert_indices_cpu(const InvertIndicesParams& p, int64_t begin, int64_t end);

}  // namespace tokencache
