#include "cpu/contrast.h"

#include "cpu/parallel.h"
#include "cpu/simd.h"

namespace hsv::HSV_ISA {

ContrastKernels contrast_kernels() {
  return {};
}

}  // namespace hsv::HSV_ISA
