#include "cpu/reconstruction.h"

#include "cpu/parallel.h"
#include "cpu/simd.h"

namespace hsv::HSV_ISA {

ReconstructionKernels reconstruction_kernels() {
  return {};
}

}  // namespace hsv::HSV_ISA
