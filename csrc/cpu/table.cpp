#include "cpu/kernels.h"
#include "cpu/simd.h"

namespace hsv::HSV_ISA {

extern const Kernels kernels;
const Kernels kernels = {HSV_ISA_NAME,           contrast_kernels(), rectangle_kernels(),      cosine_kernels(),
                         distillation_kernels(), masking_kernels(),  reconstruction_kernels(), limit_kernels()};

}  // namespace hsv::HSV_ISA
