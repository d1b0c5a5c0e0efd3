#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

// Vectors as wide as the instruction set has them, by the compilers' vector extension, and the
// functions that the loops over attention maps need. Compiled once for every instruction set.
namespace tokencache::TOKENCACHE_ISA {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

// The parts of a working type, and the range of its exponential.
template <class W>
struct Traits;
template <>
struct Traits<float> {
  using Bits = int32_t;
  static constexpr int kMantissa = 23;
  static constexpr int kExpTerms = 7, kLogTerms = 5;
  static constexpr float kExpLow = -87.3f, kExpHigh = 89.0f;
  static constexpr float kLn2High = 0x1.62e4p-1f, kLn2Low = 0x1.7f7d1cp-20f;
};
template <>
struct Traits<double> {
  using Bits = int64_t;
  static constexpr int kMantissa = 52;
  static constexpr int kExpTerms = 13, kLogTerms = 11;
  static constexpr double kExpLow = -708.0, kExpHigh = 710.0;
  static constexpr double kLn2High = 0x1.62e42feep-1, kLn2Low = 0x1.a39ef35793c76p-33;
};

template <class W>
struct VectorOf {
  typedef W Type __attribute__((vector_size(kVectorBytes)));
  typedef typename Traits<W>::Bits Bits __attribute__((vector_size(kVectorBytes)));
};
template <class W>
using Vector = typename VectorOf<W>::Type;
template <class W>
using VectorBits = typename VectorOf<W>::Bits;
template <class W>
constexpr int kLanes = kVectorBytes / sizeof(W);

template <class W>
Vector<W> load(const W* x) {
  Vector<W> out;
  std::memcpy(&out, x, sizeof out);
  return out;
}
template <class W>
void store(W* out, Vector<W> x) {
  std::memcpy(out, &x, sizeof x);
}
template <class W>
Vector<W> splat(W x) {
  return x - Vector<W>{};
}

// The first `count` lanes of x, behind them zeros.
template <class W>
Vector<W> first_lanes(Vector<W> x, int64_t count) {
  VectorBits<W> lane;
  for (int i = 0; i < kLanes<W>; ++i) lane[i] = i;
  return lane < static_cast<typename Traits<W>::Bits>(count) ? x : Vector<W>{};
}

// Lanes First, First + 1, ..., as many as the sequence has.
template <int First, class V, int... i>
auto lanes_from(V x, std::integer_sequence<int, i...>) {
  using W = decltype(x[0] + x[0]);
  typedef W Part __attribute__((vector_size(sizeof...(i) * sizeof(W))));
  return Part{x[First + i]...};
}

// Combines the lower half of the lanes with the upper, then half of the result, and so on: a sum is
// as exact as one of few.
template <int Lanes, class V, class F>
auto fold_lanes(V x, F combine) {
  if constexpr (Lanes == 2) {
    return combine(x[0], x[1]);
  } else {
    constexpr std::make_integer_sequence<int, Lanes / 2> kHalf;
    const auto both = combine(lanes_from<0>(x, kHalf), lanes_from<Lanes / 2>(x, kHalf));
    return fold_lanes<Lanes / 2>(both, combine);
  }
}
template <class W>
W sum_lanes(Vector<W> x) {
  return fold_lanes<kLanes<W>>(x, [](auto low, auto high) { return low + high; });
}
template <class W>
W max_lanes(Vector<W> x) {
  return fold_lanes<kLanes<W>>(x, [](auto low, auto high) { return low > high ? low : high; });
}

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// Long sums are taken in blocks of that many: as exact as sums of few.
template <class W>
constexpr int64_t kSummands = 16 * kLanes<W>;

// Sums over a row of n numbers; add(i, sums) adds the vector that begins at i to each sum.
template <class W, int Count, class F>
void sum_row(int64_t n, W (&sums)[Count], F add) {
  Vector<W> total[Count] = {};
  for (int64_t block = 0; block < n; block += kSummands<W>) {
    Vector<W> some[Count] = {};
    const int64_t end = smaller(block + kSummands<W>, n);
    for (int64_t i = block; i < end; i += kLanes<W>) add(i, some);
    for (int k = 0; k < Count; ++k) total[k] += some[k];
  }
  for (int k = 0; k < Count; ++k) sums[k] = sum_lanes<W>(total[k]);
}

// 1 / k!
template <class W>
struct InverseFactorials {
  W of[Traits<W>::kExpTerms + 1] = {1};
  constexpr InverseFactorials() {
    double value = 1;
    for (int k = 1; k <= Traits<W>::kExpTerms; ++k) of[k] = static_cast<W>(value /= k);
  }
};

// e^x, 0 below the least normal number: x = n ln 2 + r, e^r by its series, 2^n by its bits.
template <class W>
Vector<W> exp(Vector<W> x) {
  using Bits = typename Traits<W>::Bits;
  constexpr int kMantissa = Traits<W>::kMantissa;
  constexpr W kLog2e = static_cast<W>(0x1.71547652b82fep+0);
  // added to a number, it leaves the integer next to that in the lowest bits
  constexpr W kShift = static_cast<W>(Bits{3} << (kMantissa - 1));
  constexpr Bits kExponentOf1 = (Bits{1} << (sizeof(W) * 8 - 2 - kMantissa)) - 1;

  x = x > Traits<W>::kExpHigh ? splat(Traits<W>::kExpHigh) : x;
  const Vector<W> shifted = x * kLog2e + kShift;
  const Vector<W> n = shifted - kShift;
  const Vector<W> r = (x - n * Traits<W>::kLn2High) - n * Traits<W>::kLn2Low;
  constexpr InverseFactorials<W> kTerms;
  Vector<W> series = splat(kTerms.of[Traits<W>::kExpTerms]);
#pragma GCC unroll 16
  for (int k = Traits<W>::kExpTerms - 1; k >= 0; --k) series = series * r + kTerms.of[k];
  const VectorBits<W> power = ((VectorBits<W>)shifted << kMantissa) + (kExponentOf1 << kMantissa);
  return x < Traits<W>::kExpLow ? Vector<W>{} : series * (Vector<W>)power;
}

// log x of a positive normal number, something finite of any other: x = 2^n m, log m by the series
// of 2 artanh((m - 1) / (m + 1)).
template <class W>
Vector<W> log(Vector<W> x) {
  using Bits = typename Traits<W>::Bits;
  constexpr int kMantissa = Traits<W>::kMantissa;
  constexpr W kRootOfHalf = static_cast<W>(0x1.6a09e667f3bcdp-1);
  Bits root_bits;
  std::memcpy(&root_bits, &kRootOfHalf, sizeof root_bits);

  // m between the roots of 1/2 and 2
  const VectorBits<W> n = ((VectorBits<W>)x - root_bits) >> kMantissa;
  const Vector<W> m = (Vector<W>)((VectorBits<W>)x - (n << kMantissa));
  const Vector<W> ratio = (m - W{1}) / (m + W{1});
  const Vector<W> square = ratio * ratio;
  Vector<W> series = splat(W{1} / (2 * Traits<W>::kLogTerms + 1));
#pragma GCC unroll 16
  for (int k = Traits<W>::kLogTerms - 1; k >= 0; --k) series = series * square + W{1} / (2 * k + 1);
  const Vector<W> exponent = __builtin_convertvector(n, Vector<W>);
  return exponent * Traits<W>::kLn2High +
         (exponent * Traits<W>::kLn2Low + ratio * (series + series));
}

}  // namespace tokencache::TOKENCACHE_ISA
