#include "cpu/masking.h"

#include "cpu/parallel.h"
#include "cpu/simd.h"

namespace hsv::HSV_ISA {

MaskingKernels masking_kernels() {
  return {};
}

}  // namespace hsv::HSV_ISA
