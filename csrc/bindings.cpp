// hsv_kernels._C: plain pointers, shapes and strides in, nothing of PyTorch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>

#include "cpu/kernels.h"

namespace py = pybind11;

namespace {

using Address = uintptr_t;  // of a tensor's first element

// Strides and shapes as Python hands them over, in elements.
using Four = std::array<int64_t, 4>;

hsv::PatchGrid patch_grid(const Four& shape, const Four& strides, int64_t p, int64_t q) {
  return {shape[0], shape[1], shape[2] / p, shape[3] / q, p, q, strides[0], strides[1], strides[2], strides[3]};
}

void define_reconstruction(py::module_& m) {
  m.def(
      "reconstruction_forward",
      [](Address pred, int pred_type, std::array<int64_t, 2> pred_strides, Address images, int images_type,
         const Four& shape, const Four& strides, int64_t p, int64_t q, Address mask, bool norm_pix, Address losses,
         Address mean, Address rstd, int threads) {
        hsv::active_kernels().reconstruction.forward({(const void*)pred, pred_type, pred_strides[0], pred_strides[1]},
                                                     (const void*)images, images_type, patch_grid(shape, strides, p, q),
                                                     (const void*)mask, norm_pix, (void*)losses, (void*)mean,
                                                     (void*)rstd, threads);
      },
      py::call_guard<py::gil_scoped_release>());
  m.def(
      "reconstruction_backward",
      [](Address pred, int pred_type, std::array<int64_t, 2> pred_strides, Address images, int images_type,
         const Four& shape, const Four& strides, int64_t p, int64_t q, Address mask, Address weights, Address mean,
         Address rstd, Address gradient, int threads) {
        hsv::active_kernels().reconstruction.backward(
            {(const void*)pred, pred_type, pred_strides[0], pred_strides[1]}, (const void*)images, images_type,
            patch_grid(shape, strides, p, q), (const void*)mask, (const void*)weights, (const void*)mean,
            (const void*)rstd, (void*)gradient, threads);
      },
      py::call_guard<py::gil_scoped_release>());
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled operations of hsv_kernels over plain pointers";
  m.def("cpu_isa", [] { return hsv::active_kernels().isa; }, "Instruction set of the CPU kernels in use");
#ifdef HSV_HAS_CUDA
  m.attr("has_cuda") = true;
#else
  m.attr("has_cuda") = false;
#endif
  define_reconstruction(m);
}
