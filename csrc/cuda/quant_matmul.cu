#include "cuda/quant_matmul.h"

#include <cuda_runtime.h>

#include "cuda/fragments.h"
#include "cuda/launch_plan.h"
#include "cuda/quant_matmul_kernels.h"

namespace llmos {

namespace {

QuantMatmulKernel kernel_of(const WeightShape& weight, FloatType type, int64_t m, bool warpgroups) {
  switch (weight.format) {
    case WeightFormat::kInt8:
      return int8_kernel(weight, type, m, warpgroups);
    case WeightFormat::kInt4:
      return int4_kernel(weight, type, m, warpgroups);
    case WeightFormat::kInt4Asym:
      return int4_asym_kernel(weight, type, m, warpgroups);
    default:
      return nf4_kernel(weight, type, m, warpgroups);
  }
}

}  // namespace

int plan_quant_matmul(const WeightShape& weight, int64_t m, FloatType type, bool warpgroups,
                      QuantMatmulPlan* plan) {
  const QuantMatmulKernel kernel = kernel_of(weight, type, m, warpgroups);
  const auto function = reinterpret_cast<const void*>(kernel.function);
  return plan_launch({function, kThreads, kernel.shared_bytes},
                     tiles_of_product(weight, m, kernel.rows), kernel.rows, weight, plan);
}

int cuda_quant_matmul(const QuantProduct& product, const void* x, int64_t x_stride, FloatType type,
                      bool warpgroups, void* stream) {
  const QuantMatmulKernel kernel = kernel_of(product.weight, type, product.m, warpgroups);
  const dim3 grid(tiles_of_product(product.weight, product.m, kernel.rows), product.splits);
  kernel.function<<<grid, kThreads, kernel.shared_bytes, static_cast<cudaStream_t>(stream)>>>(
      {product, static_cast<const uint16_t*>(x), x_stride});
  return cudaGetLastError();
}

}  // namespace llmos
