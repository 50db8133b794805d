#include "cuda/quant_matmul_instances.cuh"

namespace llmos {

QuantMatmulKernel nf4_kernel(FloatType type, int64_t m) {
  return instance_for<WeightFormat::kNf4>(type, m);
}

}  // namespace llmos
