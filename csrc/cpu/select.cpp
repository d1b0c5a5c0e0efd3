#include "cpu/select.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <vector>

namespace tokencache {
namespace {

constexpr float kLowest = -std::numeric_limits<float>::infinity();

float rank_of(float score) { return std::isnan(score) ? kLowest : score; }

// Orders like (score descending, token ascending) does, as one number: greater comes first.
uint64_t key_of(float score, int64_t token) {
  // -0 and 0 are equals
  const float value = rank_of(score) + 0.0f;
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  bits ^= bits >> 31 ? 0xFFFFFFFFu : 0x80000000u;
  return static_cast<uint64_t>(bits) << 32 | (0xFFFFFFFFu - static_cast<uint32_t>(token));
}

// The divisor of each score: their L2 norm without NaN, if it may go beyond float32.
double scale_of(const float* scores, int64_t N) {
  double squares = 0;
  for (int64_t n = 0; n < N; ++n) {
    const double score = std::isnan(scores[n]) ? 0.0 : scores[n];
    squares += score * score;
  }
  const double norm = std::max(std::sqrt(squares), 1e-12);
  return norm > std::numeric_limits<float>::max() ? norm : static_cast<float>(norm);
}

// Multiplies the best score of every tile x tile square by 1 + bonus; ties go to the first.
void add_tile_bonus(const SelectParams& p, std::vector<float>& scores) {
  for (int64_t top = 0; top < p.grid_height; top += p.tile) {
    for (int64_t left = 0; left < p.grid_width; left += p.tile) {
      int64_t best = top * p.grid_width + left;
      for (int64_t y = top; y < std::min(top + p.tile, p.grid_height); ++y) {
        for (int64_t x = left; x < std::min(left + p.tile, p.grid_width); ++x) {
          const int64_t token = y * p.grid_width + x;
          if (rank_of(scores[token]) > rank_of(scores[best])) best = token;
        }
      }
      scores[best] *= 1.0f + p.bonus;
    }
  }
}

}  // namespace

void select_tokens_cpu(const SelectParams& p, int64_t begin, int64_t end) {
  std::vector<float> base(p.N), combined(p.N);
  std::vector<uint64_t> keys(p.N), sorted(p.N);
  for (int64_t row = begin; row < end; ++row) {
    const int64_t layer = row / p.B, sample = row % p.B;
    const float* scores = p.scores + row * p.N;
    int32_t* staleness = p.staleness + layer * p.stride_staleness_l + sample * p.stride_staleness_b;
    const double scale = p.normalize ? scale_of(scores, p.N) : 1.0;
    for (int64_t n = 0; n < p.N; ++n) {
      // two numbers of float32 divided in float64 and rounded are rounded once
      base[n] = static_cast<float>(scores[n] / scale);
    }

    for (int64_t step = 0; step < p.P; ++step) {
      for (int64_t n = 0; n < p.N; ++n) {
        combined[n] = base[n] + p.staleness_weight * static_cast<float>(staleness[n]);
      }
      if (p.grid_height > 0) add_tile_bonus(p, combined);
      for (int64_t n = 0; n < p.N; ++n) keys[n] = key_of(combined[n], n);

      const int64_t wanted = p.num_fresh ? p.num_fresh[step * p.L + layer] : p.max_fresh;
      const int64_t count = std::clamp<int64_t>(wanted, 0, std::min(p.max_fresh, p.N));
      uint64_t least = std::numeric_limits<uint64_t>::max();
      if (count > 0) {
        sorted = keys;
        std::nth_element(sorted.begin(), sorted.begin() + count - 1, sorted.end(),
                         std::greater<>());
        least = sorted[count - 1];
      }

      int32_t* indices = p.indices + (step * p.L * p.B + row) * p.max_fresh;
      int32_t* positions = p.positions + (step * p.L * p.B + row) * p.N;
      int32_t slot = 0;
      for (int64_t n = 0; n < p.N; ++n) {
        const bool is_fresh = count > 0 && keys[n] >= least;
        positions[n] = is_fresh ? slot : -1;
        // unsigned: it may begin at any number, and wraps as the reference does
        staleness[n] = is_fresh ? 0 : static_cast<int32_t>(static_cast<uint32_t>(staleness[n]) + 1);
        if (is_fresh) indices[slot++] = static_cast<int32_t>(n);
      }
      std::fill(indices + slot, indices + p.max_fresh, -1);
    }
  }
}

void invert_indices_cpu(const InvertIndicesParams& p, int64_t begin, int64_t end) {
  for (int64_t sample = begin; sample < end; ++sample) {
    int32_t* positions = p.positions + sample * p.N;
    std::fill(positions, positions + p.N, -1);
    for (int64_t slot = 0; slot < p.S; ++slot) {
      const int64_t token = p.indices[sample * p.stride_indices_b + slot];
      if (token >= 0 && token < p.N) positions[token] = static_cast<int32_t>(slot);
    }
  }
}

}  // namespace tokencache
