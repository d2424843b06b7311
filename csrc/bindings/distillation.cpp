// Distillation and Sinkhorn–Knopp: csrc/cpu/distillation.h.
#include <vector>

#include "bindings/bindings.h"
#include "cpu/dispatch.h"

namespace hsv::bindings {
namespace {

// Views and pairs of a call, which own what a DistillationProblem points to.
struct Distillation {
  Distillation(int dtype, const std::vector<UnitView>& students, const std::vector<UnitView>& teachers, int64_t rows,
               int64_t classes, Address centre, double student_scale, double teacher_scale,
               const std::vector<int64_t>& alternating, int threads)
      : student(logits(students)), teacher(logits(teachers)) {
    for (size_t j = 0; j + 1 < alternating.size(); j += 2) pair.push_back({alternating[j], alternating[j + 1]});
    problem = {views(dtype, student, rows, classes),
               views(dtype, teacher, rows, classes),
               pointer(centre),
               student_scale,
               teacher_scale,
               pair.data(),
               static_cast<int64_t>(pair.size()),
               threads};
  }
  Distillation(const Distillation&) = delete;

  static std::vector<LogitView> logits(const std::vector<UnitView>& views) {
    std::vector<LogitView> found;
    for (const UnitView& view : views) found.push_back({pointer(view.first), view.second});
    return found;
  }
  static LogitViews views(int dtype, const std::vector<LogitView>& view, int64_t rows, int64_t classes) {
    return {dtype_of(dtype), rows, classes, view.data(), static_cast<int64_t>(view.size())};
  }

  std::vector<LogitView> student, teacher;
  std::vector<ViewPair> pair;
  DistillationProblem problem;
};

}  // namespace

void define_distillation(py::module_& m) {
  using Views = std::vector<UnitView>;
  py::class_<Distillation>(m, "DistillationProblem")
      .def(py::init<int, const Views&, const Views&, int64_t, int64_t, Address, double, double,
                    const std::vector<int64_t>&, int>(),
           py::kw_only(), py::arg("dtype"), py::arg("student"), py::arg("teacher"), py::arg("rows"), py::arg("classes"),
           py::arg("centre"), py::arg("student_scale"), py::arg("teacher_scale"), py::arg("pairs"), py::arg("threads"));
  m.def(
      "distillation_forward",
      [](const Distillation& d, Address losses, Address mean, Address student_sums, Address teacher_sums) {
        active_kernels().distillation.forward(d.problem, pointer(losses), pointer(mean),
                                              {pointer(student_sums), pointer(teacher_sums)});
      },
      Release());
  m.def(
      "distillation_backward",
      [](const Distillation& d, Address weights, Address student_sums, Address teacher_sums,
         const std::vector<Address>& gradients) {
        std::vector<void*> gradient;
        for (const Address address : gradients) gradient.push_back(pointer(address));
        active_kernels().distillation.backward(d.problem, pointer(weights),
                                               {pointer(student_sums), pointer(teacher_sums)}, gradient.data());
      },
      Release());
  m.def(
      "distillation_column_logsums",
      [](int dtype, const Views& teacher, int64_t rows, int64_t classes, double scale, Address logsums, Address out,
         int threads) {
        const std::vector<LogitView> view = Distillation::logits(teacher);
        active_kernels().distillation.column_logsums(Distillation::views(dtype, view, rows, classes), scale,
                                                     pointer(logsums), pointer(out), threads);
      },
      Release());
}

}  // namespace hsv::bindings
