#include "cuda/quant_matmul_instances.cuh"

namespace llmos {

QuantMatmulKernel nf4_kernel(const WeightShape& weight, FloatType type, int64_t m,
                             bool warpgroups) {
  return instance_for<WeightFormat::kNf4>(weight, type, m, warpgroups);
}

}  // namespace llmos
