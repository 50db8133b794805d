// The kernels of one format, for its .cu file.
#pragma once

#include "cuda/quant_matmul_kernel.cuh"
#include "cuda/quant_matmul_kernels.h"

namespace llmos {

template <WeightFormat kFormat, FloatType kType, uint32_t kXTiles>
QuantMatmulKernel instance() {
  using Ring = QuantMatmulRing<kFormat, kXTiles>;
  return {quant_matmul_kernel<kFormat, kType, kXTiles>, Ring::kDepth * Ring::kBytes, kXTiles};
}

template <WeightFormat kFormat, FloatType kType>
QuantMatmulKernel instance_for(int64_t m) {
  if (m <= 8) return instance<kFormat, kType, 1>();
  if (m <= 16) return instance<kFormat, kType, 2>();
  if (m <= 32) return instance<kFormat, kType, 4>();
  return instance<kFormat, kType, 8>();
}

template <WeightFormat kFormat>
QuantMatmulKernel instance_for(FloatType type, int64_t m) {
  return type == FloatType::kBf16 ? instance_for<kFormat, FloatType::kBf16>(m)
                                  : instance_for<kFormat, FloatType::kFp16>(m);
}

}  // namespace llmos
