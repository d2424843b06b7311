// Negative cosine of rows and its gradients; docs/kernels/cosine.md.
#pragma once

#include <stdint.h>

#include "cpu/elements.h"

namespace hsv {

// Rows [rows, dim] whose values have stride 1.
struct CosineRows {
  const void* data;
  int64_t stride;
};

struct CosineProblem {
  DType dtype;  // of p, z and their gradients; values per row are double for kFloat64 and float for every other
  int64_t rows, dim;
  CosineRows p, z;
  double eps;
  int threads;
};

struct CosineKernels {
  // losses [rows] = −cos(p_i, z_i); inv_norm [2, rows] = 1 / max(‖row‖, eps) of p and of z.
  void (*forward)(const CosineProblem&, void* losses, void* inv_norm);

  // Gradients [rows, dim], contiguous, each null where it is not needed, for the gradient [rows] of the losses.
  void (*backward)(const CosineProblem&, const void* grad, const void* losses, const void* inv_norm, void* p_grad,
                   void* z_grad);
};

#ifdef HSV_ISA
namespace HSV_ISA {
CosineKernels cosine_kernels();
}
#endif

}  // namespace hsv
