#pragma once

#include "params.h"

// The loops that are worth vector instructions. They are compiled once for every instruction set,
// and the best one that the processor has is chosen at run time. Each does the part [begin, end) of
// its op, so that the caller brings the threads.
namespace tokencache {

// A part of attention and of its entropy: keys are laid out once for so many queries.
constexpr int64_t kBlockQueries = 96;

struct VectorLoops {
  const char* name;  // of the instruction set

  // out = x + sum_j gate_j * norm_j(branch_j); the part counts the B * N rows.
  void (*add_branches)(const AddBranchesParams& p, int64_t begin, int64_t end);

  // packed[b, s] = norm(x[b, indices[b, s]]) * (1 + scale) + shift, an empty slot: 0;
  // the part counts the B * S rows of packed.
  void (*gather_modulate)(const ModulateParams& p, int64_t begin, int64_t end);

  // out = (1 - weight) * cached + weight * fresh; the part counts the B * N rows.
  void (*blend)(const BlendParams& p, int64_t begin, int64_t end);

  // The gradients of that; the part counts the B * N rows.
  void (*blend_backward)(const BlendBackwardParams& p, int64_t begin, int64_t end);

  // rows = rotate(norm(rows)), each head of its own; the part counts the B * S rows.
  void (*finish_heads)(const FinishHeadsParams& p, int64_t begin, int64_t end);

  // out = softmax(softmax_scale * query @ key.T) @ value, the log-sum-exp and, where it is asked
  // for, the entropy; the part counts the B * H * ceil(S / kBlockQueries) blocks of queries.
  void (*attention)(const AttentionParams& p, int64_t begin, int64_t end);

  // out[b, h] = the mean over the queries of the map's rows; the part counts the B * H heads.
  void (*attention_received)(const AttentionReceivedParams& p, int64_t begin, int64_t end);

  // out[b, s] = -sum_n p log p, p the mean over the heads of the map's row; the part counts the
  // B * ceil(S / kBlockQueries) blocks of queries.
  void (*attention_entropy)(const AttentionEntropyParams& p, int64_t begin, int64_t end);

  // out[b, n] = mean_h |x[b, n, h]|; the part counts the B * N rows.
  void (*head_norms)(const HeadNormsParams& p, int64_t begin, int64_t end);

  // out[b, n] = 1 - cos(new, old), or |new - old|_1 / |old|_1; the part counts the B * N rows.
  void (*token_change)(const TokenChangeParams& p, int64_t begin, int64_t end);
};

namespace portable {
extern const VectorLoops loops;
}
namespace avx2 {
extern const VectorLoops loops;
}
namespace avx512 {
extern const VectorLoops loops;
}

// The loops in use: the best for this processor, until others are chosen.
const VectorLoops& vector_loops();

// Chooses the loops of an instruction set; false where there are none or the processor lacks it.
bool use_vector_loops(const char* name);

}  // namespace tokencache
