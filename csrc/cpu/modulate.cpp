// Compiled once for every instruction set; TOKENCACHE_ISA names this one.
#include "cpu/attention.h"
#include "cpu/blend.h"
#include "cpu/number.h"
#include "cpu/project.h"
#include "cpu/scratch.h"
#include "cpu/statistics.h"
#include "cpu/vector.h"

namespace tokencache::TOKENCACHE_ISA {
namespace {

// out = x + [gate *] branch; out may be x.
template <class W>
void add_row(W* out, const W* x, const W* branch, const W* gate, int64_t n) {
  if (gate == nullptr) {
#pragma omp simd
    for (int64_t d = 0; d < n; ++d) out[d] = x[d] + branch[d];
  } else {
#pragma omp simd
    for (int64_t d = 0; d < n; ++d) out[d] = x[d] + gate[d] * branch[d];
  }
}

template <class T>
void add_branches(const AddBranchesParams& p, int64_t begin, int64_t end) {
  using W = Work<T>;
  Rows<W> scratch(3, p.D);  // a sum, what is added to it, a factor
  for (int64_t row = begin; row < end; ++row) {
    const int64_t b = row / p.N, n = row % p.N;
    T* out = static_cast<T*>(p.out) + b * p.stride_out_b + n * p.stride_out_n;
    W* sum = place_row(out, scratch[0]);
    const T* x = row_of<T>(p.x, b * p.stride_x_b + n * p.stride_x_n);
    const W* so_far = read_row(x, scratch[0], p.D);
    for (int64_t j = 0; j < p.num_branches; ++j) {
      const BranchParams& one = p.branches[j];
      const T* branch = row_of<T>(one.branch, b * one.stride_branch_b + n * one.stride_branch_n);
      const T* gate = row_of<T>(one.gate, b * one.stride_gate_b);
      const W* factor = one.gate ? read_row(gate, scratch[2], p.D) : nullptr;
      add_row(sum, so_far, read_row(branch, scratch[1], p.D), factor, p.D);
      so_far = sum;
    }
    if (so_far != sum) std::memmove(sum, so_far, p.D * sizeof(W));
    store_row(sum, out, p.D);
  }
}

template <class T>
void gather_modulate(const ModulateParams& p, int64_t begin, int64_t end) {
  using W = Work<T>;
  Rows<W> scratch(3, p.D);  // a sum, what is added to it, a factor
  for (int64_t row = begin; row < end; ++row) {
    const int64_t b = row / p.S;
    T* packed = static_cast<T*>(p.packed) + row * p.D;
    const int64_t token = p.indices[b * p.stride_indices_b + row % p.S];
    if (token < 0 || token >= p.N) {
      std::memset(packed, 0, p.D * sizeof(T));
      continue;
    }
    const W* x = read_row(row_of<T>(p.x, b * p.stride_x_b + token * p.stride_x_n), scratch[0], p.D);
    const W* shift = read_row(row_of<T>(p.shift, b * p.stride_shift_b), scratch[1], p.D);
    const W* scale = read_row(row_of<T>(p.scale, b * p.stride_scale_b), scratch[2], p.D);
    W* out = place_row(packed, scratch[0]);

    W total = 0;
#pragma omp simd reduction(+ : total)
    for (int64_t d = 0; d < p.D; ++d) total += x[d];
    const W mean = total / static_cast<W>(p.D);
    W squares = 0;
#pragma omp simd reduction(+ : squares)
    for (int64_t d = 0; d < p.D; ++d) squares += (x[d] - mean) * (x[d] - mean);
    const W variance = squares / static_cast<W>(p.D) + static_cast<W>(p.eps);
    const W rstd = W{1} / static_cast<W>(__builtin_sqrt(variance));
#pragma omp simd
    for (int64_t d = 0; d < p.D; ++d) out[d] = (x[d] - mean) * rstd * (W{1} + scale[d]) + shift[d];
    store_row(out, packed, p.D);
  }
}

void add_branches_any(const AddBranchesParams& p, int64_t begin, int64_t end) {
  with_type(p.type, [&](auto one) { add_branches<decltype(one)>(p, begin, end); });
}

void gather_modulate_any(const ModulateParams& p, int64_t begin, int64_t end) {
  with_type(p.type, [&](auto one) { gather_modulate<decltype(one)>(p, begin, end); });
}

#define TOKENCACHE_NAME(isa) TOKENCACHE_QUOTE(isa)
#define TOKENCACHE_QUOTE(isa) #isa

}  // namespace

extern const VectorLoops loops{
    .name = TOKENCACHE_NAME(TOKENCACHE_ISA),
    .add_branches = add_branches_any,
    .gather_modulate = gather_modulate_any,
    .blend = blend,
    .blend_backward = blend_backward,
    .finish_heads = finish_heads,
    .attention = attention,
    .attention_received = attention_received,
    .attention_entropy = attention_entropy,
    .head_norms = head_norms,
    .token_change = token_change,
};

}  // namespace tokencache::TOKENCACHE_ISA
