#include "cuda/quant_matmul_instances.cuh"

namespace llmos {

QuantMatmulKernel int8_kernel(const WeightShape& weight, FloatType type, int64_t m,
                              bool warpgroups) {
  return instance_for<WeightFormat::kInt8>(weight, type, m, warpgroups);
}

}  // namespace llmos
