#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "cpu/simd.h"
#include "params.h"

// Elements of any type as vectors, and as rows, of the type that the work is done in: float32, and
// float64 for float64. Compiled once for every instruction set, hence no inline function of a
// library here: the linker would keep one of the copies for all.
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

// As many elements, in their own type, as a vector of the working type has lanes. The compiler
// knows their conversions, but not the instructions for 16 bits: these are named.
template <class T>
struct RawOf {
  using Element = std::conditional_t<sizeof(T) == 2, uint16_t, T>;
  typedef Element Type __attribute__((vector_size(kLanes<Work<T>> * sizeof(T))));
};
template <class T>
using Raw = typename RawOf<T>::Type;

// Halves without an instruction for them, by their bits: of a float, where it is no number of a
// half's, infinity or NaN. No float here is denormal, so that a processor may flush those.
typedef uint32_t FloatBits __attribute__((vector_size(kVectorBytes)));

inline Vector<float> half_to_float(FloatBits half) {
  const FloatBits size = half & 0x7FFF;
  const FloatBits normal = (size << 13) + (uint32_t{127 - 15} << 23);
  const FloatBits small = (FloatBits)(__builtin_convertvector(size, Vector<float>) * 0x1p-24f);
  const FloatBits special = (size << 13) | 0x7F800000;
  const FloatBits bits = size < 0x400 ? small : size < 0x7C00 ? normal : special;
  return (Vector<float>)(bits | (half & 0x8000) << 16);
}
inline FloatBits float_to_half(Vector<float> x) {
  const FloatBits bits = (FloatBits)x, size = bits & 0x7FFFFFFF;
  // to nearest, ties to even; a number that rounds up to infinity does so by its carry
  const FloatBits normal = (size - (uint32_t{127 - 15} << 23) + 0xFFF + ((size >> 13) & 1)) >> 13;
  // the unit of the denormal halves is that of floats from 0.5 on
  const FloatBits small = (FloatBits)((Vector<float>)size + 0.5f) - 0x3F000000;
  const FloatBits nan = 0x7E00 | (size >> 13 & 0x3FF);
  const FloatBits half = size < 0x38800000   ? small
                         : size < 0x47800000 ? normal
                         : size > 0x7F800000 ? nan
                                             : (size & 0) + 0x7C00;
  return half | (bits >> 16 & 0x8000);
}

inline Vector<double> widen(double, Raw<double> x) { return x; }
inline Vector<float> widen(float, Raw<float> x) { return x; }
inline Vector<float> widen(Bfloat16, Raw<Bfloat16> x) {
#if defined(__AVX512F__)
  return (Vector<float>)((VectorBits<float>)_mm512_maskz_cvtepu16_epi32(-1, (__m256i)x) << 16);
#elif defined(__AVX2__)
  return (Vector<float>)((VectorBits<float>)_mm256_cvtepu16_epi32((__m128i)x) << 16);
#elif defined(__SSE2__)
  // 16 zeros below each
  return (Vector<float>)_mm_unpacklo_epi16(__m128i{}, _mm_loadl_epi64((const __m128i*)&x));
#else
  return (Vector<float>)(__builtin_convertvector(x, FloatBits) << 16);
#endif
}
inline Vector<float> widen(Float16, Raw<Float16> x) {
#if defined(__AVX512F__)
  return (Vector<float>)_mm512_maskz_cvtph_ps(-1, (__m256i)x);
#elif defined(__F16C__)
  return (Vector<float>)_mm256_cvtph_ps((__m128i)x);
#elif defined(__SSE2__)
  return half_to_float(
      (FloatBits)_mm_unpacklo_epi16(_mm_loadl_epi64((const __m128i*)&x), __m128i{}));
#else
  return half_to_float(__builtin_convertvector(x, FloatBits));
#endif
}

inline Raw<double> narrow(double, Vector<double> x) { return x; }
inline Raw<float> narrow(float, Vector<float> x) { return x; }
inline Raw<Bfloat16> narrow(Bfloat16, Vector<float> x) {
  // to nearest, ties to even; a NaN stays one
  const FloatBits bits = (FloatBits)x;
  const FloatBits rounded = (x == x ? bits + 0x7FFF + ((bits >> 16) & 1) : bits | 0x400000) >> 16;
#if defined(__AVX512F__)
  return (Raw<Bfloat16>)_mm512_maskz_cvtepi32_epi16(-1, (__m512i)rounded);
#elif defined(__AVX2__)
  const auto lower = (__m128i)lanes_from<0>(rounded, std::make_integer_sequence<int, 4>{});
  const auto upper = (__m128i)lanes_from<4>(rounded, std::make_integer_sequence<int, 4>{});
  return (Raw<Bfloat16>)_mm_packus_epi32(lower, upper);
#else
  return __builtin_convertvector(rounded, Raw<Bfloat16>);
#endif
}
inline Raw<Float16> narrow(Float16, Vector<float> x) {
#if defined(__AVX512F__)
  return (Raw<Float16>)_mm512_maskz_cvtps_ph(-1, (__m512)x, _MM_FROUND_TO_NEAREST_INT);
#elif defined(__F16C__)
  return (Raw<Float16>)_mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT);
#else
  return __builtin_convertvector(float_to_half(x), Raw<Float16>);
#endif
}

// The first elements of x, `count` or as many as a vector has lanes; behind them zeros.
template <class T>
Vector<Work<T>> load_some(const T* x, int64_t count) {
  if (count >= kLanes<Work<T>>) {
    Raw<T> raw;
    std::memcpy(&raw, x, sizeof raw);
    return widen(T{}, raw);
  }
  Raw<T> raw = {};
#if defined(__AVX512F__)
  const uint32_t mask = (uint32_t{1} << count) - 1;
  if constexpr (sizeof(T) == 2) raw = (Raw<T>)_mm256_maskz_loadu_epi16(mask, x);
  if constexpr (sizeof(T) == 4) raw = (Raw<T>)_mm512_maskz_loadu_epi32(mask, x);
  if constexpr (sizeof(T) == 8) raw = (Raw<T>)_mm512_maskz_loadu_epi64(mask, x);
#else
  std::memcpy(&raw, x, count * sizeof(T));
#endif
  return widen(T{}, raw);
}

// Stores the first lanes, `count` or all, rounded.
template <class T>
void store_some(T* out, Vector<Work<T>> x, int64_t count) {
  const Raw<T> raw = narrow(T{}, x);
  if (count >= kLanes<Work<T>>) {
    std::memcpy(out, &raw, sizeof raw);
  } else {
    std::memcpy(out, &raw, count * sizeof(T));
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
  for (int64_t i = 0; i < n; i += kLanes<float>)
    store_some(scratch + i, load_some(x + i, n - i), n - i);
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
  for (int64_t i = 0; i < n; i += kLanes<float>)
    store_some(out + i, load_some(x + i, n - i), n - i);
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
