// y = activation(s q W^T + bias) + residual on a CUDA device, where s q are the rows of
// round_rows.h and W is stored in a format of quant_formats.h: kInt8, of k <= 131072, kInt4 or
// kInt4Asym.
#pragma once

#include "cuda/quant_product.h"

namespace llmos {

// x, x_scales: integers and scales of round_rows.h in the weight's groups, aligned to 16 bytes.
// type: of the result. Sums over a group, for kInt8 over a row, are exact, in int32; what depends
// on the order of groups and parts is scaled in fp32.
struct CudaIntegerMatmul : QuantProduct {
  const int8_t* x;
  const float* x_scales;
  FloatType type;
};

// As of quant_matmul.h, for any m >= 1.
int plan_integer_matmul(const WeightShape& weight, int64_t m, bool warpgroups,
                        QuantMatmulPlan* plan);

// Rounds x, m rows of `type`, x_stride elements apart, into the workspace, and multiplies.
int cuda_integer_matmul(const QuantProduct& product, const void* x, int64_t x_stride,
                        FloatType type, bool warpgroups, void* stream);

}  // namespace llmos
