#pragma once

#include "params.h"

// An entry of VectorLoops; see cpu/vector.h.
namespace tokencache::TOKENCACHE_ISA {

void attention(const AttentionParams& p, int64_t begin, int64_t end);

}  // namespace tokencache::TOKENCACHE_ISA
