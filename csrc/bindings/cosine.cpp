// The negative cosine: csrc/cpu/cosine.h.
#include "bindings/bindings.h"
#include "cpu/dispatch.h"

namespace hsv::bindings {

void define_cosine(py::module_& m) {
  py::class_<CosineProblem>(m, "CosineProblem")
      .def(py::init([](int dtype, UnitView p, UnitView z, int64_t rows, int64_t dim, double eps, int threads) {
             return CosineProblem{
                 dtype_of(dtype), rows, dim, {pointer(p.first), p.second}, {pointer(z.first), z.second}, eps, threads};
           }),
           py::kw_only(), py::arg("dtype"), py::arg("p"), py::arg("z"), py::arg("rows"), py::arg("dim"), py::arg("eps"),
           py::arg("threads"));
  m.def(
      "cosine_forward",
      [](const CosineProblem& problem, Address losses, Address inv_norm) {
        active_kernels().cosine.forward(problem, pointer(losses), pointer(inv_norm));
      },
      Release());
  m.def(
      "cosine_backward",
      [](const CosineProblem& problem, Address grad, Address losses, Address inv_norm, Address p_grad, Address z_grad) {
        active_kernels().cosine.backward(problem, pointer(grad), pointer(losses), pointer(inv_norm), pointer(p_grad),
                                         pointer(z_grad));
      },
      Release());
}

}  // namespace hsv::bindings
