// Memory that an operation works in: arrays of its own, and larger pieces of memory handed out bit by bit.
#pragma once

#include <stdint.h>

#include <new>

namespace hsv::HSV_ISA {

inline constexpr int64_t kAlignment = 64;  // a cache line, which two threads should not share, and a whole vector

// n values of type T, rounded up to whole cache lines.
template <class T>
constexpr int64_t whole_lines(int64_t n) {
  const int64_t line = kAlignment / static_cast<int64_t>(sizeof(T));
  return (n + line - 1) / line * line;
}

// n values, aligned and not initialised. Made before a team of threads starts: std::bad_alloc, in Python a MemoryError,
// could not leave a thread of it.
template <class T>
class Array {
 public:
  explicit Array(int64_t n) : data(static_cast<T*>(::operator new(static_cast<size_t>(n) * sizeof(T), aligned()))) {}
  Array(const Array&) = delete;
  ~Array() { ::operator delete(data, aligned()); }

  T* const data;

 private:
  static std::align_val_t aligned() { return static_cast<std::align_val_t>(kAlignment); }
};

// Hands out aligned pieces of what begins at `base`, Python's workspace or an Array; over null it only counts.
class Arena {
 public:
  explicit Arena(void* base) : base_(static_cast<char*>(base)) {}

  template <class T>
  T* take(int64_t n) {
    char* p = base_ ? base_ + used_ : nullptr;
    used_ += whole_lines<char>(n * static_cast<int64_t>(sizeof(T)));
    return reinterpret_cast<T*>(p);
  }
  int64_t used() const { return used_; }

 private:
  char* base_;
  int64_t used_ = 0;
};

}  // namespace hsv::HSV_ISA
