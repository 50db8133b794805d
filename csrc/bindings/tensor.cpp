#include "bindings/tensor.h"

#include "bindings/bindings.h"

namespace llmos {

namespace {

struct Exchange {  // DLPackExchangeAPI of DLPack 1
  uint32_t major, minor;
  void* older;
  void* of_owners[3];  // functions that make tensors, and share their memory
  int (*read)(void* object, Tensor* out);
};

const Exchange* exchange = nullptr;

}  // namespace

Tensor read_tensor(py::handle object) {
  Tensor tensor;
  if (exchange->read(object.ptr(), &tensor)) throw py::error_already_set();
  return tensor;
}

void connect_tensors() {
  const py::capsule table =
      py::module_::import("torch").attr("Tensor").attr("__dlpack_c_exchange_api__");
  exchange = table.get_pointer<const Exchange>();
  if (exchange->major != 1)
    throw py::import_error("llmos_fast: this torch has another DLPack than 1");
}

}  // namespace llmos
