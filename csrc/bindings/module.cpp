// hsv_kernels._C. A function has the name of its operation and then that of what it does, as in hsv::Kernels; those of
// csrc/cuda have `cuda` before both.
#include <vector>

#include "bindings/bindings.h"
#include "cpu/dispatch.h"

PYBIND11_MODULE(_C, m) {
  using namespace hsv;
  m.doc() = "Compiled operations of hsv_kernels over plain pointers";
  m.def("cpu_isa", [] { return active_kernels().isa; }, "Instruction set of the CPU kernels in use");
  m.def(
      "cpu_isas",
      [] {
        std::vector<const char*> names;
        for (const Kernels* kernels : usable_kernels()) names.push_back(kernels->isa);
        return names;
      },
      "Instruction sets that are built and that this machine can run, the best first");
  bindings::define_contrast(m);
  bindings::define_rectangle(m);
  bindings::define_cosine(m);
  bindings::define_distillation(m);
  bindings::define_masking(m);
  bindings::define_reconstruction(m);
  bindings::define_limits(m);
#ifdef HSV_HAS_CUDA
  m.attr("has_cuda") = true;
  bindings::define_cuda_masking(m);
  bindings::define_cuda_reconstruction(m);
#else
  m.attr("has_cuda") = false;
#endif
}
