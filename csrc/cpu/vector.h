#pragma once

#include "params.h"

// The loops that are worth vector instructions. They are compiled once for every instruction set,
// and the best one that the processor has is chosen at run time. Each does the part [begin, end) of
// its op, so that the caller brings the threads.
namespace tokencache {

struct VectorLoops {
  const char* name;  // of the instruction set

  // out = x + sum_j gate_j * branch_j; the part counts the B * N rows.
  void (*add_branches)(const AddBranchesParams& p, int64_t begin, int64_t end);

  // packed[b, s] = layer_norm(x[b, indices[b, s]]) * (1 + scale[b]) + shift[b], an empty slot: 0;
  // the part counts the B * S rows of packed.
  void (*gather_modulate)(const ModulateParams& p, int64_t begin, int64_t end);

  // out = (1 - weight) * cached + weight * fresh; the part counts the B * N rows.
  void (*blend)(const BlendParams& p, int64_t begin, int64_t end);

  // The gradients of that; the part counts the B * N rows.
  void (*blend_backward)(const BlendBackwardParams& p, int64_t begin, int64_t end);
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

// The loops for this processor.
const VectorLoops& vector_loops();

}  // namespace tokencache
