#pragma once

#include <cstdint>
#include <cstring>

#include "cuda/number.cuh"

// In the place of csrc/cuda/tensor_core.cuh: the effect of its instructions, for the CPU.
namespace tokencache {

inline void copy_async(void* shared, const void* source, bool is_there) {
  emulator::copy_later(shared, source, is_there);
}

inline void commit_copies() { emulator::close_group_of_copies(); }

template <int Pending>
void wait_copies() {
  emulator::make_copies(Pending);
}

struct LoadOfLane {
  const void* row;
  uint32_t* matrices;
};

// Lane l gets of each matrix elements 2 * (l % 4) and the next of row l / 4, or of that column.
template <bool IsTransposed>
void load_together(uint32_t (&matrices)[4], const void* row) {
  if (reinterpret_cast<uintptr_t>(row) % 16 != 0) emulator::fail("a row must begin at 16 bytes");
  LoadOfLane mine{row, matrices};
  emulator::meet(
      [](void* const(&lanes)[emulator::kWarp]) {
        for (int lane = 0; lane < emulator::kWarp; ++lane) {
          for (int matrix = 0; matrix < 4; ++matrix) {
            uint16_t pair[2];
            for (int i = 0; i < 2; ++i) {
              const int line = lane / 4, place = lane % 4 * 2 + i;
              const int row = IsTransposed ? place : line, column = IsTransposed ? line : place;
              const auto& giver = *static_cast<LoadOfLane*>(lanes[matrix * 8 + row]);
              pair[i] = static_cast<const uint16_t*>(giver.row)[column];
            }
            std::memcpy(static_cast<LoadOfLane*>(lanes[lane])->matrices + matrix, pair, 4);
          }
        }
      },
      &mine);
}

inline void load_matrices(uint32_t (&matrices)[4], const void* row) {
  load_together<false>(matrices, row);
}

inline void load_transposed(uint32_t (&matrices)[4], const void* row) {
  load_together<true>(matrices, row);
}

// Puts a matrix of 8 by 8, as the warp's lanes hold it, in its place in a larger one.
template <class T, int Columns>
void lay_out(float (*rows)[Columns], int lane, uint32_t held) {
  T pair[2];
  std::memcpy(pair, &held, 4);
  for (int i = 0; i < 2; ++i) rows[lane / 4][lane % 4 * 2 + i] = to_float(pair[i]);
}

struct ProductOfLane {
  float* sum;
  uint32_t a[4], b[2];
};

template <class T>
void multiply_add(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  ProductOfLane mine{sum, {a[0], a[1], a[2], a[3]}, {b0, b1}};
  emulator::meet(
      [](void* const(&lanes)[emulator::kWarp]) {
        float upper_left[8][8], lower_left[8][8], upper_right[8][8], lower_right[8][8];
        float b_left[8][8], b_right[8][8];
        for (int lane = 0; lane < emulator::kWarp; ++lane) {
          const auto& one = *static_cast<ProductOfLane*>(lanes[lane]);
          lay_out<T>(upper_left, lane, one.a[0]);
          lay_out<T>(lower_left, lane, one.a[1]);
          lay_out<T>(upper_right, lane, one.a[2]);
          lay_out<T>(lower_right, lane, one.a[3]);
          lay_out<T>(b_left, lane, one.b[0]);
          lay_out<T>(b_right, lane, one.b[1]);
        }
        for (int lane = 0; lane < emulator::kWarp; ++lane) {
          float* sum = static_cast<ProductOfLane*>(lanes[lane])->sum;
          for (int i = 0; i < 4; ++i) {
            const int row = lane / 4, column = lane % 4 * 2 + i % 2;
            const auto& left = i < 2 ? upper_left : lower_left;
            const auto& right = i < 2 ? upper_right : lower_right;
            for (int k = 0; k < 8; ++k) {
              sum[i] += left[row][k] * b_left[column][k] + right[row][k] * b_right[column][k];
            }
          }
        }
      },
      &mine);
}

}  // namespace tokencache
