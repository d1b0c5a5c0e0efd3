#pragma once

#include "params.h"

// Entries of VectorLoops; see cpu/vector.h.
namespace tokencache::TOKENCACHE_ISA {

void blend(const BlendParams& p, int64_t begin, int64_t end);
void blend_backward(const BlendBackwardParams& p, int64_t begin, int64_t end);

}  // namespace tokencache::TOKENCACHE_ISA
