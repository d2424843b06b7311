#include "cpu/contrast_rectangle.h"

#include "cpu/contrast_rectangle_forward.h"
#include "cpu/contrast_rectangle_gradient.h"

namespace hsv::HSV_ISA {

RectangleKernels rectangle_kernels() {
  return {
      [](const RectangleProblem& p, const RectangleForward& f) {
        with_elements(p.dtype, p.bfloat16, [&](auto element) { rectangle::forward<decltype(element)>(p, f); });
      },
      [](const RectangleProblem& p, const RectangleBackward& b) {
        with_elements(p.dtype, p.bfloat16, [&](auto element) { rectangle::backward<decltype(element)>(p, b); });
      },
      [](const RectangleProblem& p, bool mean_key, bool backward) {
        return with_elements(p.dtype, p.bfloat16, [&](auto element) {
          using E = decltype(element);
          Arena arena(nullptr);
          if (backward) {
            rectangle::BackwardMemory<E>(p, arena);
          } else {
            rectangle::ForwardMemory<E>(p, mean_key, arena);
          }
          return arena.used();
        });
      },
  };
}

}  // namespace hsv::HSV_ISA
