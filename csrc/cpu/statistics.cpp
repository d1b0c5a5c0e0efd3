// Compiled once for every instruction set; TOKENCACHE_ISA names this one.
#include "cpu/statistics.h"

#include "cpu/heads.h"
#include "cpu/vector.h"

namespace tokencache::TOKENCACHE_ISA {
namespace {

// sums += factor * row.
template <class W>
void add_row(W* sums, const W* row, W factor, int64_t width) {
  for (int64_t n = 0; n < width; n += kLanes<W>) {
    store(sums + n, load(sums + n) + factor * load(row + n));
  }
}

// sums += row; the rounding errors go to lost, and come back the next time.
template <class W>
void add_exactly(W* sums, W* lost, const W* row, int64_t width) {
  for (int64_t n = 0; n < width; n += kLanes<W>) {
    const Vector<W> added = load(row + n) + load(lost + n), before = load(sums + n);
    const Vector<W> after = before + added;
    store(lost + n, added - (after - before));
    store(sums + n, after);
  }
}

template <class T>
void attention_received_of(const AttentionReceivedParams& p, int64_t begin, int64_t end) {
  using W = Work<T>;
  const AttentionMapParams& map = p.map;
  HeadMap<T> rows(map);
  // the sums of a few queries, the sums of all, and the rounding errors of the latter
  Rows<W> sums(3, rows.width());
  for (int64_t pair = begin; pair < end; ++pair) {
    const int64_t b = pair / map.H, h = pair % map.H;
    const W* lse = row_of<W>(p.lse, b * p.stride_lse_b + h * p.stride_lse_h);
    rows.take_keys(b, h, map.N);
    for (int i = 1; i < 3; ++i) std::memset(sums[i], 0, rows.width() * sizeof(W));
    for (int64_t s = 0; s < map.S; s += kQueries) {
      std::memset(sums[0], 0, rows.width() * sizeof(W));
      rows.for_each_row(b, h, s, smaller(kQueries, map.S - s),
                        p.lse ? lse + s * p.stride_lse_s : nullptr, p.stride_lse_s,
                        [&](int64_t, const W* row, const RowSums<W>& of_row) {
                          add_row(sums[0], row, p.lse ? W{1} : W{1} / of_row.total, rows.width());
                        });
      add_exactly(sums[1], sums[2], sums[0], rows.width());
    }
    W* out = static_cast<W*>(p.out) + pair * map.N;
    for (int64_t n = 0; n < map.N; ++n) out[n] = sums[1][n] / static_cast<W>(map.S);
  }
}

template <class T>
void attention_entropy_of(const AttentionEntropyParams& p, int64_t begin, int64_t end) {
  using W = Work<T>;
  const AttentionMapParams& map = p.map;
  const int64_t blocks_per_sample = round_up(map.S, kBlockQueries) / kBlockQueries;
  HeadMap<T> rows(map);
  Rows<W> means(kBlockQueries, rows.width());
  for (int64_t block = begin; block < end; ++block) {
    const int64_t b = block / blocks_per_sample;
    const int64_t first = block % blocks_per_sample * kBlockQueries;
    const int64_t last = smaller(first + kBlockQueries, map.S);
    const int64_t num_keys = num_keys_of(p.key_lengths, b, p.stride_key_lengths_b, map.N);
    const int64_t width = round_up(num_keys, kKeys<W>);
    for (int64_t q = 0; q < last - first; ++q) std::memset(means[q], 0, width * sizeof(W));
    for (int64_t h = 0; h < map.H * (num_keys > 0); ++h) {
      rows.take_keys(b, h, num_keys);
      const W* lse = row_of<W>(p.lse, (b * map.H + h) * map.S);
      for (int64_t s = first; s < last; s += kQueries) {
        rows.for_each_row(b, h, s, smaller(kQueries, last - s), p.lse ? lse + s : nullptr, 1,
                          [&](int64_t m, const W* row, const RowSums<W>& of_row) {
                            add_row(means[s - first + m], row, W{1} / of_row.total, width);
                          });
      }
    }
    for (int64_t s = first; s < last; ++s) {
      const W* mean = means[s - first];
      // the weights' sum misses 1 by rounding, which is divided out
      W sums[2];
      sum_row(width, sums, [&](int64_t n, Vector<W>* some) {
        const Vector<W> weight = load(mean + n) / static_cast<W>(map.H);
        some[0] += weight;
        some[1] += weight * log<W>(weight);
      });
      const W sum = num_keys > 0 ? sums[0] : 1;
      static_cast<W*>(p.out)[b * map.S + s] = log<W>(splat(sum))[0] - sums[1] / sum;
    }
  }
}

template <class W>
W root_of(W squares) {
  return static_cast<W>(__builtin_sqrt(squares));
}

// A factor, a power of two, that keeps squares from overflowing, and its inverse from vanishing.
template <class W>
constexpr W kShrink = sizeof(W) == 4 ? static_cast<W>(0x1p-80) : static_cast<W>(0x1p-520);

template <class T>
void head_norms_of(const HeadNormsParams& p, int64_t begin, int64_t end) {
  using W = Work<T>;
  for (int64_t row = begin; row < end; ++row) {
    const T* x = row_of<T>(p.x, row / p.N * p.stride_x_b + row % p.N * p.stride_x_n);
    W total = 0;
    for (int64_t h = 0; h < p.H; ++h, x += p.stride_x_h) {
      const auto measure = [&](W factor) {
        Vector<W> squares = {};  // of one head: too few for blocks
        for (int64_t e = 0; e < p.E; e += kLanes<W>) {
          const Vector<W> some = load_some(x + e, p.E - e) * factor;
          squares += some * some;
        }
        return root_of(sum_lanes<W>(squares)) / factor;
      };
      const W norm = measure(1);
      total += __builtin_isinf(norm) ? measure(kShrink<W>) : norm;
    }
    static_cast<W*>(p.out)[row] = total / static_cast<W>(p.H);
  }
}

// The norm that a cosine is divided by: never zero.
template <class W>
W norm_of(W squares) {
  const W norm = root_of(squares);
  return norm < W(1e-8) ? W(1e-8) : norm;
}

// The factor by which a row of such squares has a norm between the limits.
template <class W>
W factor_of(W squares) {
  if (__builtin_isinf(squares)) return kShrink<W>;
  return squares < W(1e-12) ? 1 / kShrink<W> : W(1);
}

template <class W>
Vector<W> magnitude(Vector<W> x) {
  return x < 0 ? -x : x;
}

template <class T>
void token_change_of(const TokenChangeParams& p, int64_t begin, int64_t end) {
  using W = Work<T>;
  for (int64_t row = begin; row < end; ++row) {
    const int64_t b = row / p.N, n = row % p.N;
    const T* new_row = row_of<T>(p.new_rows, b * p.stride_new_b + n * p.stride_new_n);
    const T* old_row = row_of<T>(p.old_rows, b * p.stride_old_b + n * p.stride_old_n);
    W* out = static_cast<W*>(p.out) + row;
    if (p.is_cosine) {
      W sums[3];  // of the products of new and old, new and new, old and old
      const auto measure = [&](W new_factor, W old_factor) {
        sum_row(p.D, sums, [&](int64_t d, Vector<W>* some) {
          const Vector<W> x = load_some(new_row + d, p.D - d) * new_factor;
          const Vector<W> y = load_some(old_row + d, p.D - d) * old_factor;
          some[0] += x * y;
          some[1] += x * x;
          some[2] += y * y;
        });
      };
      measure(1, 1);
      const W new_factor = factor_of(sums[1]), old_factor = factor_of(sums[2]);
      if (new_factor != 1 || old_factor != 1) measure(new_factor, old_factor);
      *out = W{1} - sums[0] / (norm_of(sums[1]) * norm_of(sums[2]));
    } else {
      W sums[2];  // of the movement, and of the old value
      sum_row(p.D, sums, [&](int64_t d, Vector<W>* some) {
        const Vector<W> x = load_some(new_row + d, p.D - d), y = load_some(old_row + d, p.D - d);
        some[0] += magnitude<W>(x - y);
        some[1] += magnitude<W>(y);
      });
      *out = sums[0] / (sums[1] < W(1e-12) ? W(1e-12) : sums[1]);
    }
  }
}

}  // namespace

void attention_received(const AttentionReceivedParams& p, int64_t begin, int64_t end) {
  with_type(p.map.type, [&](auto one) { attention_received_of<decltype(one)>(p, begin, end); });
}

void attention_entropy(const AttentionEntropyParams& p, int64_t begin, int64_t end) {
  with_type(p.map.type, [&](auto one) { attention_entropy_of<decltype(one)>(p, begin, end); });
}

void head_norms(const HeadNormsParams& p, int64_t begin, int64_t end) {
  with_type(p.type, [&](auto one) { head_norms_of<decltype(one)>(p, begin, end); });
}

void token_change(const TokenChangeParams& p, int64_t begin, int64_t end) {
  with_type(p.type, [&](auto one) { token_change_of<decltype(one)>(p, begin, end); });
}

}  // namespace tokencache::TOKENCACHE_ISA
