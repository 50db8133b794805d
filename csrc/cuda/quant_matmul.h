// y = activation(x W^T + bias) + residual for up to 64 rows of x in bf16 or fp16 on a CUDA device,
// where W is stored in a format of quant_formats.h.
#pragma once

#include <cstdint>

#include "cpu/activation.h"
#include "cuda/float_type.h"
#include "quant_formats.h"

namespace llmos {

constexpr int kMaxRows = 64;  // of x

// x: m <= kMaxRows rows of round_up(weight.k, 8) elements, the ones beyond k being 0, x_stride
// (a multiple of 8) apart and aligned to 16 bytes, as packed, scales and zeros are.
// residual: as out, or null. out: (m, columns), columns = weight.n, or half of it where gated;
// aligned to 8 bytes.
// scales: fp32 for kInt8, else bf16; zeros: for kInt4Asym. bias: (weight.n), or null.
// gated: as csrc/cpu/quant_matmul.h says.
//
// The sum over scale[n, g] level(W[n, k]) x[m, k] is taken in fp32: over a group by tensor cores,
// over groups and parts in order. Levels are exact but for kNf4, rounded to x's type.
//
// `splits` parts of k each write their sums to `partials`, 16 bytes aligned, of the size that
// plan_quant_matmul says; the part that arrives last adds them up in order. `counters`: one for
// each tile, 0 before and after.
struct CudaQuantMatmul {
  const uint16_t* x;
  int64_t x_stride;
  const uint8_t* packed;
  const void* scales;
  const uint8_t* zeros;
  const void* bias;
  bool bias_is_fp32;
  const uint16_t* residual;
  uint16_t* out;
  int64_t m;
  WeightShape weight;
  bool activates;
  Activation activation;
  bool gated;
  uint32_t splits;
  float* partials;
  uint32_t* counters;
};

struct QuantMatmulPlan {
  uint32_t tiles;
  uint32_t splits;
  int64_t partial_floats;
};

// How the current device shares the work, in *plan; readies the kernel on it. A cudaError_t.
int plan_quant_matmul(const WeightShape& weight, int64_t m, FloatType type, QuantMatmulPlan* plan);

// Launches on `stream` (a cudaStream_t) of the current device, after plan_quant_matmul of the same
// sizes there. A cudaError_t.
int cuda_quant_matmul(const CudaQuantMatmul& call, FloatType type, void* stream);

}  // namespace llmos
