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
template <class X, class Branch, class T, class Out>
void add_row(const X* x, const Branch* branch, const T* gate, Out* out, int64_t n) {
  for (int64_t d = 0; d < n; d += kLanes<Work<T>>) {
    auto term = load_some(branch + d, n - d);
    if (gate != nullptr) term *= load_some(gate + d, n - d);
    store_some(out + d, load_some(x + d, n - d) + term, n - d);
  }
}

// The mean that is subtracted from a row, and the factor that follows.
template <class W>
struct Moments {
  W mean, rstd;
};

template <class T>
Moments<Work<T>> measure_row(const T* x, int64_t D, const NormParams& norm) {
  using W = Work<T>;
  if (norm.kind == NormKind::kNone) return {0, 1};
  W mean = 0;
  if (norm.kind == NormKind::kLayer) {
    W total[1];
    sum_row(D, total, [&](int64_t d, Vector<W>* some) { some[0] += load_some(x + d, D - d); });
    mean = total[0] / static_cast<W>(D);
  }
  W squares[1];
  sum_row(D, squares, [&](int64_t d, Vector<W>* some) {
    // behind the row there is nothing to centre
    const Vector<W> centred = first_lanes<W>(load_some(x + d, D - d) - mean, D - d);
    some[0] += centred * centred;
  });
  const W variance = squares[0] / static_cast<W>(D) + static_cast<W>(norm.eps);
  return {mean, W{1} / static_cast<W>(__builtin_sqrt(variance))};
}

// The vector of x at d, normalised.
template <class T>
Vector<Work<T>> normalise_some(const T* x, int64_t d, int64_t D, Moments<Work<T>> moments,
                               const NormParams& norm) {
  using W = Work<T>;
  Vector<W> normal = (load_some(x + d, D - d) - moments.mean) * moments.rstd;
  if (norm.weight != nullptr) {
    normal *= static_cast<W>(norm.weight_offset) + load_some(row_of<T>(norm.weight, d), D - d);
  }
  if (norm.bias != nullptr) normal += load_some(row_of<T>(norm.bias, d), D - d);
  return normal;
}

// The row of a token, or null where there is none.
template <class T>
const T* vector_at(const VectorParams& p, int64_t b, int64_t n) {
  return p.data == nullptr ? nullptr : row_of<T>(p.data, p.offset(b, n));
}

template <class T>
void add_branches(const AddBranchesParams& p, int64_t begin, int64_t end) {
  using W = Work<T>;
  Rows<W> rows(2, p.D);
  W* sum = rows[0];  // rounded only after the last branch
  W* normal = rows[1];
  for (int64_t row = begin; row < end; ++row) {
    const int64_t b = row / p.N, n = row % p.N;
    const T* x = row_of<T>(p.x, b * p.stride_x_b + n * p.stride_x_n);
    T* out = static_cast<T*>(p.out) + b * p.stride_out_b + n * p.stride_out_n;
    if (p.num_branches == 0) std::memmove(out, x, p.D * sizeof(T));
    for (int64_t j = 0; j < p.num_branches; ++j) {
      const BranchParams& one = p.branches[j];
      const T* branch = row_of<T>(one.branch, b * one.stride_branch_b + n * one.stride_branch_n);
      const T* gate = vector_at<T>(one.gate, b, n);
      const auto add_to = [&](const auto* so_far, const auto* term) {
        if (j + 1 < p.num_branches) {
          add_row(so_far, term, gate, sum, p.D);
        } else {
          add_row(so_far, term, gate, out, p.D);
        }
      };
      if (one.norm.kind == NormKind::kNone) {
        j == 0 ? add_to(x, branch) : add_to(sum, branch);
        continue;
      }
      const Moments<W> moments = measure_row(branch, p.D, one.norm);
      for (int64_t d = 0; d < p.D; d += kLanes<W>) {
        store_some(normal + d, normalise_some(branch, d, p.D, moments, one.norm), p.D - d);
      }
      j == 0 ? add_to(x, normal) : add_to(sum, normal);
    }
  }
}

template <class T>
void gather_modulate(const ModulateParams& p, int64_t begin, int64_t end) {
  using W = Work<T>;
  const int64_t D = p.D;
  for (int64_t row = begin; row < end; ++row) {
    const int64_t b = row / p.S;
    T* packed = static_cast<T*>(p.packed) + row * D;
    const int64_t token = p.indices[b * p.stride_indices_b + row % p.S];
    if (token < 0 || token >= p.N) {
      std::memset(packed, 0, D * sizeof(T));
      continue;
    }
    const T* x = row_of<T>(p.x, b * p.stride_x_b + token * p.stride_x_n);
    const T* shift = vector_at<T>(p.shift, b, token);
    const T* scale = vector_at<T>(p.scale, b, token);
    const Moments<W> moments = measure_row(x, D, p.norm);
    for (int64_t d = 0; d < D; d += kLanes<W>) {
      Vector<W> y = normalise_some(x, d, D, moments, p.norm);
      if (scale != nullptr) y *= W{1} + load_some(scale + d, D - d);
      if (shift != nullptr) y += load_some(shift + d, D - d);
      store_some(packed + d, y, D - d);
    }
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
