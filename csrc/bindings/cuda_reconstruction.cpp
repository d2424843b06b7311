// The masked mean squared error on a CUDA device: csrc/cuda/reconstruction.h.
#include "bindings/bindings.h"
#include "cuda/reconstruction.h"

namespace hsv::bindings {

void define_cuda_reconstruction(py::module_& m) {
  py::class_<cuda::ReconstructionProblem>(m, "CudaReconstructionProblem")
      .def(py::init([](Address pred, int pred_dtype, const Three& pred_strides, Address images, int images_dtype,
                       const Strides& strides, const Three& shape, Address mask, int64_t B, int64_t L) {
             return cuda::ReconstructionProblem{dtype_of(pred_dtype),
                                                dtype_of(images_dtype),
                                                pointer(pred),
                                                pred_strides[0],
                                                pred_strides[1],
                                                pred_strides[2],
                                                pointer(images),
                                                patches(strides),
                                                {shape[0], shape[1], shape[2]},
                                                pointer<float>(mask),
                                                B,
                                                L};
           }),
           py::kw_only(), py::arg("pred"), py::arg("pred_dtype"), py::arg("pred_strides"), py::arg("images"),
           py::arg("images_dtype"), py::arg("strides"), py::arg("shape"), py::arg("mask"), py::arg("B"), py::arg("L"));
  m.def(
      "cuda_reconstruction_forward",
      [](int device, Address stream, const cuda::ReconstructionProblem& problem, bool norm_pix, Address losses,
         Address mean, Address rstd) {
        cuda::reconstruction_forward({device, stream}, problem, norm_pix, pointer<float>(losses), pointer<float>(mean),
                                     pointer<float>(rstd));
      },
      Release());
  m.def(
      "cuda_reconstruction_backward",
      [](int device, Address stream, const cuda::ReconstructionProblem& problem, Address weights, Address mean,
         Address rstd, Address gradient) {
        cuda::reconstruction_backward({device, stream}, problem, pointer<float>(weights), pointer<float>(mean),
                                      pointer<float>(rstd), pointer(gradient));
      },
      Release());
}

}  // namespace hsv::bindings
