// The masked mean squared error on a CUDA device; the definition is that of cpu/reconstruction.h.
#pragma once

#include <stdint.h>

#include "cpu/masking.h"
#include "cuda/stream.h"

namespace hsv::cuda {

struct ReconstructionProblem {
  DType pred_dtype, images_dtype;  // images are kFloat32 or of the type of the predictions, neither kFloat64
  const void* pred;                // [B, L, height * width * channels]
  int64_t pred_batch, pred_row, pred_value;
  const void* images;
  Patches at;  // where the patches lie in them
  PatchShape shape;
  const float* mask;  // [B, L], contiguous, as all that follows
  int64_t B, L;
};

// losses, mean and rstd are [B, L] float32.
void reconstruction_forward(Stream on, const ReconstructionProblem& problem, bool norm_pix, float* losses, float* mean,
                            float* rstd);

// gradient = weights * (pred - target) in the type of the predictions, 0 where mask is 0.
void reconstruction_backward(Stream on, const ReconstructionProblem& problem, const float* weights, const float* mean,
                             const float* rstd, void* gradient);

}  // namespace hsv::cuda
