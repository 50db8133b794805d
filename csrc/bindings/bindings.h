// One function per op adds its kernels to the extension module. What crosses this border is a
// tensor (tensor.h), a raw address, a size or a number: native/*.py owns every check.
#pragma once

#include <pybind11/pybind11.h>

namespace llmos {

namespace py = pybind11;
using Address = uintptr_t;  // tensor.data_ptr()
using ReleaseGil = py::call_guard<py::gil_scoped_release>;

template <typename T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

void connect_tensors();  // before any of them is read
void bind_attention(py::module_& module);
void bind_elementwise(py::module_& module);
void bind_optimizer(py::module_& module);
void bind_quant_matmul(py::module_& module);
void bind_recording(py::module_& module);

}  // namespace llmos
