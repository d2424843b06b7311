// The masked mean squared error: csrc/cpu/reconstruction.h.
#include <array>

#include "bindings/bindings.h"
#include "cpu/dispatch.h"

namespace hsv::bindings {
namespace {

PatchGrid patch_grid(const Four& shape, const Four& strides, int64_t p, int64_t q) {
  return {shape[0], shape[1], shape[2] / p, shape[3] / q, p, q, strides[0], strides[1], strides[2], strides[3]};
}

}  // namespace

void define_reconstruction(py::module_& m) {
  m.def(
      "reconstruction_forward",
      [](Address pred, int pred_dtype, std::array<int64_t, 2> pred_strides, Address images, int images_dtype,
         const Four& shape, const Four& strides, int64_t p, int64_t q, Address mask, bool norm_pix, Address losses,
         Address mean, Address rstd, int threads) {
        active_kernels().reconstruction.forward({pointer(pred), dtype_of(pred_dtype), pred_strides[0], pred_strides[1]},
                                                pointer(images), dtype_of(images_dtype),
                                                patch_grid(shape, strides, p, q), pointer(mask), norm_pix,
                                                pointer(losses), pointer(mean), pointer(rstd), threads);
      },
      Release());
  m.def(
      "reconstruction_backward",
      [](Address pred, int pred_dtype, std::array<int64_t, 2> pred_strides, Address images, int images_dtype,
         const Four& shape, const Four& strides, int64_t p, int64_t q, Address mask, Address weights, Address mean,
         Address rstd, Address gradient, int threads) {
        active_kernels().reconstruction.backward(
            {pointer(pred), dtype_of(pred_dtype), pred_strides[0], pred_strides[1]}, pointer(images),
            dtype_of(images_dtype), patch_grid(shape, strides, p, q), pointer(mask), pointer(weights), pointer(mean),
            pointer(rstd), pointer(gradient), threads);
      },
      Release());
}

}  // namespace hsv::bindings
