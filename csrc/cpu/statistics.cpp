// Compiled once for every instruction set; TOKENCACHE_ISA names this one.
#include "cpu/statistics.h"

#include "cpu/number.h"
#include "cpu/scratch.h"
#include "cpu/simd.h"
#include "cpu/vector.h"

// An attention map is made for some queries at a time: a few rows of it stay in a cache, where they
// are exponentiated and summed. Keys are laid out once for many queries, so that a product reads
// them as vectors.
namespace tokencache::TOKENCACHE_ISA {
namespace {

// A tile of the map is as large as its sums fit into the vector registers.
constexpr int kQueries = kVectorBytes == 64 ? 12 : 6;
template <class W>
constexpr int kKeys = 2 * kLanes<W>;

// Long sums are taken in blocks of that many: as exact as sums of few.
template <class W>
constexpr int64_t kSummands = 16 * kLanes<W>;
constexpr int64_t kDepth = 96;

int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// Up to kKeys rows side by side, out[e][row] = x[row][e]; missing rows are zeros.
template <class T, class W>
void pack_keys(const T* x, int64_t stride, int64_t count, int64_t E, W* scratch, W* out) {
  for (int64_t row = 0; row < kKeys<W>; ++row) {
    const W* values = row < count ? read_row(x + row * stride, scratch, E) : nullptr;
    for (int64_t e = 0; e < E; ++e) out[e * kKeys<W> + row] = values ? values[e] : 0;
  }
}

// At most kQueries rows one after another, out[e / kDepth][row][e % kDepth] = x[row][e].
template <class T, class W>
void pack_queries(const T* x, int64_t stride, int64_t count, int64_t E, W* out) {
  for (int64_t first = 0; first < E; first += kDepth, out += kQueries * kDepth) {
    const int64_t depth = smaller(kDepth, E - first);
    for (int64_t row = 0; row < count; ++row) {
      W* place = out + row * kDepth;
      const W* values = read_row(x + row * stride + first, place, depth);
      if (values != place) std::memcpy(place, values, depth * sizeof(W));
    }
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

  // The length of a row: N rounded up. What lies beyond the keys is 0.
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

  // Calls f(m, row, total) for the queries first + m, m < count <= kQueries: total is the sum of
  // exp(scores - lse), row holds these summands. Without lse, the largest score takes its place.
  template <class F>
  void for_each_row(int64_t b, int64_t h, int64_t first, int64_t count, const W* lse,
                    int64_t stride_lse, F f) {
    const int64_t offset =
        b * p_.stride_query_b + first * p_.stride_query_s + h * p_.stride_query_h;
    pack_queries(row_of<T>(p_.query, offset), p_.stride_query_s, count, p_.E, query_[0]);
    const W scale = static_cast<W>(p_.softmax_scale);
    const int64_t width = round_up(num_keys_, kKeys<W>);
    for (int64_t n = 0; n < width; n += kKeys<W>) {
      for (int64_t e = 0; e < p_.E; e += kDepth) {
        multiply_tile(query_[0] + e * kQueries, keys_[0] + n * p_.E + e * kKeys<W>,
                      smaller(kDepth, p_.E - e), scale, e > 0, rows_[0] + n, rows_[1] - rows_[0]);
      }
    }
    for (int64_t m = 0; m < count; ++m) {
      W* row = rows_[m];
      for (int64_t n = num_keys_; n < width; ++n) row[n] = -__builtin_inf();
      f(m, row, exponentiate(row, width, lse ? lse[m * stride_lse] : largest(row, width)));
    }
  }

 private:
  static W largest(const W* row, int64_t width) {
    Vector<W> best = load(row);
    for (int64_t n = 0; n < width; n += kLanes<W>) {
      const Vector<W> x = load(row + n);
      best = x > best ? x : best;
    }
    return max_lanes<W>(best);
  }

  static W exponentiate(W* row, int64_t width, W peak) {
    Vector<W> total = {};
    for (int64_t block = 0; block < width; block += kSummands<W>) {
      Vector<W> some = {};
      const int64_t end = smaller(block + kSummands<W>, width);
      for (int64_t n = block; n < end; n += kLanes<W>) {
        const Vector<W> weight = exp<W>(load(row + n) - peak);
        some += weight;
        store(row + n, weight);
      }
      total += some;
    }
    return sum_lanes<W>(total);
  }

  const AttentionMapParams& p_;
  int64_t width_, num_keys_ = 0;
  Rows<W> scratch_, query_, keys_, rows_;
};

// sums += factor * row.
template <class W>
void add_row(W* sums, const W* row, W factor, int64_t width) {
  for (int64_t n = 0; n < width; n += kLanes<W>) {
    store(sums + n, load(sums + n) + factor * load(row + n));
  }
}

// sums += row, where lost takes what the sums lose by rounding and gives it back the next time.
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
  // of a few queries; of all; and what the latter lost by rounding
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
                        [&](int64_t, const W* row, W total) {
                          add_row(sums[0], row, p.lse ? W{1} : W{1} / total, rows.width());
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
  const int64_t blocks_per_sample = round_up(map.S, kEntropyQueries) / kEntropyQueries;
  HeadMap<T> rows(map);
  Rows<W> means(kEntropyQueries, rows.width());
  for (int64_t block = begin; block < end; ++block) {
    const int64_t b = block / blocks_per_sample;
    const int64_t first = block % blocks_per_sample * kEntropyQueries;
    const int64_t last = smaller(first + kEntropyQueries, map.S);
    const int64_t length = p.key_lengths ? p.key_lengths[b * p.stride_key_lengths_b] : map.N;
    const int64_t num_keys = length < 0 ? 0 : smaller(length, map.N);
    const int64_t width = round_up(num_keys, kKeys<W>);
    for (int64_t q = 0; q < last - first; ++q) std::memset(means[q], 0, width * sizeof(W));
    for (int64_t h = 0; h < map.H * (num_keys > 0); ++h) {
      rows.take_keys(b, h, num_keys);
      for (int64_t s = first; s < last; s += kQueries) {
        const int64_t count = smaller(kQueries, last - s);
        rows.for_each_row(b, h, s, count, nullptr, 0, [&](int64_t m, const W* row, W total) {
          add_row(means[s - first + m], row, W{1} / total, width);
        });
      }
    }
    for (int64_t s = first; s < last; ++s) {
      const W* mean = means[s - first];
      // what the weights' sum lacks of 1 by rounding is divided out
      Vector<W> total = {}, moment = {};
      for (int64_t block = 0; block < width; block += kSummands<W>) {
        Vector<W> some_total = {}, some_moment = {};
        const int64_t end_of_block = smaller(block + kSummands<W>, width);
        for (int64_t n = block; n < end_of_block; n += kLanes<W>) {
          const Vector<W> weight = load(mean + n) / static_cast<W>(map.H);
          some_total += weight;
          some_moment += weight * log<W>(weight);
        }
        total += some_total;
        moment += some_moment;
      }
      const W sum = num_keys > 0 ? sum_lanes<W>(total) : 1;
      static_cast<W*>(p.out)[b * map.S + s] = log<W>(splat(sum))[0] - sum_lanes<W>(moment) / sum;
    }
  }
}

template <class T>
void head_norms_of(const HeadNormsParams& p, int64_t begin, int64_t end) {
  using W = Work<T>;
  Rows<W> scratch(1, p.E);
  for (int64_t row = begin; row < end; ++row) {
    const T* x = row_of<T>(p.x, row / p.N * p.stride_x_b + row % p.N * p.stride_x_n);
    W total = 0;
    for (int64_t h = 0; h < p.H; ++h) {
      const W* head = read_row(x + h * p.stride_x_h, scratch[0], p.E);
      W squares = 0;
#pragma omp simd reduction(+ : squares)
      for (int64_t e = 0; e < p.E; ++e) squares += head[e] * head[e];
      total += static_cast<W>(__builtin_sqrt(squares));
    }
    static_cast<W*>(p.out)[row] = total / static_cast<W>(p.H);
  }
}

// The norm that a cosine is divided by: never zero.
template <class W>
W norm_of(W squares) {
  const W norm = static_cast<W>(__builtin_sqrt(squares));
  return norm < W(1e-8) ? W(1e-8) : norm;
}

template <class T>
void token_change_of(const TokenChangeParams& p, int64_t begin, int64_t end) {
  using W = Work<T>;
  Rows<W> scratch(2, p.D);
  for (int64_t row = begin; row < end; ++row) {
    const int64_t b = row / p.N, n = row % p.N;
    const T* new_row = row_of<T>(p.new_rows, b * p.stride_new_b + n * p.stride_new_n);
    const T* old_row = row_of<T>(p.old_rows, b * p.stride_old_b + n * p.stride_old_n);
    const W* x = read_row(new_row, scratch[0], p.D);
    const W* y = read_row(old_row, scratch[1], p.D);
    W* out = static_cast<W*>(p.out) + row;
    if (p.is_cosine) {
      W product = 0, x_squares = 0, y_squares = 0;
#pragma omp simd reduction(+ : product, x_squares, y_squares)
      for (int64_t d = 0; d < p.D; ++d) {
        product += x[d] * y[d];
        x_squares += x[d] * x[d];
        y_squares += y[d] * y[d];
      }
      *out = W{1} - product / (norm_of(x_squares) * norm_of(y_squares));
    } else {
      W moved = 0, size = 0;
#pragma omp simd reduction(+ : moved, size)
      for (int64_t d = 0; d < p.D; ++d) {
        moved += x[d] < y[d] ? y[d] - x[d] : x[d] - y[d];
        size += y[d] < 0 ? -y[d] : y[d];
      }
      *out = moved / (size < W(1e-12) ? W(1e-12) : size);
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
