#include "cuda/quant_matmul_instances.cuh"

namespace llmos {

QuantMatmulKernel int4_kernel(FloatType type, int64_t m) {
  return instance_for<WeightFormat::kInt4>(type, m);
}

QuantMatmulKernel int4_asym_kernel(FloatType type, int64_t m) {
  return instance_for<WeightFormat::kInt4Asym>(type, m);
}

}  // namespace llmos
