// Where work goes: pointers are device pointers of `device`, and what goes onto the stream is not waited for.
// Functions that take one throw std::runtime_error, with CUDA's reason, if the launch fails: without a driver, for
// instance.
#pragma once

#include <stdint.h>

namespace hsv::cuda {

struct Stream {
  int device;
  uintptr_t handle;  // cudaStream_t
};

}  // namespace hsv::cuda
