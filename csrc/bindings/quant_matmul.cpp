#include "cpu/int8_peak.h"
#include "cpu/quant_matmul.h"
#include "cpu/quant_rows.h"

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
         int format, int activation, bool rounds, bool bf16, bool gated) {
        run<QuantMatmul>(quant_matmul, {pointer<const void>(x), x_stride,
                                        pointer<const uint8_t>(packed), pointer<const void>(scales),
                                        pointer<const uint8_t>(zeros), pointer<const float>(bias),
                                        pointer<const void>(residual), pointer<void>(out), m,
                                        weight_shape(n, k, group_size, format), activation >= 0,
                                        static_cast<Activation>(activation), rounds, bf16, gated});
      },
      ReleaseGil());
  module.def(
      "quant_rows",
      [](Address packed, Address scales, Address zeros, Address ids, bool wide_ids, int64_t count,
         Address out, int64_t n, int64_t k, int64_t group_size, int format, int type) {
        run<QuantRows>(
            quant_rows,
            {pointer<const uint8_t>(packed), pointer<const void>(scales),
             pointer<const uint8_t>(zeros), Integers{pointer<const void>(ids), wide_ids}, count,
             pointer<void>(out), weight_shape(n, k, group_size, format), static_cast<DType>(type)});
      },
      ReleaseGil());
}

}  // namespace llmos
