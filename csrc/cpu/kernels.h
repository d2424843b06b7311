// The CPU kernels as a table of functions: one table per instruction set, one chosen at load.
#pragma once

#include "cpu/contrast.h"
#include "cpu/masking.h"
#include "cpu/reconstruction.h"

namespace hsv {

struct Kernels {
  const char* isa;
  ContrastKernels contrast;
  MaskingKernels masking;
  ReconstructionKernels reconstruction;
};

namespace portable {
extern const Kernels kernels;
}
namespace avx2 {
extern const Kernels kernels;
}
namespace avx512 {
extern const Kernels kernels;
}

// The table of the best instruction set of this machine, or of the one named by HSV_CPU_ISA.
// Throws std::runtime_error if that one is unknown, not built or not supported.
const Kernels& active_kernels();

}  // namespace hsv
