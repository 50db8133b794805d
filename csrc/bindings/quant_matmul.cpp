#include "cpu/int8_peak.h"
#include "cpu/quant_matmul.h"

#include "bindings/bindings.h"
#include "bindings/recording.h"

namespace llmos {

namespace {

WeightShape weight_shape(int64_t n, int64_t k, int64_t group_size, int format) {
  return {n, k, group_size, static_cast<WeightFormat>(format)};
}

}  // namespace

void bind_quant_matmul(py::module_& module) {
  module.def("int8_peak", &int8_peak, ReleaseGil());
  module.def(
      "quant_matmul",
      [](Address x, int64_t x_stride, Address packed, Address scales, Address zeros, Address bias,
         Address residual, Address out, int64_t m, int64_t n, int64_t k, int64_t group_size,
         int format, int activation, bool integer, bool bf16, bool gated) {
        run<QuantMatmul>(quant_matmul, {pointer<const void>(x), x_stride, pointer<const uint8_t>(packed),
                      pointer<const void>(scales), pointer<const uint8_t>(zeros),
                      pointer<const float>(bias), pointer<const void>(residual),
                      pointer<void>(out), m, weight_shape(n, k, group_size, format),
                      activation >= 0, static_cast<Activation>(activation), integer, bf16, gated});
      },
      ReleaseGil());
  module.def(
      "dequantize",
      [](Address packed, Address scales, Address zeros, Address out, int64_t n, int64_t k,
         int64_t group_size, int format, bool bf16) {
        dequantize(weight_shape(n, k, group_size, format), pointer<const uint8_t>(packed),
                   pointer<const void>(scales), pointer<const uint8_t>(zeros), bf16,
                   pointer<void>(out));
      },
      ReleaseGil());
}

}  // namespace llmos
