#include "bindings/bindings.h"

#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <tuple>

#include "cuda/dequantize.h"
#include "cuda/device.h"
#include "cuda/integer_matmul.h"
#include "cuda/quant_matmul.h"

namespace llmos {

namespace {

FloatType float_type(const std::string& name) {
  if (name == "float32") return FloatType::kFp32;
  if (name == "bfloat16") return FloatType::kBf16;
  if (name == "float16") return FloatType::kFp16;
  throw std::invalid_argument("CUDA kernels: dtype must be float32, bfloat16 or float16, got " +
                              name);
}

// Runs act(), which returns a cudaError_t, on `device`. An error becomes a Python exception that
// names the kernel and its sizes; `rows` are those of x, or 0.
template <typename Act>
void run_on(int device, const char* kernel, int64_t rows, const WeightShape& weight, Act act) {
  int error = cuda_set_device(device);
  if (error == 0) error = act();
  if (error == 0) return;
  const std::string x = rows > 0 ? std::to_string(rows) + " rows and " : "";
  throw std::runtime_error("CUDA kernel " + std::string(kernel) + " of " + x + "a (" +
                           std::to_string(weight.n) + ", " + std::to_string(weight.k) +
                           ") weight: " + cuda_error_name(error));
}

bool has_warpgroups(int device) {
  bool has = false;
  int error = cuda_set_device(device);
  if (error == 0) error = cuda_has_warpgroups(&has);
  if (error != 0) throw std::runtime_error(std::string("CUDA device: ") + cuda_error_name(error));
  return has;
}

void dequantize(int device, Address packed, Address scales, Address zeros, Address out, int64_t n,
                int64_t k, int64_t group_size, int format, const std::string& dtype,
                Address stream) {
  const WeightShape weight{n, k, group_size, static_cast<WeightFormat>(format)};
  const Dequantize call{weight, pointer<const uint8_t>(packed), pointer<const void>(scales),
                        pointer<const uint8_t>(zeros), pointer<void>(out)};
  const FloatType type = float_type(dtype);
  run_on(device, "dequantize", 0, weight,
         [&] { return cuda_dequantize(call, type, pointer<void>(stream)); });
}

// (tiles, splits, bytes of workspace)
using Plan = std::tuple<uint32_t, uint32_t, int64_t>;

Plan quant_matmul_plan(int device, int64_t m, int64_t n, int64_t k, int64_t group_size, int format,
                       const std::string& dtype, bool warpgroups) {
  const WeightShape weight{n, k, group_size, static_cast<WeightFormat>(format)};
  const FloatType type = float_type(dtype);
  QuantMatmulPlan plan{};
  run_on(device, "quant_matmul, its plan,", m, weight,
         [&] { return plan_quant_matmul(weight, m, type, warpgroups, &plan); });
  return {plan.tiles, plan.splits, plan.workspace_bytes};
}

Plan integer_matmul_plan(int device, int64_t m, int64_t n, int64_t k, int64_t group_size,
                         int format, const std::string&, bool warpgroups) {
  const WeightShape weight{n, k, group_size, static_cast<WeightFormat>(format)};
  QuantMatmulPlan plan{};
  run_on(device, "integer_matmul, its plan,", m, weight,
         [&] { return plan_integer_matmul(weight, m, warpgroups, &plan); });
  return {plan.tiles, plan.splits, plan.workspace_bytes};
}

// Of x, with x_stride elements from row to row.
using Product = int (*)(const QuantProduct&, const void* x, int64_t x_stride, FloatType,
                        bool warpgroups, void* stream);

template <const char* kName, Product kProduct>
void product(int device, Address x, int64_t x_stride, Address packed, Address scales, Address zeros,
             Address bias, bool bias_is_fp32, Address residual, Address out, int64_t m, int64_t n,
             int64_t k, int64_t group_size, int format, int activation, bool gated,
             const std::string& dtype, bool warpgroups, uint32_t splits, Address workspace,
             Address counters, Address stream) {
  const WeightShape weight{n, k, group_size, static_cast<WeightFormat>(format)};
  const QuantProduct call{m,
                          weight,
                          pointer<const uint8_t>(packed),
                          pointer<const void>(scales),
                          pointer<const uint8_t>(zeros),
                          pointer<const void>(bias),
                          bias_is_fp32,
                          pointer<const void>(residual),
                          pointer<void>(out),
                          activation >= 0,
                          static_cast<Activation>(activation),
                          gated,
                          splits,
                          pointer<void>(workspace),
                          pointer<uint32_t>(counters)};
  const FloatType type = float_type(dtype);
  run_on(device, kName, m, weight, [&] {
    return kProduct(call, pointer<const void>(x), x_stride, type, warpgroups,
                    pointer<void>(stream));
  });
}

constexpr char kQuantMatmul[] = "quant_matmul", kIntegerMatmul[] = "integer_matmul";

}  // namespace

}  // namespace llmos

PYBIND11_MODULE(_CUDA, module) {
  module.doc() = "CUDA kernels of llmos_fast; called by llmos_fast.native only";
  using namespace llmos;
  module.def("has_warpgroups", &has_warpgroups, ReleaseGil());
  module.def("dequantize", &dequantize, ReleaseGil());
  module.def("quant_matmul_plan", &quant_matmul_plan, ReleaseGil());
  module.def("quant_matmul", &product<kQuantMatmul, cuda_quant_matmul>, ReleaseGil());
  module.def("integer_matmul_plan", &integer_matmul_plan, ReleaseGil());
  module.def("integer_matmul", &product<kIntegerMatmul, cuda_integer_matmul>, ReleaseGil());
}
