// hsv_kernels._C: plain pointers, shapes and strides in, nothing of PyTorch.
#include <pybind11/pybind11.h>

#include "cpu/kernels.h"

namespace py = pybind11;

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled operations of hsv_kernels over plain pointers";
  m.def("cpu_isa", [] { return hsv::active_kernels().isa; }, "Instruction set of the CPU kernels in use");
#ifdef HSV_HAS_CUDA
  m.attr("has_cuda") = true;
#else
  m.attr("has_cuda") = false;
#endif
}
