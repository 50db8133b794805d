// The kernels of quant_matmul.h by format; each family is compiled in a file of its own.
#pragma once

#include "cuda/quant_matmul.h"

namespace llmos {

struct QuantMatmulKernel {
  void (*function)(CudaQuantMatmul);
  int shared_bytes;
  uint32_t x_tiles;  // of 8 rows
};

// For kBf16 and kFp16, and 1 <= m <= kMaxRows.
QuantMatmulKernel int8_kernel(FloatType type, int64_t m);
QuantMatmulKernel int4_kernel(FloatType type, int64_t m);
QuantMatmulKernel int4_asym_kernel(FloatType type, int64_t m);
QuantMatmulKernel nf4_kernel(FloatType type, int64_t m);

}  // namespace llmos
