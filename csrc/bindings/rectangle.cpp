// The logsumexp of queries against keys: csrc/cpu/contrast_rectangle.h.
#include "bindings/bindings.h"
#include "cpu/dispatch.h"

namespace hsv::bindings {

void define_rectangle(py::module_& m) {
  const auto rows = [](const View& v) { return Rows{pointer(std::get<0>(v)), std::get<1>(v), std::get<2>(v)}; };
  py::class_<RectangleProblem>(m, "RectangleProblem")
      .def(py::init([rows](int dtype, const View& q, const View& k, int64_t n, int64_t keys, int64_t dim, double scale,
                           bool exclude_self, int64_t self_offset, Address positive, Address q_labels, Address k_labels,
                           bool bfloat16, int threads) {
             return RectangleProblem{dtype_of(dtype),
                                     rows(q),
                                     rows(k),
                                     n,
                                     keys,
                                     dim,
                                     scale,
                                     exclude_self,
                                     self_offset,
                                     pointer<int64_t>(positive),
                                     pointer<int32_t>(q_labels),
                                     pointer<int32_t>(k_labels),
                                     bfloat16,
                                     threads,
                                     nullptr};
           }),
           py::kw_only(), py::arg("dtype"), py::arg("q"), py::arg("k"), py::arg("n"), py::arg("m"), py::arg("dim"),
           py::arg("scale"), py::arg("exclude_self"), py::arg("self_offset"), py::arg("positive"), py::arg("q_labels"),
           py::arg("k_labels"), py::arg("bfloat16"), py::arg("threads"));
  m.def("rectangle_workspace", [](const RectangleProblem& p, bool mean_key, bool backward) {
    return active_kernels().rectangle.workspace(p, mean_key, backward);
  });
  m.def(
      "rectangle_forward",
      [rows](RectangleProblem p, Address workspace, const View& positive_rows, Address lse, Address positive_logit,
             Address mean_key, Address log2_sum) {
        p.workspace = pointer(workspace);
        active_kernels().rectangle.forward(
            p, {rows(positive_rows), pointer(lse), pointer(positive_logit), pointer(mean_key), pointer(log2_sum)});
      },
      Release());
  m.def(
      "rectangle_backward",
      [](RectangleProblem p, Address workspace, Address grad, Address positive_grad, Address log2_sum, Address besides,
         Address k_grad) {
        p.workspace = pointer(workspace);
        active_kernels().rectangle.backward(
            p, {pointer(grad), pointer(positive_grad), pointer(log2_sum), pointer(besides), pointer(k_grad)});
      },
      Release());
}

}  // namespace hsv::bindings
