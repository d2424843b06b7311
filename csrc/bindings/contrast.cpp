// NT-Xent and the logsumexp of a square of similarities: csrc/cpu/contrast.h.
#include <vector>

#include "bindings/bindings.h"
#include "cpu/dispatch.h"

namespace hsv::bindings {

void define_contrast(py::module_& m) {
  py::class_<ContrastProblem>(m, "ContrastProblem")
      .def(py::init([](int dtype, const std::vector<View>& views, int64_t rows, int64_t dim, double scale,
                       bool exclude_self, bool bfloat16, int shift, int threads) {
             ContrastProblem p{
                 dtype_of(dtype), static_cast<int>(views.size()), {},      rows,   dim, scale, exclude_self,
                 bfloat16,        static_cast<Shift>(shift),      threads, nullptr};
             for (size_t i = 0; i < views.size(); i++) {
               p.view[i] = {pointer(std::get<0>(views[i])), std::get<1>(views[i]), std::get<2>(views[i])};
             }
             return p;
           }),
           py::kw_only(), py::arg("dtype"), py::arg("views"), py::arg("rows"), py::arg("dim"), py::arg("scale"),
           py::arg("exclude_self"), py::arg("bfloat16"), py::arg("shift"), py::arg("threads"));
  m.def("contrast_workspace",
        [](const ContrastProblem& p, bool backward) { return active_kernels().contrast.workspace(p, backward); });
  m.def(
      "contrast_forward",
      [](ContrastProblem p, Address workspace, Address lse, Address losses, Address d, Address sums,
         Address exponentials) {
        p.workspace = pointer(workspace);
        active_kernels().contrast.forward(
            p, {pointer(lse), pointer(losses), pointer(d), pointer(sums), pointer(exponentials)});
      },
      Release());
  m.def(
      "contrast_backward",
      [](ContrastProblem p, Address workspace, Address grad, Address sums, Address d,
         const std::vector<Address>& view_grad, Address scale_grad, Address exponentials) {
        p.workspace = pointer(workspace);
        ContrastBackward b{
            pointer(grad),        pointer(sums), pointer(d), {}, static_cast<double*>(pointer(scale_grad)),
            pointer(exponentials)};
        for (size_t i = 0; i < view_grad.size(); i++) b.view_grad[i] = pointer(view_grad[i]);
        active_kernels().contrast.backward(p, b);
      },
      Release());
}

}  // namespace hsv::bindings
