// What the bindings share. Tensors come as plain pointers, shapes and strides in elements, nothing of PyTorch.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <tuple>
#include <utility>

#include "cpu/elements.h"
#include "cpu/masking.h"

namespace hsv::bindings {

namespace py = pybind11;

using Address = uintptr_t;                           // of a tensor's first element; 0 is null
using View = std::tuple<Address, int64_t, int64_t>;  // rows of any stride: address, row stride, column stride
using UnitView = std::pair<Address, int64_t>;        // rows of neighbouring values: address, row stride
using Three = std::array<int64_t, 3>;
using Four = std::array<int64_t, 4>;
using Strides = std::array<int64_t, 7>;                  // ops/patches.py
using Release = py::call_guard<py::gil_scoped_release>;  // other threads of Python run meanwhile

template <class T = void>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

inline DType dtype_of(int code) {
  return static_cast<DType>(code);
}

inline Patches patches(const Strides& s) {
  return {s[0], s[1], s[2], s[3], s[4], s[5], s[6]};
}

void define_contrast(py::module_& m);
void define_rectangle(py::module_& m);
void define_cosine(py::module_& m);
void define_distillation(py::module_& m);
void define_masking(py::module_& m);
void define_reconstruction(py::module_& m);
void define_limits(py::module_& m);
#ifdef HSV_HAS_CUDA
void define_cuda_masking(py::module_& m);
void define_cuda_reconstruction(py::module_& m);
#endif

}  // namespace hsv::bindings
