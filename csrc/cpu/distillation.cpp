#include "cpu/distillation.h"

#include "cpu/distillation_backward.h"
#include "cpu/distillation_forward.h"
#include "cpu/distillation_sinkhorn.h"

namespace hsv::HSV_ISA {

DistillationKernels distillation_kernels() {
  return {
      [](const DistillationProblem& p, void* losses, void* mean, const DistillationSums& sums) {
        with_type(p.student.dtype, [&](auto e) { distillation::forward<decltype(e)>(p, losses, mean, sums); });
      },
      [](const DistillationProblem& p, const void* weights, const DistillationSums& sums, void* const* gradients) {
        with_type(p.student.dtype, [&](auto e) { distillation::backward<decltype(e)>(p, weights, sums, gradients); });
      },
      [](const LogitViews& teacher, double scale, const void* logsums, void* out, int threads) {
        with_type(teacher.dtype,
                  [&](auto e) { distillation::column_logsums<decltype(e)>(teacher, scale, logsums, out, threads); });
      },
  };
}

}  // namespace hsv::HSV_ISA
