#pragma once

#include "params.h"

// Entries of VectorLoops; see cpu/vector.h.
namespace tokencache::TOKENCACHE_ISA {

void finish_heads(const FinishHeadsParams& p, int64_t begin, int64_t end);

}  // namespace tokencache::TOKENCACHE_ISA
