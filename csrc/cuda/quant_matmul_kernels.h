// The kernels of quant_matmul.h by format; each family is compiled in a file of its own.
#pragma once

#include "cuda/quant_matmul.h"

namespace llmos {

struct QuantMatmulKernel {
  void (*function)(CudaQuantMatmul);
  int shared_bytes;
  uint32_t rows;  // of x in a tile
};

// For kBf16 and kFp16.
QuantMatmulKernel int8_kernel(const WeightShape& weight, FloatType type, int64_t m,
                              bool warpgroups);
QuantMatmulKernel int4_kernel(const WeightShape& weight, FloatType type, int64_t m,
                              bool warpgroups);
QuantMatmulKernel int4_asym_kernel(const WeightShape& weight, FloatType type, int64_t m,
                                   bool warpgroups);
QuantMatmulKernel nf4_kernel(const WeightShape& weight, FloatType type, int64_t m, bool warpgroups);

}  // namespace llmos
