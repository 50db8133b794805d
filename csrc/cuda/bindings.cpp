#include "bindings/bindings.h"

#include <pybind11/stl.h>

#include <stdexcept>
#include <string>

#include "cuda/dequantize.h"

namespace llmos {

namespace {

FloatType float_type(const std::string& name) {
  if (name == "float32") return FloatType::kFp32;
  if (name == "bfloat16") return FloatType::kBf16;
  if (name == "float16") return FloatType::kFp16;
  throw std::invalid_argument("dequantize: dtype must be float32, bfloat16 or float16, got " +
                              name);
}

void dequantize(Address packed, Address scales, Address zeros, Address out, int64_t n, int64_t k,
                int64_t group_size, int format, const std::string& dtype, Address stream) {
  const WeightShape shape{n, k, group_size, static_cast<WeightFormat>(format)};
  const int error = cuda_dequantize(shape, pointer<const uint8_t>(packed),
                                    pointer<const float>(scales), pointer<const uint8_t>(zeros),
                                    float_type(dtype), pointer<void>(out), pointer<void>(stream));
  if (error != 0)
    throw std::runtime_error("CUDA kernel dequantize of a (" + std::to_string(n) + ", " +
                             std::to_string(k) + ") weight: " + cuda_error_name(error));
}

}  // namespace

}  // namespace llmos

PYBIND11_MODULE(_CUDA, module) {
  module.doc() = "CUDA kernels of llmos_fast; called by llmos_fast.native only";
  module.def("dequantize", &llmos::dequantize, llmos::ReleaseGil());
}
