#pragma once

#include <stdint.h>

namespace hsv {

struct MaskingKernels {};

#ifdef HSV_ISA
namespace HSV_ISA {
MaskingKernels masking_kernels();
}
#endif

}  // namespace hsv
