#pragma once

#include <stdint.h>

namespace hsv {

struct ReconstructionKernels {};

#ifdef HSV_ISA
namespace HSV_ISA {
ReconstructionKernels reconstruction_kernels();
}
#endif

}  // namespace hsv
