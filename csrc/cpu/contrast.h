// NT-Xent and the logsumexp of a matrix's similarities to itself, over tiles of the similarity matrix.
//
// With z the packed rows (normalised for NT-Xent), S = scale · z zᵀ, pos(i) the other view of row i and C(i) the
// columns that row i sums over (all; less i; less i and pos(i) for NT-Xent):
//   lse_i = log Σ_{j ∈ C(i)} exp S_ij,   d_i = lse_i − S_i,pos(i),   loss_i = softplus(d_i).
#pragma once

#include <stdint.h>

#include "cpu/elements.h"

namespace hsv {

// Rows of any stride, counted in elements.
struct Rows {
  const void* data;
  int64_t row_stride, column_stride;
};

// What is taken off the logits before their exponentials.
enum class Shift : int {
  kChosen = 0,  // nothing where a bound on |S| allows it, a running maximum elsewhere
  kFixed = 1,   // nothing: |S| + log(rows) must stay below 64
  kOnline = 2,  // a running maximum
};

struct ContrastProblem {
  DType dtype;        // of the rows; the results below are double for kFloat64 and float for every other
  int views;          // 2: NT-Xent of views[0] and views[1]; 1: the logsumexp of one matrix, not normalised
  Rows view[2];       // [rows, dim] each
  int64_t rows, dim;  // rows of one view
  double scale;       // 1 / temperature for NT-Xent; positive
  bool exclude_self;  // leaves column i out of row i; always set for NT-Xent
  bool bfloat16;      // products of rows rounded to bfloat16, where the instruction set has them
  Shift shift;
  int threads;
  void* workspace;  // contrast_workspace bytes, 64-byte aligned
};

// Values per row of all views; losses and d belong to NT-Xent and are null for one view.
struct ContrastForward {
  void *lse, *losses, *d;  // lse may be null
  void* sums;              // [2, rows of all views] for backward: 2^shift · total is Σ exp S_ij; or null
  void* exponentials;      // exp S_ij for backward, kept_values of ops/contrast/cpu.py, or null; needs the fixed shift
};

struct ContrastBackward {
  const void *grad, *sums, *d;  // grad contiguous, of the type of d; the others from forward
  void* view_grad[2];           // contiguous [rows, dim] of the rows' type, or null: not computed
  double* scale_grad;           // or null
  const void* exponentials;     // what forward kept, or null
};

// Exponentials are kept in strips of so many rows, whatever the instruction set: [strip][kStrip][columns right of it].
inline constexpr int64_t kStrip = 32;

struct ContrastKernels {
  void (*forward)(const ContrastProblem&, const ContrastForward&);
  void (*backward)(const ContrastProblem&, const ContrastBackward&);
  // Bytes that forward or backward needs; reads no data.
  int64_t (*workspace)(const ContrastProblem&, bool backward);
};

#ifdef HSV_ISA
namespace HSV_ISA {
ContrastKernels contrast_kernels();
}
#endif

}  // namespace hsv
