#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "params.h"

// Elements of any type in 16-byte pieces, and the float32 that all arithmetic is done in.
namespace tokencache {

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__half x) { return __half2float(x); }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <class T>
__device__ T from_float(float x);
template <>
__device__ inline float from_float<float>(float x) {
  return x;
}
template <>
__device__ inline __half from_float<__half>(float x) {
  return __float2half_rn(x);
}
template <>
__device__ inline __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}

// Width elements that are moved by one instruction, or by several of 16 bytes.
template <class T, int Width>
struct alignas(sizeof(T) * Width < 16 ? sizeof(T) * Width : 16) Piece {
  T values[Width];

  __device__ static Piece load(const T* pointer) {
    return *reinterpret_cast<const Piece*>(pointer);
  }
  __device__ void store(T* pointer) const { *reinterpret_cast<Piece*>(pointer) = *this; }
};

// Two numbers, rounded, in one register.
template <class T>
__device__ uint32_t pack(float first, float second) {
  const Piece<T, 2> pair{from_float<T>(first), from_float<T>(second)};
  return *reinterpret_cast<const uint32_t*>(&pair);
}

// Calls f with a value of the element type; float64 has no kernel.
template <class F>
auto with_type(Type type, F f) {
  switch (type) {
    case Type::kFloat16:
      return f(__half{});
    case Type::kBfloat16:
      return f(__nv_bfloat16{});
    default:
      return f(float{});
  }
}

// Calls f with an element and the number of them that fill 16 bytes, or 1 where a row does not
// begin or end there.
template <class F>
cudaError_t with_pieces(Type type, bool is_aligned, F f) {
  return with_type(type, [&](auto one) {
    constexpr int kWidth = 16 / sizeof(one);
    return is_aligned ? f(one, std::integral_constant<int, kWidth>{})
                      : f(one, std::integral_constant<int, 1>{});
  });
}

inline int64_t size_of(Type type) {
  return type == Type::kFloat64 ? 8 : type == Type::kFloat32 ? 4 : 2;
}

}  // namespace tokencache
