// Sharing a product's tiles among the blocks of the current device.
#pragma once

#include "cuda/quant_product.h"

namespace llmos {

// A kernel's needs: a block's threads and shared memory.
struct KernelResources {
  const void* function;
  int threads;
  int shared_bytes;
};

// In *plan, for `tiles` tiles of `rows` rows of x; readies the kernel on the device. A cudaError_t.
int plan_launch(const KernelResources& kernel, uint32_t tiles, uint32_t rows,
                const WeightShape& weight, QuantMatmulPlan* plan);

}  // namespace llmos
