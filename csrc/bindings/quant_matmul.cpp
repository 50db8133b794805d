#include "cpu/quant_matmul.h"

#include "bindings/bindings.h"

namespace llmos {

namespace {

WeightShape weight_shape(int64_t n, int64_t k, int64_t group_size, int format) {
  return {n, k, group_size, static_cast<WeightFormat>(format)};
}

}  // namespace

void bind_quant_matmul(py::module_& module) {
  module.def(
      "quant_matmul",
      [](Address x, Address packed, Address scales, Address zeros, Address bias, Address out,
         int64_t m, int64_t n, int64_t k, int64_t group_size, int format, int activation,
         bool integer, bool bf16) {
        quant_matmul({pointer<const void>(x), pointer<const uint8_t>(packed),
                      pointer<const float>(scales), pointer<const uint8_t>(zeros),
                      pointer<const float>(bias), pointer<void>(out), m,
                      weight_shape(n, k, group_size, format), static_cast<Activation>(activation),
                      integer, bf16});
      },
      ReleaseGil());
  module.def(
      "dequantize",
      [](Address packed, Address scales, Address zeros, Address out, int64_t n, int64_t k,
         int64_t group_size, int format, bool bf16) {
        dequantize(weight_shape(n, k, group_size, format), pointer<const uint8_t>(packed),
                   pointer<const float>(scales), pointer<const uint8_t>(zeros), bf16,
                   pointer<void>(out));
      },
      ReleaseGil());
}

}  // namespace llmos
