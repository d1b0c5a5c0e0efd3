#include "c_api/call.h"

#include <algorithm>
#include <cinttypes>
#include <cmath>
#include <cstdarg>
#include <cstdio>
#include <numeric>
#include <utility>

namespace tokencache::c_api {
namespace {

// No machine has more; and sums and small multiples of sizes below it stay in 64 bits.
constexpr int64_t kMostBytes = int64_t{1} << 52;
constexpr int64_t kMostTokens = INT32_MAX;

// A kernel has a block for each row, and in the shared memory of any device a row of so many.
constexpr int64_t kMostRowsOfKernel = INT32_MAX;
constexpr int64_t kMostChannelsOfKernel = 24576;

thread_local char error[512];

int64_t plus(int64_t a, int64_t b) { return std::min(a + b, kMostBytes); }

bool is_empty(const View& view) { return view.outer == 0 || view.inner == 0 || view.width == 0; }

// Bytes from the first element to the end of the last, or kMostBytes for more.
int64_t span_of(const View& view) {
  const int64_t outer = times(view.outer - 1, view.stride_outer);
  const int64_t inner = times(view.inner - 1, view.stride_inner);
  return times(plus(plus(outer, inner), std::min(view.width, kMostBytes)), view.element_size);
}

uintptr_t begin_of(const View& view) { return reinterpret_cast<uintptr_t>(view.data); }
uintptr_t end_of(const View& view) { return begin_of(view) + span_of(view); }

bool rows_overlap(const View& view) {
  std::pair<int64_t, int64_t> longer{view.stride_outer, view.outer};
  std::pair<int64_t, int64_t> shorter{view.stride_inner, view.inner};
  if (longer < shorter) std::swap(longer, shorter);
  // the longer stride has to step over all that the shorter one reaches
  int64_t reach = view.width;
  for (const auto& [stride, size] : {shorter, longer}) {
    if (size > 1 && stride < reach) return true;
    reach += (size - 1) * stride;
  }
  return false;
}

bool are_disjoint(const View& a, const View& b) {
  if (begin_of(b) < begin_of(a)) return are_disjoint(b, a);
  if (is_empty(a) || is_empty(b) || end_of(a) <= begin_of(b)) return true;
  // Columns of one array: all rows begin at multiples of a common step, counted from their first
  // one, and take different parts of it.
  const uint64_t step = std::gcd(std::gcd(a.stride_outer, a.stride_inner) * a.element_size,
                                 std::gcd(b.stride_outer, b.stride_inner) * b.element_size);
  if (step == 0) return false;
  const uint64_t gap = (begin_of(b) - begin_of(a)) % step;
  return gap >= static_cast<uint64_t>(a.width * a.element_size) &&
         gap + static_cast<uint64_t>(b.width * b.element_size) <= step;
}

bool are_same(const View& a, const View& b) {
  return a.data == b.data && a.stride_outer == b.stride_outer && a.stride_inner == b.stride_inner;
}

View without_idle_strides(View view) {
  view.stride_outer = taken(view.stride_outer, view.outer);
  view.stride_inner = taken(view.stride_inner, view.inner);
  return view;
}

}  // namespace

int64_t times(int64_t a, int64_t b) {
  int64_t product;
  return __builtin_mul_overflow(a, b, &product) ? kMostBytes : std::min(product, kMostBytes);
}

void refuse(const char* op, tokencache_status status, const char* format, ...) {
  const int length = std::snprintf(error, sizeof error, "%s: ", op);
  va_list values;
  va_start(values, format);
  std::vsnprintf(error + length, sizeof error - length, format, values);
  va_end(values);
  throw Refusal{status};
}

tokencache_status out_of_memory(const char* op) noexcept {
  std::snprintf(error, sizeof error, "%s: memory must suffice to work in, got too little", op);
  return TOKENCACHE_OUT_OF_MEMORY;
}

void expect_within(const char* op, const char* name, int64_t value, int64_t minimum,
                   int64_t maximum) {
  if (value < minimum || value > maximum) {
    refuse(op, TOKENCACHE_INVALID_ARGUMENT,
           "%s must be in [%" PRId64 ", %" PRId64 "], got %" PRId64, name, minimum, maximum, value);
  }
}

View contiguous(const char* name, const void* data, int64_t outer, int64_t inner, int64_t width,
                int64_t element_size) {
  return {
      .name = name,
      .data = data,
      .outer = outer,
      .inner = inner,
      .width = width,
      .stride_outer = times(inner, width),
      .stride_inner = width,
      .element_size = element_size,
  };
}

int64_t size_of(Type type) {
  switch (type) {
    case Type::kFloat64:
      return 8;
    case Type::kFloat32:
      return 4;
    default:
      return 2;
  }
}

int64_t taken(int64_t stride, int64_t count) { return count > 1 ? stride : 0; }

Call::Call(const char* op, const void* args, tokencache_device device, const void* stream)
    : op_(op) {
  if (args == nullptr) {
    refuse(op_, TOKENCACHE_INVALID_ARGUMENT, "args must not be NULL, got NULL");
  }
  if (device == TOKENCACHE_CUDA) {
    expect_launched(find_cuda().answer);
    cuda_ = find_cuda().launches;
    return;
  }
  if (device != TOKENCACHE_CPU) {
    refuse(op_, TOKENCACHE_INVALID_ARGUMENT,
           "device must be TOKENCACHE_CPU or TOKENCACHE_CUDA, got %" PRId32, device);
  }
  if (stream != nullptr) {
    refuse(op_, TOKENCACHE_INVALID_ARGUMENT, "stream must be NULL on the CPU, got %p", stream);
  }
}

void Call::expect_launched(const CudaAnswer& answer) const {
  switch (answer.status) {
    case TOKENCACHE_OK:
      return;
    case TOKENCACHE_UNSUPPORTED:
      refuse(op_, answer.status,
             "device must be one that can be used here, got TOKENCACHE_CUDA: %s", answer.reason);
    default:
      refuse(op_, answer.status, "the launch must succeed, got %s", answer.reason);
  }
}

void Call::expect_kernel(Type type, int64_t rows, int64_t D) const {
  if (cuda_ == nullptr) return;
  expect_within("B * (N + S)", rows, 0, kMostRowsOfKernel);
  expect_within("D", D, 0, kMostChannelsOfKernel);
  if (type == Type::kFloat64) {
    refuse(op_, TOKENCACHE_UNSUPPORTED,
           "dtype must be one of TOKENCACHE_FLOAT32, FLOAT16 and BFLOAT16 on CUDA, got "
           "TOKENCACHE_FLOAT64");
  }
}

void Call::expect_within(const char* name, int64_t value, int64_t minimum, int64_t maximum) const {
  c_api::expect_within(op_, name, value, minimum, maximum);
}

void Call::expect_size(const char* name, int64_t value) const {
  if (value < 0) {
    refuse(op_, TOKENCACHE_INVALID_ARGUMENT, "%s must be at least 0, got %" PRId64, name, value);
  }
}

void Call::expect_sizes(int64_t B, int64_t N, int64_t S, int64_t D) const {
  expect_size("B", B);
  expect_within("N", N, 0, kMostTokens);
  expect_size("S", S);
  expect_size("D", D);
  if (S > N) {
    refuse(op_, TOKENCACHE_INVALID_ARGUMENT, "S must be at most N = %" PRId64 ", got %" PRId64, N,
           S);
  }
}

void Call::expect_eps(double eps) const {
  if (!(eps >= 0) || std::isinf(eps)) {
    refuse(op_, TOKENCACHE_INVALID_ARGUMENT, "eps must be at least 0 and finite, got %g", eps);
  }
}

Type Call::type_of(tokencache_dtype dtype) const {
  switch (dtype) {
    case TOKENCACHE_FLOAT32:
      return Type::kFloat32;
    case TOKENCACHE_FLOAT16:
      return Type::kFloat16;
    case TOKENCACHE_BFLOAT16:
      return Type::kBfloat16;
    case TOKENCACHE_FLOAT64:
      return Type::kFloat64;
    default:
      refuse(op_, TOKENCACHE_INVALID_ARGUMENT,
             "dtype must be one of TOKENCACHE_FLOAT32, FLOAT16, BFLOAT16 and FLOAT64, got %" PRId32,
             dtype);
  }
}

void Call::expect_view(const View& view) const {
  if (view.stride_outer < 0 || view.stride_inner < 0) {
    refuse(op_, TOKENCACHE_INVALID_ARGUMENT,
           "%s must have strides of at least 0, got (%" PRId64 ", %" PRId64 ")", view.name,
           view.stride_outer, view.stride_inner);
  }
  const int64_t span = span_of(view);
  if (span >= kMostBytes || begin_of(view) > UINTPTR_MAX - static_cast<uintptr_t>(span)) {
    refuse(op_, TOKENCACHE_INVALID_ARGUMENT,
           "%s must span less than 2^52 bytes and end in the address space, got sizes (%" PRId64
           ", %" PRId64 ", %" PRId64 ") with strides (%" PRId64 ", %" PRId64 ", 1) from %p",
           view.name, view.outer, view.inner, view.width, view.stride_outer, view.stride_inner,
           view.data);
  }
  if (view.data == nullptr) {
    refuse(op_, TOKENCACHE_INVALID_ARGUMENT, "%s must not be NULL, got NULL", view.name);
  }
  // the greatest power of two that divides the size: that of the type, and a struct's is 8
  const int64_t alignment = view.element_size & -view.element_size;
  if (begin_of(view) % static_cast<uintptr_t>(alignment) != 0) {
    refuse(op_, TOKENCACHE_INVALID_ARGUMENT, "%s must be aligned to %" PRId64 " bytes, got %p",
           view.name, alignment, view.data);
  }
}

void Call::writes(const View& any) {
  const View view = without_idle_strides(any);
  if (is_empty(view)) return;
  expect_view(view);
  if (rows_overlap(view)) {
    refuse(op_, TOKENCACHE_INVALID_ARGUMENT,
           "%s must have rows that do not overlap, got sizes (%" PRId64 ", %" PRId64 ", %" PRId64
           ") with strides (%" PRId64 ", %" PRId64 ", 1)",
           view.name, view.outer, view.inner, view.width, view.stride_outer, view.stride_inner);
  }
  reads(view);
  written_[num_written_++] = view;
}

void Call::reads(const View& any, bool may_be_written) const {
  const View view = without_idle_strides(any);
  if (is_empty(view)) return;
  expect_view(view);
  for (const View* written = written_; written != written_ + num_written_; ++written) {
    if (may_be_written && are_same(view, *written)) continue;
    if (!are_disjoint(view, *written)) {
      refuse(op_, TOKENCACHE_INVALID_ARGUMENT,
             "%s must not overlap %s, which is written, got %p and %p", view.name, written->name,
             view.data, written->data);
    }
  }
}

}  // namespace tokencache::c_api

const char* tokencache_error(void) { return tokencache::c_api::error; }

const char* tokencache_version(void) { return TOKENCACHE_VERSION; }
