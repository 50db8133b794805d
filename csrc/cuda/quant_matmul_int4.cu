#include "cuda/quant_matmul_instances.cuh"

namespace llmos {

QuantMatmulKernel int4_kernel(const WeightShape& weight, FloatType type, int64_t m,
                              bool warpgroups) {
  return instance_for<WeightFormat::kInt4>(weight, type, m, warpgroups);
}

QuantMatmulKernel int4_asym_kernel(const WeightShape& weight, FloatType type, int64_t m,
                                   bool warpgroups) {
  return instance_for<WeightFormat::kInt4Asym>(weight, type, m, warpgroups);
}

}  // namespace llmos
