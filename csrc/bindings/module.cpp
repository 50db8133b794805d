#include "bindings/bindings.h"

#include <omp.h>
#include <pybind11/stl.h>

#include "cpu/dispatch.h"

PYBIND11_MODULE(_C, module) {
  using namespace llmos;
  module.doc() = "CPU kernels of llmos_fast; called by llmos_fast.native only";
  module.def("cpu_sets", &cpu_sets);
  module.def("force_cpu", &force_cpu);
  module.def("forced_cpu", &forced_cpu);
  module.def("max_threads", &omp_get_max_threads);
  module.def("threads_are_bound", [] { return omp_get_proc_bind() != omp_proc_bind_false; });
  connect_tensors();
  bind_attention(module);
  bind_elementwise(module);
  bind_optimizer(module);
  bind_quant_matmul(module);
  bind_recording(module);
}
