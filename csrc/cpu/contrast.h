#pragma once

#include <stdint.h>

namespace hsv {

struct ContrastKernels {};

#ifdef HSV_ISA
namespace HSV_ISA {
ContrastKernels contrast_kernels();
}
#endif

}  // namespace hsv
