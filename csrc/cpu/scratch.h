#pragma once

#include <cstdint>
#include <new>

namespace tokencache::TOKENCACHE_ISA {

// Rows in the type that is worked in, each on a cache line of its own.
template <class W>
class Rows {
 public:
  Rows(int64_t count, int64_t width)
      : stride_((width * sizeof(W) + kLine - 1) / kLine * kLine / sizeof(W)),
        rows_(
            static_cast<W*>(::operator new(count * stride_ * sizeof(W), std::align_val_t{kLine}))) {
  }
  ~Rows() { ::operator delete(rows_, std::align_val_t{kLine}); }
  Rows(const Rows&) = delete;
  Rows& operator=(const Rows&) = delete;
  W* operator[](int64_t i) { return rows_ + i * stride_; }

 private:
  static constexpr int64_t kLine = 64;
  int64_t stride_;
  W* rows_;
};

}  // namespace tokencache::TOKENCACHE_ISA
