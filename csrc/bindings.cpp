// hsv_kernels._C: plain pointers, shapes and strides in, nothing of PyTorch. A function has the name of its operation
// and then that of what it does, as in hsv::Kernels; those of csrc/cuda have `cuda` before both.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <tuple>
#include <utility>
#include <vector>

#include "cpu/dispatch.h"
#ifdef HSV_HAS_CUDA
#include "cuda/masking.h"
#include "cuda/reconstruction.h"
#endif

namespace py = pybind11;

namespace {

using Address = uintptr_t;  // of a tensor's first element

template <class T = void>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

hsv::DType dtype_of(int code) {
  return static_cast<hsv::DType>(code);
}

void define_contrast(py::module_& m) {
  using Release = py::call_guard<py::gil_scoped_release>;
  using View = std::tuple<uintptr_t, int64_t, int64_t>;  // address, row stride, column stride
  py::class_<hsv::ContrastProblem>(m, "ContrastProblem")
      .def(py::init([](int dtype, const std::vector<View>& views, int64_t rows, int64_t dim, double scale,
                       bool exclude_self, bool bfloat16, int shift, int threads) {
             hsv::ContrastProblem p{
                 dtype_of(dtype), static_cast<int>(views.size()), {},      rows,   dim, scale, exclude_self,
                 bfloat16,        static_cast<hsv::Shift>(shift), threads, nullptr};
             for (size_t i = 0; i < views.size(); i++) {
               p.view[i] = {pointer(std::get<0>(views[i])), std::get<1>(views[i]), std::get<2>(views[i])};
             }
             return p;
           }),
           py::kw_only(), py::arg("dtype"), py::arg("views"), py::arg("rows"), py::arg("dim"), py::arg("scale"),
           py::arg("exclude_self"), py::arg("bfloat16"), py::arg("shift"), py::arg("threads"));
  m.def("contrast_workspace", [](const hsv::ContrastProblem& p, bool backward) {
    return hsv::active_kernels().contrast.workspace(p, backward);
  });
  m.def(
      "contrast_forward",
      [](hsv::ContrastProblem p, uintptr_t workspace, uintptr_t lse, uintptr_t losses, uintptr_t d, uintptr_t sums,
         uintptr_t exponentials) {
        p.workspace = pointer(workspace);
        hsv::active_kernels().contrast.forward(
            p, {pointer(lse), pointer(losses), pointer(d), pointer(sums), pointer(exponentials)});
      },
      Release());
  m.def(
      "contrast_backward",
      [](hsv::ContrastProblem p, uintptr_t workspace, uintptr_t grad, uintptr_t sums, uintptr_t d,
         const std::vector<uintptr_t>& view_grad, uintptr_t scale_grad, uintptr_t exponentials) {
        p.workspace = pointer(workspace);
        hsv::ContrastBackward b{
            pointer(grad),        pointer(sums), pointer(d), {}, static_cast<double*>(pointer(scale_grad)),
            pointer(exponentials)};
        for (size_t i = 0; i < view_grad.size(); i++) b.view_grad[i] = pointer(view_grad[i]);
        hsv::active_kernels().contrast.backward(p, b);
      },
      Release());
}

void define_rectangle(py::module_& m) {
  using Release = py::call_guard<py::gil_scoped_release>;
  using View = std::tuple<Address, int64_t, int64_t>;  // address, row stride, column stride
  const auto rows = [](const View& v) { return hsv::Rows{pointer(std::get<0>(v)), std::get<1>(v), std::get<2>(v)}; };
  py::class_<hsv::RectangleProblem>(m, "RectangleProblem")
      .def(py::init([rows](int dtype, const View& q, const View& k, int64_t n, int64_t keys, int64_t dim, double scale,
                           bool exclude_self, int64_t self_offset, Address positive, Address q_labels, Address k_labels,
                           bool bfloat16, int threads) {
             return hsv::RectangleProblem{dtype_of(dtype),
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
  m.def("rectangle_workspace", [](const hsv::RectangleProblem& p, bool mean_key, bool backward) {
    return hsv::active_kernels().rectangle.workspace(p, mean_key, backward);
  });
  m.def(
      "rectangle_forward",
      [rows](hsv::RectangleProblem p, Address workspace, const View& positive_rows, Address lse, Address positive_logit,
             Address mean_key, Address log2_sum) {
        p.workspace = pointer(workspace);
        hsv::active_kernels().rectangle.forward(
            p, {rows(positive_rows), pointer(lse), pointer(positive_logit), pointer(mean_key), pointer(log2_sum)});
      },
      Release());
  m.def(
      "rectangle_backward",
      [](hsv::RectangleProblem p, Address workspace, Address grad, Address positive_grad, Address log2_sum,
         Address besides, Address k_grad) {
        p.workspace = pointer(workspace);
        hsv::active_kernels().rectangle.backward(
            p, {pointer(grad), pointer(positive_grad), pointer(log2_sum), pointer(besides), pointer(k_grad)});
      },
      Release());
}

// Strides and shapes as Python hands them over, in elements.
using Four = std::array<int64_t, 4>;

hsv::PatchGrid patch_grid(const Four& shape, const Four& strides, int64_t p, int64_t q) {
  return {shape[0], shape[1], shape[2] / p, shape[3] / q, p, q, strides[0], strides[1], strides[2], strides[3]};
}

void define_cosine(py::module_& m) {
  using Release = py::call_guard<py::gil_scoped_release>;
  using View = std::pair<Address, int64_t>;  // address, row stride
  py::class_<hsv::CosineProblem>(m, "CosineProblem")
      .def(py::init([](int dtype, View p, View z, int64_t rows, int64_t dim, double eps, int threads) {
             return hsv::CosineProblem{
                 dtype_of(dtype), rows, dim, {pointer(p.first), p.second}, {pointer(z.first), z.second}, eps, threads};
           }),
           py::kw_only(), py::arg("dtype"), py::arg("p"), py::arg("z"), py::arg("rows"), py::arg("dim"), py::arg("eps"),
           py::arg("threads"));
  m.def(
      "cosine_forward",
      [](const hsv::CosineProblem& problem, Address losses, Address inv_norm) {
        hsv::active_kernels().cosine.forward(problem, pointer(losses), pointer(inv_norm));
      },
      Release());
  m.def(
      "cosine_backward",
      [](const hsv::CosineProblem& problem, Address grad, Address losses, Address inv_norm, Address p_grad,
         Address z_grad) {
        hsv::active_kernels().cosine.backward(problem, pointer(grad), pointer(losses), pointer(inv_norm),
                                              pointer(p_grad), pointer(z_grad));
      },
      Release());
}

// Views and pairs of a call, which own what a DistillationProblem points to.
struct Distillation {
  using View = std::pair<Address, int64_t>;  // address, row stride

  Distillation(int dtype, const std::vector<View>& students, const std::vector<View>& teachers, int64_t rows,
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

  static std::vector<hsv::LogitView> logits(const std::vector<View>& views) {
    std::vector<hsv::LogitView> found;
    for (const View& view : views) found.push_back({pointer(view.first), view.second});
    return found;
  }
  static hsv::LogitViews views(int dtype, const std::vector<hsv::LogitView>& view, int64_t rows, int64_t classes) {
    return {dtype_of(dtype), rows, classes, view.data(), static_cast<int64_t>(view.size())};
  }

  std::vector<hsv::LogitView> student, teacher;
  std::vector<hsv::ViewPair> pair;
  hsv::DistillationProblem problem;
};

void define_distillation(py::module_& m) {
  using Release = py::call_guard<py::gil_scoped_release>;
  using Views = std::vector<Distillation::View>;
  py::class_<Distillation>(m, "DistillationProblem")
      .def(py::init<int, const Views&, const Views&, int64_t, int64_t, Address, double, double,
                    const std::vector<int64_t>&, int>(),
           py::kw_only(), py::arg("dtype"), py::arg("student"), py::arg("teacher"), py::arg("rows"), py::arg("classes"),
           py::arg("centre"), py::arg("student_scale"), py::arg("teacher_scale"), py::arg("pairs"), py::arg("threads"));
  m.def(
      "distillation_forward",
      [](const Distillation& d, Address losses, Address mean, Address student_sums, Address teacher_sums) {
        hsv::active_kernels().distillation.forward(d.problem, pointer(losses), pointer(mean),
                                                   {pointer(student_sums), pointer(teacher_sums)});
      },
      Release());
  m.def(
      "distillation_backward",
      [](const Distillation& d, Address weights, Address student_sums, Address teacher_sums,
         const std::vector<Address>& gradients) {
        std::vector<void*> gradient;
        for (const Address address : gradients) gradient.push_back(pointer(address));
        hsv::active_kernels().distillation.backward(d.problem, pointer(weights),
                                                    {pointer(student_sums), pointer(teacher_sums)}, gradient.data());
      },
      Release());
  m.def(
      "distillation_column_logsums",
      [](int dtype, const Views& teacher, int64_t rows, int64_t classes, double scale, Address logsums, Address out,
         int threads) {
        const std::vector<hsv::LogitView> view = Distillation::logits(teacher);
        hsv::active_kernels().distillation.column_logsums(Distillation::views(dtype, view, rows, classes), scale,
                                                          pointer(logsums), pointer(out), threads);
      },
      Release());
}

void define_reconstruction(py::module_& m) {
  m.def(
      "reconstruction_forward",
      [](Address pred, int pred_dtype, std::array<int64_t, 2> pred_strides, Address images, int images_dtype,
         const Four& shape, const Four& strides, int64_t p, int64_t q, Address mask, bool norm_pix, Address losses,
         Address mean, Address rstd, int threads) {
        hsv::active_kernels().reconstruction.forward(
            {pointer(pred), dtype_of(pred_dtype), pred_strides[0], pred_strides[1]}, pointer(images),
            dtype_of(images_dtype), patch_grid(shape, strides, p, q), pointer(mask), norm_pix, pointer(losses),
            pointer(mean), pointer(rstd), threads);
      },
      py::call_guard<py::gil_scoped_release>());
  m.def(
      "reconstruction_backward",
      [](Address pred, int pred_dtype, std::array<int64_t, 2> pred_strides, Address images, int images_dtype,
         const Four& shape, const Four& strides, int64_t p, int64_t q, Address mask, Address weights, Address mean,
         Address rstd, Address gradient, int threads) {
        hsv::active_kernels().reconstruction.backward(
            {pointer(pred), dtype_of(pred_dtype), pred_strides[0], pred_strides[1]}, pointer(images),
            dtype_of(images_dtype), patch_grid(shape, strides, p, q), pointer(mask), pointer(weights), pointer(mean),
            pointer(rstd), pointer(gradient), threads);
      },
      py::call_guard<py::gil_scoped_release>());
}

using Strides = std::array<int64_t, 7>;

hsv::Patches patches(const Strides& s) {
  return {s[0], s[1], s[2], s[3], s[4], s[5], s[6]};
}

void define_masking(py::module_& m) {
  using release = py::call_guard<py::gil_scoped_release>;
  m.def(
      "masking_random_masking",
      [](uint64_t seed, uint64_t offset, uint32_t first_index, int64_t B, int64_t L, int64_t K, Address ids_keep,
         Address ids_restore, Address mask, Address keys, int threads) {
        hsv::active_kernels().masking.random_masking(seed, offset, first_index, B, L, K, pointer<int64_t>(ids_keep),
                                                     pointer<int64_t>(ids_restore), pointer<float>(mask),
                                                     pointer<uint32_t>(keys), threads);
      },
      release());
  m.def(
      "masking_invert",
      [](Address ids, int64_t batch, int64_t column, int64_t B, int64_t N, int64_t M, int64_t limit, Address table,
         int threads) {
        return hsv::active_kernels().masking.invert({pointer<int64_t>(ids), batch, column}, B, N, M, limit,
                                                    pointer<int64_t>(table), threads);
      },
      release());
  m.def(
      "masking_gather",
      [](int element_size, Address source, const Strides& from, Address fill, Address ids, int64_t batch,
         int64_t column, int64_t B, int64_t N, int64_t count, int64_t limit, const std::array<int64_t, 3>& shape,
         Address out, const Strides& to, int threads) {
        return hsv::active_kernels().masking.gather(element_size, pointer<void>(source), patches(from),
                                                    pointer<void>(fill), {pointer<int64_t>(ids), batch, column}, B, N,
                                                    count, limit, {shape[0], shape[1], shape[2]}, pointer<void>(out),
                                                    patches(to), threads);
      },
      release());
  m.def(
      "masking_masked_sum",
      [](int dtype, Address grad, const std::array<int64_t, 3>& strides, Address ids, int64_t batch, int64_t column,
         int64_t B, int64_t L, int64_t K, int64_t D, Address partial, Address sum, int threads) {
        hsv::active_kernels().masking.masked_sum(dtype_of(dtype), pointer<void>(grad), strides[0], strides[1],
                                                 strides[2], {pointer<int64_t>(ids), batch, column}, B, L, K, D,
                                                 pointer<void>(partial), pointer<void>(sum), threads);
      },
      release());
}

void define_limits(py::module_& m) {
  using release = py::call_guard<py::gil_scoped_release>;
  m.def(
      "limits_fma", [](double seconds, int threads) { return hsv::active_kernels().limits.fma(seconds, threads); },
      release(), "float32 flops / s of multiply-adds");
  m.def(
      "limits_dot_bf16",
      [](double seconds, int threads) { return hsv::active_kernels().limits.dot_bf16(seconds, threads); }, release(),
      "flops / s of bfloat16 dot products, 0 where the instruction set has none");
  m.def(
      "limits_exponentials",
      [](double seconds, int threads) { return hsv::active_kernels().limits.exponentials(seconds, threads); },
      release(), "2^x / s");
  m.def(
      "limits_copy",
      [](Address to, Address from, int64_t bytes, double seconds, int threads) {
        return hsv::active_kernels().limits.copy(pointer(to), pointer(from), bytes, seconds, threads);
      },
      release(), "bytes read plus written / s");
}

#ifdef HSV_HAS_CUDA
void define_cuda_masking(py::module_& m) {
  using release = py::call_guard<py::gil_scoped_release>;
  m.def(
      "cuda_masking_random_masking",
      [](int device, Address stream, Address seed, Address offset, uint32_t first_index, int64_t B, int64_t L,
         int64_t K, Address ids_keep, Address ids_restore, Address mask) {
        hsv::cuda::random_masking({device, stream}, pointer<int64_t>(seed), pointer<int64_t>(offset), first_index, B, L,
                                  K, pointer<int64_t>(ids_keep), pointer<int64_t>(ids_restore), pointer<float>(mask));
      },
      release());
  m.def(
      "cuda_masking_gather",
      [](int device, Address stream, int element_size, Address source, const Strides& from, Address fill, Address ids,
         int64_t batch, int64_t column, int64_t B, int64_t N, int64_t count, const std::array<int64_t, 3>& shape,
         Address out) {
        hsv::cuda::gather({device, stream}, element_size, pointer<void>(source), patches(from), pointer<void>(fill),
                          {pointer<int64_t>(ids), batch, column}, B, N, count, {shape[0], shape[1], shape[2]},
                          pointer<void>(out));
      },
      release());
  m.def(
      "cuda_masking_scatter",
      [](int device, Address stream, int element_size, Address grad, const std::array<int64_t, 3>& strides, Address ids,
         int64_t batch, int64_t column, int64_t B, int64_t N, int64_t L, const std::array<int64_t, 3>& shape,
         Address out, const Strides& to) {
        hsv::cuda::scatter({device, stream}, element_size, pointer<void>(grad), strides[0], strides[1], strides[2],
                           {pointer<int64_t>(ids), batch, column}, B, N, L, {shape[0], shape[1], shape[2]},
                           pointer<void>(out), patches(to));
      },
      release());
  m.def(
      "cuda_masking_masked_sum",
      [](int device, Address stream, int dtype, Address grad, const std::array<int64_t, 3>& strides, Address ids,
         int64_t batch, int64_t column, int64_t B, int64_t L, int64_t K, int64_t D, Address partial) {
        hsv::cuda::masked_sum({device, stream}, dtype_of(dtype), pointer<void>(grad), strides[0], strides[1],
                              strides[2], {pointer<int64_t>(ids), batch, column}, B, L, K, D, pointer<float>(partial));
      },
      release());
}

void define_cuda_reconstruction(py::module_& m) {
  using release = py::call_guard<py::gil_scoped_release>;
  using Three = std::array<int64_t, 3>;
  py::class_<hsv::cuda::ReconstructionProblem>(m, "CudaReconstructionProblem")
      .def(py::init([](Address pred, int pred_dtype, const Three& pred_strides, Address images, int images_dtype,
                       const Strides& strides, const Three& shape, Address mask, int64_t B, int64_t L) {
             return hsv::cuda::ReconstructionProblem{dtype_of(pred_dtype),
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
      [](int device, Address stream, const hsv::cuda::ReconstructionProblem& problem, bool norm_pix, Address losses,
         Address mean, Address rstd) {
        hsv::cuda::reconstruction_forward({device, stream}, problem, norm_pix, pointer<float>(losses),
                                          pointer<float>(mean), pointer<float>(rstd));
      },
      release());
  m.def(
      "cuda_reconstruction_backward",
      [](int device, Address stream, const hsv::cuda::ReconstructionProblem& problem, Address weights, Address mean,
         Address rstd, Address gradient) {
        hsv::cuda::reconstruction_backward({device, stream}, problem, pointer<float>(weights), pointer<float>(mean),
                                           pointer<float>(rstd), pointer(gradient));
      },
      release());
}
#endif

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled operations of hsv_kernels over plain pointers";
  m.def("cpu_isa", [] { return hsv::active_kernels().isa; }, "Instruction set of the CPU kernels in use");
  m.def(
      "cpu_isas",
      [] {
        std::vector<const char*> names;
        for (const hsv::Kernels* kernels : hsv::usable_kernels()) names.push_back(kernels->isa);
        return names;
      },
      "Instruction sets that are built and that this machine can run, the best first");
  define_contrast(m);
  define_rectangle(m);
  define_cosine(m);
  define_distillation(m);
#ifdef HSV_HAS_CUDA
  m.attr("has_cuda") = true;
  define_cuda_masking(m);
  define_cuda_reconstruction(m);
#else
  m.attr("has_cuda") = false;
#endif
  define_limits(m);
  define_masking(m);
  define_reconstruction(m);
}
