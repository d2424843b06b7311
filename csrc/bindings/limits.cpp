// The machine's limits: csrc/cpu/limits.h.
#include "bindings/bindings.h"
#include "cpu/dispatch.h"

namespace hsv::bindings {

void define_limits(py::module_& m) {
  m.def(
      "limits_fma", [](double seconds, int threads) { return active_kernels().limits.fma(seconds, threads); },
      Release(), "float32 flops / s of multiply-adds");
  m.def(
      "limits_dot_bf16", [](double seconds, int threads) { return active_kernels().limits.dot_bf16(seconds, threads); },
      Release(), "flops / s of bfloat16 dot products, 0 where the instruction set has none");
  m.def(
      "limits_exponentials",
      [](double seconds, int threads) { return active_kernels().limits.exponentials(seconds, threads); }, Release(),
      "2^x / s");
  m.def(
      "limits_copy",
      [](Address to, Address from, int64_t bytes, double seconds, int threads) {
        return active_kernels().limits.copy(pointer(to), pointer(from), bytes, seconds, threads);
      },
      Release(), "bytes read plus written / s");
}

}  // namespace hsv::bindings
