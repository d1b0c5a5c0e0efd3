#pragma once

#include "params.h"

// Entries of VectorLoops; see cpu/vector.h.
namespace tokencache::TOKENCACHE_ISA {

void attention_received(const AttentionReceivedParams& p, int64_t begin, int64_t end);
void attention_entropy(const AttentionEntropyParams& p, int64_t begin, int64_t end);
void head_norms(const HeadNormsParams& p, int64_t begin, int64_t end);
void token_change(const TokenChangeParams& p, int64_t begin, int64_t end);

}  // namespace tokencache::TOKENCACHE_ISA
