// Compiled once for every instruction set; TOKENCACHE_ISA names this one.
#include "cpu/blend.h"

#include "cpu/number.h"
#include "cpu/scratch.h"

namespace tokencache::TOKENCACHE_ISA {
namespace {

template <class T>
const T* row_of(const void* base, int64_t b, int64_t n, int64_t stride_b, int64_t stride_n) {
  return static_cast<const T*>(base) + b * stride_b + n * stride_n;
}

template <class T>
void blend_rows(const BlendParams& p, int64_t begin, int64_t end) {
  using W = Work<T>;
  Rows<W> scratch(3, p.D);
  for (int64_t row = begin; row < end; ++row) {
    const int64_t b = row / p.N, n = row % p.N;
    const W w = *row_of<W>(p.weight, b, n, p.stride_weight_b, p.stride_weight_n);
    const T* cached_row = row_of<T>(p.cached, b, n, p.stride_cached_b, p.stride_cached_n);
    const T* fresh_row = row_of<T>(p.fresh, b, n, p.stride_fresh_b, p.stride_fresh_n);
    const W* cached = read_row(cached_row, scratch[0], p.D);
    const W* fresh = read_row(fresh_row, scratch[1], p.D);
    T* out_row = static_cast<T*>(p.out) + row * p.D;
    W* out = place_row(out_row, scratch[2]);
#pragma omp simd
    for (int64_t d = 0; d < p.D; ++d) out[d] = (W{1} - w) * cached[d] + w * fresh[d];
    store_row(out, out_row, p.D);
  }
}

// out = factor * grad, stored.
template <class T, class W>
void scale_row(const W* grad, W factor, T* out_row, W* scratch, int64_t width) {
  W* out = place_row(out_row, scratch);
#pragma omp simd
  for (int64_t d = 0; d < width; ++d) out[d] = factor * grad[d];
  store_row(out, out_row, width);
}

template <class T>
void blend_backward_rows(const BlendBackwardParams& p, int64_t begin, int64_t end) {
  using W = Work<T>;
  const BlendParams& f = p.forward;
  Rows<W> scratch(4, f.D);
  for (int64_t row = begin; row < end; ++row) {
    const int64_t b = row / f.N, n = row % f.N;
    const W w = *row_of<W>(f.weight, b, n, f.stride_weight_b, f.stride_weight_n);
    const T* grad_row = row_of<T>(p.grad, b, n, p.stride_grad_b, p.stride_grad_n);
    const T* cached_row = row_of<T>(f.cached, b, n, f.stride_cached_b, f.stride_cached_n);
    const T* fresh_row = row_of<T>(f.fresh, b, n, f.stride_fresh_b, f.stride_fresh_n);
    const W* grad = read_row(grad_row, scratch[0], f.D);
    const W* cached = read_row(cached_row, scratch[1], f.D);
    const W* fresh = read_row(fresh_row, scratch[2], f.D);
    W total = 0;
#pragma omp simd reduction(+ : total)
    for (int64_t d = 0; d < f.D; ++d) total += (fresh[d] - cached[d]) * grad[d];
    static_cast<W*>(p.grad_weight)[row] = total;
    scale_row(grad, w, static_cast<T*>(p.grad_fresh) + row * f.D, scratch[3], f.D);
    if (p.grad_cached != nullptr) {
      scale_row(grad, W{1} - w, static_cast<T*>(p.grad_cached) + row * f.D, scratch[3], f.D);
    }
  }
}

}  // namespace

void blend(const BlendParams& p, int64_t begin, int64_t end) {
  with_type(p.type, [&](auto one) { blend_rows<decltype(one)>(p, begin, end); });
}

void blend_backward(const BlendBackwardParams& p, int64_t begin, int64_t end) {
  with_type(p.forward.type, [&](auto one) { blend_backward_rows<decltype(one)>(p, begin, end); });
}

}  // namespace tokencache::TOKENCACHE_ISA
