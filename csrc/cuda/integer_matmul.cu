#include "cuda/integer_matmul.h"

#include <cuda_runtime.h>

#include "cuda/integer_matmul_kernel.cuh"
#include "cuda/launch_plan.h"
#include "cuda/round_rows.h"

namespace llmos {

namespace {

IntegerMatmulKernel kernel_of(WeightFormat format, int64_t m, bool warpgroups) {
  if (format == WeightFormat::kInt8)
    return integer_instance_for<WeightFormat::kInt8>(m, warpgroups);
  if (format == WeightFormat::kInt4)
    return integer_instance_for<WeightFormat::kInt4>(m, warpgroups);
  return integer_instance_for<WeightFormat::kInt4Asym>(m, warpgroups);
}

}  // namespace

int plan_integer_matmul(const WeightShape& weight, int64_t m, bool warpgroups,
                        QuantMatmulPlan* plan) {
  const IntegerMatmulKernel kernel = kernel_of(weight.format, m, warpgroups);
  const auto function = reinterpret_cast<const void*>(kernel.function);
  const int error =
      plan_launch({function, kThreads, kernel.shared_bytes},
                  tiles_of_product(weight, m, kernel.rows), kernel.rows, weight, plan);
  plan->workspace_bytes += rounded_scales(m) * groups(weight) * 4 + m * steps(weight) * kStep;
  return error;
}

int cuda_integer_matmul(const QuantProduct& product, const void* x, int64_t x_stride,
                        FloatType type, bool warpgroups, void* stream) {
  const WeightShape& weight = product.weight;
  const IntegerMatmulKernel kernel = kernel_of(weight.format, product.m, warpgroups);
  const dim3 grid(tiles_of_product(weight, product.m, kernel.rows), product.splits);
  auto* after_partials =
      static_cast<uint8_t*>(product.partials) + partial_bytes(grid.x, kernel.rows, product.splits);
  auto* x_scales = reinterpret_cast<float*>(after_partials);
  auto* integers = reinterpret_cast<int8_t*>(x_scales + rounded_scales(product.m) * groups(weight));
  const int error = cuda_round_rows(
      {x, x_stride, product.m, weight.k, weight.group_size, integers, x_scales}, type, stream);
  if (error != cudaSuccess) return error;
  kernel.function<<<grid, kThreads, kernel.shared_bytes, static_cast<cudaStream_t>(stream)>>>(
      {product, integers, x_scales, type});
  return cudaGetLastError();
}

}  // namespace llmos
