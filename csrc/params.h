#pragma once

#include <cstdint>

// One plain struct per op: all that a loop or a kernel needs to know. Strides count elements.
namespace tokencache {

struct GatherRowsParams {
  int64_t B, N, S, D;

  const void* x;           // [B, N, D], unit stride along D
  const int32_t* indices;  // [B, S], unit stride along S; outside [0, N): an empty slot
  void* out;               // [B, S, D], contiguous

  int64_t stride_x_b, stride_x_n;
  int64_t stride_indices_b;
  int64_t element_size;  // in bytes; a copy does not care about the type
};

struct ScatterRowsParams {
  int64_t B, N, S, D;

  const void* rows;        // [B, S, D], unit stride along D
  const int32_t* indices;  // [B, S], unit stride along S; outside [0, N): an empty slot
  void* cache;             // [B, N, D], unit stride along D

  int64_t stride_rows_b, stride_rows_s;
  int64_t stride_indices_b;
  int64_t stride_cache_b, stride_cache_n;
  int64_t element_size;  // in bytes
};

}  // namespace tokencache
