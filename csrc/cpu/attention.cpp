// Compiled once for every instruction set; TOKENCACHE_ISA names this one.
#include "cpu/attention.h"

#include "cpu/heads.h"
#include "cpu/vector.h"

namespace tokencache::TOKENCACHE_ISA {
namespace {

// A head's values, kKeys channels at a time, out[c / kKeys][n][c % kKeys] = x[n][c]; beyond E:
// zeros.
template <class T, class W>
void pack_values(const T* x, int64_t stride, int64_t count, int64_t E, W* scratch, W* out) {
  for (int64_t n = 0; n < count; ++n) {
    const W* values = read_row(x + n * stride, scratch, E);
    for (int64_t first = 0; first < E; first += kKeys<W>) {
      W* place = out + first * count + n * kKeys<W>;
      const int64_t size = smaller(kKeys<W>, E - first);
      std::memcpy(place, values + first, size * sizeof(W));
      std::memset(place + size, 0, (kKeys<W> - size) * sizeof(W));
    }
  }
}

template <class T>
void attention_of(const AttentionParams& p, int64_t begin, int64_t end) {
  using W = Work<T>;
  const AttentionMapParams& map = p.map;
  const int64_t blocks_per_head = round_up(map.S, kBlockQueries) / kBlockQueries;
  const int64_t width = round_up(map.E, kKeys<W>);
  HeadMap<T> rows(map);
  Rows<W> scratch(1, map.E), values(1, map.N * width);
  Rows<W> weights(1, round_up(map.N, kDepth) * kQueries), mixed(kQueries, width);
  int64_t num_keys = 0;
  for (int64_t part = begin; part < end; ++part) {
    const int64_t pair = part / blocks_per_head, b = pair / map.H, h = pair % map.H;
    const int64_t block = part % blocks_per_head;
    if (part == begin || block == 0) {
      num_keys = num_keys_of(p.key_lengths, b, p.stride_key_lengths_b, map.N);
      rows.take_keys(b, h, num_keys);
      pack_values(row_of<T>(p.value, b * p.stride_value_b + h * p.stride_value_h), p.stride_value_n,
                  num_keys, map.E, scratch[0], values[0]);
    }
    const int64_t last = smaller((block + 1) * kBlockQueries, map.S);
    for (int64_t s = block * kBlockQueries; s < last; s += kQueries) {
      const int64_t count = smaller(kQueries, last - s);
      W factors[kQueries];
      rows.for_each_row(b, h, s, count, nullptr, 0,
                        [&](int64_t m, const W* row, const RowSums<W>& sums) {
                          const W log_total = log<W>(splat(sums.total))[0];
                          factors[m] = sums.total == 0 ? W{0} : W{1} / sums.total;
                          static_cast<W*>(p.lse)[pair * map.S + s + m] = sums.peak + log_total;
                          if (p.entropy != nullptr) {
                            static_cast<W*>(p.entropy)[pair * map.S + s + m] =
                                sums.total == 0 ? W{0} : log_total - sums.moment * factors[m];
                          }
                          pack_query(row, m, num_keys, weights[0]);
                        });
      multiply_rows(weights[0], values[0], num_keys, width, W{1}, mixed[0], mixed[1] - mixed[0]);
      for (int64_t m = 0; m < count; ++m) {
        T* out = static_cast<T*>(p.out) + ((b * map.S + s + m) * map.H + h) * map.E;
        W* place = place_row(out, mixed[m]);
        for (int64_t e = 0; e < map.E; ++e) place[e] = mixed[m][e] * factors[m];
        store_row(place, out, map.E);
      }
    }
  }
}

}  // namespace

void attention(const AttentionParams& p, int64_t begin, int64_t end) {
  with_type(p.map.type, [&](auto one) { attention_of<decltype(one)>(p, begin, end); });
}

}  // namespace tokencache::TOKENCACHE_ISA
