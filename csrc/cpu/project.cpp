// Compiled once for every instruction set; TOKENCACHE_ISA names this one.
#include "cpu/project.h"

#include "cpu/number.h"
#include "cpu/scratch.h"

namespace tokencache::TOKENCACHE_ISA {
namespace {

// The parameters of a norm; both may be null.
template <class W>
struct Affine {
  const W *weight, *bias;
};

template <class T, class W>
const W* read_whole(const void* row, W* scratch, int64_t n) {
  return row == nullptr ? nullptr : read_row(static_cast<const T*>(row), scratch, n);
}

// out = (x - mean) / deviation * weight + bias, or without the mean; out may be x.
template <class W>
void normalise(const W* x, W* out, int64_t E, Affine<W> affine, bool is_layer_norm, W eps) {
  W mean = 0, squares = 0;
  if (is_layer_norm) {
#pragma omp simd reduction(+ : mean)
    for (int64_t e = 0; e < E; ++e) mean += x[e];
    mean /= static_cast<W>(E);
  }
#pragma omp simd reduction(+ : squares)
  for (int64_t e = 0; e < E; ++e) squares += (x[e] - mean) * (x[e] - mean);
  const W rstd = W{1} / static_cast<W>(__builtin_sqrt(squares / static_cast<W>(E) + eps));
#pragma omp simd
  for (int64_t e = 0; e < E; ++e) out[e] = (x[e] - mean) * rstd * affine.weight[e];
  if (affine.bias == nullptr) return;
#pragma omp simd
  for (int64_t e = 0; e < E; ++e) out[e] += affine.bias[e];
}

// Turns the pairs (x[2i], x[2i + 1]) by the angle in column 2i; out may be x.
template <class W>
void rotate(const W* x, W* out, int64_t E, const W* cosine, const W* sine) {
  for (int64_t e = 0; e < E; e += 2) {
    const W even = x[e], odd = x[e + 1];
    out[e] = even * cosine[e] - odd * sine[e];
    out[e + 1] = odd * cosine[e] + even * sine[e];
  }
}

template <class T>
void finish_heads_of(const FinishHeadsParams& p, int64_t begin, int64_t end) {
  using W = Work<T>;
  Rows<W> scratch(3, p.E);
  const Affine<W> affine = {read_whole<T>(p.weight, scratch[0], p.E),
                            read_whole<T>(p.bias, scratch[1], p.E)};
  const W *cosine = static_cast<const W*>(p.cosine), *sine = static_cast<const W*>(p.sine);
  for (int64_t row = begin; row < end; ++row) {
    const int64_t b = row / p.S, slot = row % p.S;
    const int64_t token = p.indices ? p.indices[b * p.stride_indices_b + slot] : slot;
    // an empty slot is turned like token 0
    const int64_t position = token >= 0 && token < p.N ? token : 0;
    const int64_t offset = b * p.stride_table_b + position * p.stride_table_t;
    T* head = static_cast<T*>(p.rows) + row * p.H * p.E;
    for (int64_t h = 0; h < p.H; ++h, head += p.E) {
      const W* x = read_row(head, scratch[2], p.E);
      W* out = place_row(head, scratch[2]);
      if (affine.weight) {
        normalise(x, out, p.E, affine, p.is_layer_norm, static_cast<W>(p.eps));
        x = out;
      }
      if (cosine) rotate(x, out, p.E, cosine + offset, sine + offset);
      store_row(out, head, p.E);
    }
  }
}

}  // namespace

void finish_heads(const FinishHeadsParams& p, int64_t begin, int64_t end) {
  with_type(p.type, [&](auto one) { finish_heads_of<decltype(one)>(p, begin, end); });
}

}  // namespace tokencache::TOKENCACHE_ISA
