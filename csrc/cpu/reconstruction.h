// Masked mean squared error between predictions and image patches; docs/kernels/reconstruction.md.
#pragma once

#include <stdint.h>

#include "cpu/elements.h"

namespace hsv {

// Where the patches of an image batch [B, C, H, W] lie; strides count elements.
struct PatchGrid {
  int64_t batch, channels, rows, columns;  // rows · columns patches in each image
  int64_t p, q;                            // pixels of a patch
  int64_t stride_b, stride_c, stride_h, stride_w;
};

// Predictions [B, rows · columns, p·q·C], pixels with stride 1.
struct PatchRows {
  const void* data;
  DType dtype;
  int64_t stride_b, stride_l;
};

// `mask`, `weights`, `losses`, `mean` and `rstd` are [B, L], contiguous, double if the predictions are, else float.
struct ReconstructionKernels {
  // losses = mask · mean_pixels (pred − (x − mean) · rstd)²; mean and rstd are the patch's own, or 0 and 1 without
  // norm_pix. All three are 0 where mask is 0, and nothing of that patch is read.
  void (*forward)(const PatchRows& pred, const void* images, DType images_dtype, const PatchGrid& grid,
                  const void* mask, bool norm_pix, void* losses, void* mean, void* rstd, int threads);

  // gradient [B, L, p·q·C] = weights · (pred − (x − mean) · rstd), in the type of `pred`; 0 where mask is 0.
  void (*backward)(const PatchRows& pred, const void* images, DType images_dtype, const PatchGrid& grid,
                   const void* mask, const void* weights, const void* mean, const void* rstd, void* gradient,
                   int threads);
};

#ifdef HSV_ISA
namespace HSV_ISA {
ReconstructionKernels reconstruction_kernels();
}
#endif

}  // namespace hsv
