// How the kernels are launched: on the tensors' device, with the caller's made current again, and CUDA's reason if not.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "cuda/stream.h"

namespace hsv::cuda {

constexpr int kThreads = 256;
constexpr int64_t kBlocks = 1 << 20;  // at most; blocks walk over what is left

inline void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) throw std::runtime_error(std::string("hsv ") + what + ": " + cudaGetErrorString(error));
}

class OnDevice {
 public:
  explicit OnDevice(int device) {
    check(cudaGetDevice(&before_), "cannot use CUDA");
    check(cudaSetDevice(device), "cannot use the CUDA device");
  }
  ~OnDevice() { cudaSetDevice(before_); }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

 private:
  int before_ = 0;
};

// Blocks for so many items, `each` of them in a block.
inline int grid(int64_t items, int64_t each) {
  const int64_t blocks = (items + each - 1) / each;
  return static_cast<int>(blocks < kBlocks ? blocks : kBlocks);
}

template <class F>
void launch(Stream on, const char* what, const F& kernel) {
  const OnDevice device(on.device);
  kernel(reinterpret_cast<cudaStream_t>(on.handle));
  check(cudaGetLastError(), what);
}

}  // namespace hsv::cuda
