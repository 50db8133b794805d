#include "bindings/recording.h"

#include "bindings/bindings.h"

namespace llmos {

void bind_recording(py::module_& module) {
  py::class_<Recording>(module, "Recording")
      .def(py::init())
      .def("__enter__",
           [](Recording& self) {
             if (current_recording())
               throw std::invalid_argument("capture: function must not capture another");
             current_recording() = &self;
           })
      .def("__exit__", [](Recording&, const py::args&) { current_recording() = nullptr; })
      .def("__len__", &Recording::size)
      .def("replay", &Recording::replay, ReleaseGil());
}

}  // namespace llmos
