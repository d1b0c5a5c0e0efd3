#pragma once

#include "cpu/number.h"
#include "cpu/scratch.h"
#include "cpu/simd.h"

// Shared by attention and its statistics. An attention map is made for some queries at a time: a
// few rows of it stay in a cache, where they are exponentiated and summed. Keys are laid out once
// for many queries, so that a product reads them as vectors. Compiled once for every instruction
// set.
namespace tokencache::TOKENCACHE_ISA {

// A tile of the map is as large as its sums fit into the vector registers.
constexpr int kQueries = kVectorBytes == 64 ? 12 : 6;
template <class W>
constexpr int kKeys = 2 * kLanes<W>;

// Channels of a tile: a long product is summed in blocks, too.
constexpr int64_t kDepth = 96;

inline int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

// How many of N keys a sample has; null: all.
inline int64_t num_keys_of(const int32_t* key_lengths, int64_t b, int64_t stride, int64_t N) {
  const int64_t length = key_lengths ? key_lengths[b * stride] : N;
  return length < 0 ? 0 : smaller(length, N);
}

// Up to kKeys rows side by side, out[e][row] = x[row][e]; missing rows are zeros.
template <class T, class W>
void pack_keys(const T* x, int64_t stride, int64_t count, int64_t E, W* scratch, W* out) {
  for (int64_t row = 0; row < kKeys<W>; ++row) {
    const W* values = row < count ? read_row(x + row * stride, scratch, E) : nullptr;
    for (int64_t e = 0; e < E; ++e) out[e * kKeys<W> + row] = values ? values[e] : 0;
  }
}

// One of at most kQueries rows, out[e / kDepth][row][e % kDepth] = x[e].
template <class T, class W>
void pack_query(const T* x, int64_t row, int64_t E, W* out) {
  for (int64_t first = 0; first < E; first += kDepth) {
    const int64_t depth = smaller(kDepth, E - first);
    W* place = out + first * kQueries + row * kDepth;
    const W* values = read_row(x + first, place, depth);
    if (values != place) std::memcpy(place, values, depth * sizeof(W));
  }
}

// out[m][n] [+]= scale * query[m] @ keys[n] of one tile and at most kDepth channels, both packed;
// rows of out are `stride` apart.
template <class W>
void multiply_tile(const W* query, const W* keys, int64_t depth, W scale, bool adds, W* out,
                   int64_t stride) {
  Vector<W> sums[kQueries][2] = {};
  for (int64_t e = 0; e < depth; ++e, keys += kKeys<W>) {
    const Vector<W> left = load(keys), right = load(keys + kLanes<W>);
#pragma GCC unroll 12
    for (int m = 0; m < kQueries; ++m) {
      sums[m][0] += query[m * kDepth + e] * left;
      sums[m][1] += query[m * kDepth + e] * right;
    }
  }
#pragma GCC unroll 12
  for (int m = 0; m < kQueries; ++m) {
    for (int v = 0; v < 2; ++v) {
      W* place = out + m * stride + v * kLanes<W>;
      store(place, scale * sums[m][v] + (adds ? load(place) : Vector<W>{}));
    }
  }
}

// out[m][n] = scale * query[m] @ keys[n] of one tile of rows, both packed; n < width.
template <class W>
void multiply_rows(const W* query, const W* keys, int64_t depth, int64_t width, W scale, W* out,
                   int64_t stride) {
  for (int64_t n = 0; n < width; n += kKeys<W>) {
    int64_t e = 0;
    do {  // once at least, so that a product without depth is 0
      multiply_tile(query + e * kQueries, keys + n * depth + e * kKeys<W>,
                    smaller(kDepth, depth - e), scale, e > 0, out + n, stride);
      e += kDepth;
    } while (e < depth);
  }
}

// The sums over a row of the map, relative to peak: weight = exp(score - peak).
template <class W>
struct RowSums {
  W peak;    // the largest score, or the log-sum-exp that was given
  W total;   // of the weights
  W moment;  // of weight * (score - peak)
};

// A few rows of one head's map at a time.
template <class T>
class HeadMap {
 public:
  using W = Work<T>;

  HeadMap(const AttentionMapParams& p)
      : p_(p),
        width_(round_up(p.N, kKeys<W>)),
        scratch_(1, p.E),
        query_(1, round_up(p.E, kDepth) * kQueries),
        keys_(1, p.E * width_),
        rows_(kQueries, width_) {}

  // The length of a row: N rounded up. Beyond the keys it holds 0.
  int64_t width() const { return width_; }

  // Takes a head's first num_keys keys.
  void take_keys(int64_t b, int64_t h, int64_t num_keys) {
    num_keys_ = num_keys;
    const T* keys = row_of<T>(p_.key, b * p_.stride_key_b + h * p_.stride_key_h);
    for (int64_t n = 0; n < num_keys; n += kKeys<W>) {
      pack_keys(keys + n * p_.stride_key_n, p_.stride_key_n, num_keys - n, p_.E, scratch_[0],
                keys_[0] + n * p_.E);
    }
  }

  // Calls f(m, row, sums) for the queries first + m, m < count <= kQueries; row holds the weights
  // exp(score - peak). The peak is the query's lse, or without that the largest score.
  template <class F>
  void for_each_row(int64_t b, int64_t h, int64_t first, int64_t count, const W* lse,
                    int64_t stride_lse, F f) {
    const int64_t offset =
        b * p_.stride_query_b + first * p_.stride_query_s + h * p_.stride_query_h;
    for (int64_t m = 0; m < count; ++m) {
      pack_query(row_of<T>(p_.query, offset) + m * p_.stride_query_s, m, p_.E, query_[0]);
    }
    const int64_t width = round_up(num_keys_, kKeys<W>);
    multiply_rows(query_[0], keys_[0], p_.E, width, static_cast<W>(p_.softmax_scale), rows_[0],
                  rows_[1] - rows_[0]);
    for (int64_t m = 0; m < count; ++m) {
      W* row = rows_[m];
      for (int64_t n = num_keys_; n < width; ++n) row[n] = -__builtin_inf();
      f(m, row, exponentiate(row, width, lse ? lse[m * stride_lse] : largest(row, width)));
    }
  }

 private:
  static W largest(const W* row, int64_t width) {
    Vector<W> best = splat(static_cast<W>(-__builtin_inf()));
    for (int64_t n = 0; n < width; n += kLanes<W>) {
      const Vector<W> x = load(row + n);
      best = x > best ? x : best;
    }
    return max_lanes<W>(best);
  }

  static RowSums<W> exponentiate(W* row, int64_t width, W peak) {
    const W origin = peak == static_cast<W>(-__builtin_inf()) ? W{0} : peak;
    W sums[2];
    sum_row(width, sums, [&](int64_t n, Vector<W>* some) {
      const Vector<W> score = load(row + n) - origin;
      const Vector<W> weight = exp<W>(score);
      some[0] += weight;
      // a weight of 0 may be that of an infinite score
      some[1] += weight * (score < Traits<W>::kExpLow ? splat(Traits<W>::kExpLow) : score);
      store(row + n, weight);
    });
    return {peak, sums[0], sums[1]};
  }

  const AttentionMapParams& p_;
  int64_t width_, num_keys_ = 0;
  Rows<W> scratch_, query_, keys_, rows_;
};

}  // namespace tokencache::TOKENCACHE_ISA
