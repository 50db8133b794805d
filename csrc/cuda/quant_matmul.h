// y = activation(x W^T + bias) + residual for rows of x in bf16 or fp16 on a CUDA device, where W
// is stored in a format of quant_formats.h.
#pragma once

#include "cuda/quant_product.h"

namespace llmos {

// x: m rows of round_up(weight.k, 8) elements, the ones beyond k being 0, x_stride (a multiple of
// 8) apart and aligned to 16 bytes. The result has its type.
//
// The sum over scale[n, g] level(W[n, k]) x[m, k] is taken in fp32, over parts in order. Levels are
// exact but for kNf4, rounded to x's type. In tiles of up to 64 rows tensor cores sum them over a
// group, whose scale follows in fp32; in those of 128, scale times level is rounded to x's type.
// kInt8 has one scale for a row, which follows always.
struct CudaQuantMatmul : QuantProduct {
  const uint16_t* x;
  int64_t x_stride;
};

// How the current device shares the work, in *plan; readies the kernel on it. warpgroups: whether
// many rows are multiplied by Hopper's warpgroups, of which device.h says where they are. A
// cudaError_t.
int plan_quant_matmul(const WeightShape& weight, int64_t m, FloatType type, bool warpgroups,
                      QuantMatmulPlan* plan);

// Launches on `stream` (a cudaStream_t) of the current device, after plan_quant_matmul of the same
// sizes there. A cudaError_t.
int cuda_quant_matmul(const QuantProduct& product, const void* x, int64_t x_stride, FloatType type,
                      bool warpgroups, void* stream);

}  // namespace llmos
