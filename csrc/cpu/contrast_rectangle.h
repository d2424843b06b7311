// The logsumexp of queries' similarities to keys, and what its gradients need.
//
// With S = scale · q kᵀ and C(i) the keys that row i sums over,
//   lse_i = log Σ_{j ∈ C(i)} exp S_ij,   p_ij = exp(S_ij − lse_i),   positive_logit_i = scale · ⟨q_i, positive_i⟩,
//   dq_i = scale · (g_i Σ_j p_ij k_j + h_i positive_i),   dk_j = scale · (Σ_i g_i p_ij q_i + Σ_{positive_i = j} h_i
//   q_i)
// with g and h the gradients of lse and of the positive logits. Σ_j p_ij k_j comes out of the forward, so that dq is
// known without the keys; dk is one more pass over them.
#pragma once

#include "cpu/contrast.h"

namespace hsv {

struct RectangleProblem {
  DType dtype;  // of q, k and positive rows; values per row are double for kFloat64 and float for every other
  Rows q, k;    // [n, dim], [m, dim]
  int64_t n, m, dim;
  double scale;                        // of any sign
  bool exclude_self;                   // leaves column i + self_offset out of row i
  int64_t self_offset;                 // in [−n, m]
  const int64_t* positive;             // [n] columns of k, each left out of its row; or null
  const int32_t *q_labels, *k_labels;  // [n], [m]: columns of the row's own label are left out; or null
  bool bfloat16;                       // products of rows rounded to bfloat16, where the instruction set has them
  int threads;
  void* workspace;  // rectangle workspace bytes, 64-byte aligned
};

struct RectangleForward {
  Rows positive_rows;    // [n, dim]; data null where positives are columns or there are none
  void* lse;             // [n]; with positives lse − positive_logit
  void* positive_logit;  // [n], or null without positives
  void* mean_key;        // [n, dim] Σ_j p_ij k_j, or null: not computed
  void* log2_sum;        // [2, n] log2 Σ_j exp S_ij, rounded, and what the rounding took off; or null
};

struct RectangleBackward {
  const void *grad, *positive_grad;  // [n]; g, and h where positives are columns or else null
  const void* log2_sum;              // of the forward
  const void* besides;               // contiguous [m, dim], added to the gradient before it is rounded; or null
  void* k_grad;                      // contiguous [m, dim] of k's type
};

struct RectangleKernels {
  void (*forward)(const RectangleProblem&, const RectangleForward&);
  void (*backward)(const RectangleProblem&, const RectangleBackward&);
  // Bytes that forward, with or without mean_key, or backward needs; reads no data.
  int64_t (*workspace)(const RectangleProblem&, bool mean_key, bool backward);
};

#ifdef HSV_ISA
namespace HSV_ISA {
RectangleKernels rectangle_kernels();
}
#endif

}  // namespace hsv
