// The workspace that Python allocates, in pieces.
#pragma once

#include <stdint.h>

namespace hsv::HSV_ISA {

// Hands out 64-byte aligned pieces of the workspace; over null it only counts.
class Arena {
 public:
  explicit Arena(void* base) : base_(static_cast<char*>(base)) {}

  template <class T>
  T* take(int64_t n) {
    char* p = base_ ? base_ + used_ : nullptr;
    used_ += (n * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
    return reinterpret_cast<T*>(p);
  }
  int64_t used() const { return used_; }

 private:
  char* base_;
  int64_t used_ = 0;
};

}  // namespace hsv::HSV_ISA
