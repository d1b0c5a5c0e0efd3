#pragma once

#include <cstdint>
#include <cstring>

#if defined(__F16C__)
#include <immintrin.h>
#endif

#include "params.h"

// Rows in any element type as rows of the type that the work is done in: float32, and float64 for
// float64. Compiled once for every instruction set, hence no inline function of a library here: the
// linker would keep one of the copies for all.
namespace tokencache::TOKENCACHE_ISA {

struct Float16 {
  using Work = float;
  uint16_t bits;
};

struct Bfloat16 {
  using Work = float;
  uint16_t bits;
};

template <class T>
struct WorkOf {
  using Type = typename T::Work;
};
template <>
struct WorkOf<float> {
  using Type = float;
};
template <>
struct WorkOf<double> {
  using Type = double;
};
template <class T>
using Work = typename WorkOf<T>::Type;

inline float widen(Bfloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float out;
  std::memcpy(&out, &bits, sizeof out);
  return out;
}

inline Bfloat16 round_to_bfloat16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  // to nearest, ties to even; a NaN stays one
  const uint32_t rounded = bits + 0x7FFF + ((bits >> 16) & 1);
  return {static_cast<uint16_t>((x == x ? rounded : bits | 0x400000) >> 16)};
}

inline void widen_row(const Bfloat16* x, float* out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = widen(x[i]);
}
inline void widen_row(const Float16* x, float* out, int64_t n) {
  int64_t i = 0;
#if defined(__F16C__)
  for (; i + 8 <= n; i += 8) {
    const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(x + i));
    _mm256_storeu_ps(out + i, _mm256_cvtph_ps(bits));
  }
#endif
  for (; i < n; ++i) {
    _Float16 value;
    std::memcpy(&value, x + i, sizeof value);
    out[i] = static_cast<float>(value);
  }
}

inline void round_row(const float* x, Bfloat16* out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = round_to_bfloat16(x[i]);
}
inline void round_row(const float* x, Float16* out, int64_t n) {
  int64_t i = 0;
#if defined(__F16C__)
  for (; i + 8 <= n; i += 8) {
    const __m128i bits = _mm256_cvtps_ph(_mm256_loadu_ps(x + i), _MM_FROUND_TO_NEAREST_INT);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i), bits);
  }
#endif
  for (; i < n; ++i) {
    const auto value = static_cast<_Float16>(x[i]);
    std::memcpy(out + i, &value, sizeof value);
  }
}

template <class T>
const T* row_of(const void* base, int64_t offset) {
  return static_cast<const T*>(base) + offset;
}

// The row in the type that is worked in: itself where it has that type, else written to scratch.
inline const double* read_row(const double* x, double*, int64_t) { return x; }
inline const float* read_row(const float* x, float*, int64_t) { return x; }
template <class T>
const float* read_row(const T* x, float* scratch, int64_t n) {
  widen_row(x, scratch, n);
  return scratch;
}

// Where to work on a row of the result: in place where it has the type that is worked in.
inline double* place_row(double* out, double*) { return out; }
inline float* place_row(float* out, float*) { return out; }
template <class T>
float* place_row(T*, float* scratch) {
  return scratch;
}

// Stores a row that was worked on in its place.
inline void store_row(const double*, double*, int64_t) {}
inline void store_row(const float*, float*, int64_t) {}
template <class T>
void store_row(const float* x, T* out, int64_t n) {
  round_row(x, out, n);
}

// Calls f with a value of the element type.
template <class F>
void with_type(Type type, F f) {
  switch (type) {
    case Type::kFloat64:
      return f(double{});
    case Type::kFloat32:
      return f(float{});
    case Type::kFloat16:
      return f(Float16{});
    case Type::kBfloat16:
      return f(Bfloat16{});
  }
}

}  // namespace tokencache::TOKENCACHE_ISA
