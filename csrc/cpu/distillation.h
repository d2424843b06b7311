// Cross-entropy between distributions of teachers and students, and Sinkhorn–Knopp; docs/kernels/distillation.md.
#pragma once

#include <stdint.h>

#include "cpu/elements.h"

namespace hsv {

// Logits [N, K] of one view, classes with stride 1.
struct LogitView {
  const void* data;
  int64_t stride;
};

// Views of one shape and type. `centre`, sums, losses, weights and means are double if the logits are, else float.
struct LogitViews {
  DType dtype;
  int64_t rows, classes;
  const LogitView* view;
  int64_t count;
};

struct ViewPair {
  int64_t teacher, student;
};

struct DistillationProblem {
  LogitViews student, teacher;
  const void* centre;                   // [K], or null
  double student_scale, teacher_scale;  // 1 / temperature, > 0 or NaN
  const ViewPair* pair;
  int64_t pairs;
  int threads;
};

// Of each row of logits x, of teachers less the centre, [2, views, N]: a number m near the greatest, and
// Σ 2^((x − m) · scale · log2 e).
struct DistillationSums {
  void *student, *teacher;
};

struct DistillationKernels {
  // losses [N] = mean over pairs of −Σ_k q_k log p_k; mean [K] of the teacher's logits over its views and rows.
  void (*forward)(const DistillationProblem& problem, void* losses, void* mean, const DistillationSums& sums);

  // gradients[s] [N, K] = weights · Σ over the pairs of s of (p − q), in the type of the logits; null where not wanted.
  void (*backward)(const DistillationProblem& problem, const void* weights, const DistillationSums& sums,
                   void* const* gradients);

  // out [K] = log Σ_i exp(x_ik − u_i) over all rows with x = logits · scale; u_i = log Σ_k exp(x_ik − logsums_k), or 0
  // for null.
  void (*column_logsums)(const LogitViews& teacher, double scale, const void* logsums, void* out, int threads);
};

#ifdef HSV_ISA
namespace HSV_ISA {
DistillationKernels distillation_kernels();
}
#endif

}  // namespace hsv
