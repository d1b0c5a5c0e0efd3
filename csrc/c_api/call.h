#pragma once

#include <cstdint>
#include <new>

#include "c_api/cuda.h"
#include "params.h"
#include "tokencache.h"

// Shared by the functions of the C API. Unlike in api/, nobody has checked the arguments. Each
// function describes its reads and writes in a Call, and only then runs.
namespace tokencache::c_api {

// Rows [outer, inner] of width elements each; strides count elements.
struct View {
  const char* name;
  const void* data;
  int64_t outer, inner, width;
  int64_t stride_outer, stride_inner;
  int64_t element_size;  // in bytes
};

// The rows of a contiguous tensor.
View contiguous(const char* name, const void* data, int64_t outer, int64_t inner, int64_t width,
                int64_t element_size);

// Thrown where a call is refused, after tokencache_error() was given the sentence.
struct Refusal {
  tokencache_status status;
};

[[noreturn]] __attribute__((format(printf, 3, 4))) void refuse(const char* op,
                                                               tokencache_status status,
                                                               const char* format, ...);

// Refuses a value outside [minimum, maximum].
void expect_within(const char* op, const char* name, int64_t value, int64_t minimum,
                   int64_t maximum);

// The arguments of one call, all of them refused if they do not fit.
class Call {
 public:
  Call(const char* op, const void* args, tokencache_device device, const void* stream);

  // Null on the CPU.
  const CudaLaunches* cuda() const { return cuda_; }
  // Turns an error of CUDA into a refusal.
  void expect_launched(const CudaAnswer& answer) const;
  // Further demands of kernels, none on the CPU; D if rows are normalised, else 0.
  void expect_kernel(Type type, int64_t rows, int64_t D) const;

  void expect_within(const char* name, int64_t value, int64_t minimum, int64_t maximum) const;
  void expect_size(const char* name, int64_t value) const;
  // Of those that an op has; 0 for the others.
  void expect_sizes(int64_t B, int64_t N, int64_t S, int64_t D) const;
  void expect_eps(double eps) const;
  Type type_of(tokencache_dtype dtype) const;

  // Outputs come first, and inputs are checked against them. A row may be read and written in one
  // place if the views are the same and the caller says so.
  void writes(const View& view);
  void reads(const View& view, bool may_be_written = false) const;

 private:
  void expect_view(const View& view) const;

  const char* op_;
  const CudaLaunches* cuda_ = nullptr;
  View written_[4];
  int num_written_ = 0;
};

int64_t size_of(Type type);

// A stride along which there are count elements; where there is one, it is any number.
int64_t taken(int64_t stride, int64_t count);

// a * b of numbers that are not negative; where that is too much for any memory, a number that is
// too much as well.
int64_t times(int64_t a, int64_t b);

// Gives tokencache_error() its sentence.
tokencache_status out_of_memory(const char* op) noexcept;

// Runs one function of the API: no exception passes into C.
template <class F>
tokencache_status run(const char* op, F f) noexcept {
  try {
    f();
    return TOKENCACHE_OK;
  } catch (const Refusal& refusal) {
    return refusal.status;
  } catch (const std::bad_alloc&) {
    return out_of_memory(op);
  }
}

}  // namespace tokencache::c_api
