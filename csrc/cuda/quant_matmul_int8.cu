#include "cuda/quant_matmul_instances.cuh"

namespace llmos {

QuantMatmulKernel int8_kernel(FloatType type, int64_t m) {
  return instance_for<WeightFormat::kInt8>(type, m);
}

}  // namespace llmos
