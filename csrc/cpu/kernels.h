// The CPU kernels as a table of functions: one table per instruction set, one chosen at load (dispatch.h).
#pragma once

#include "cpu/contrast.h"
#include "cpu/contrast_rectangle.h"
#include "cpu/cosine.h"
#include "cpu/distillation.h"
#include "cpu/limits.h"
#include "cpu/masking.h"
#include "cpu/reconstruction.h"

namespace hsv {

struct Kernels {
  const char* isa;
  ContrastKernels contrast;
  RectangleKernels rectangle;
  CosineKernels cosine;
  DistillationKernels distillation;
  MaskingKernels masking;
  ReconstructionKernels reconstruction;
  LimitKernels limits;
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
namespace avx512bf16 {
extern const Kernels kernels;
}

}  // namespace hsv
