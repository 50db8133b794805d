// What every product with a stored weight is given on a CUDA device, whatever x is made of.
#pragma once

#include <cstdint>

#include "cpu/activation.h"
#include "cuda/fragments.h"
#include "cuda/float_type.h"
#include "quant_formats.h"

namespace llmos {

// packed, scales and zeros: aligned to 16 bytes; scales: fp32 for kInt8, else bf16; zeros: for
// kInt4Asym. bias: (weight.n) in fp32 or the result's type, or null. residual: as out, or null.
// out: (m, columns), columns = weight.n, or half of it where gated; aligned to four elements.
// gated: as csrc/cpu/quant_matmul.h says.
//
// `splits` parts of k each write their sums to `partials`, 16 bytes aligned; the part that
// arrives last adds them up in order. `counters`: one for each tile, 0 before and after.
struct QuantProduct {
  int64_t m;
  WeightShape weight;
  const uint8_t* packed;
  const void* scales;
  const uint8_t* zeros;
  const void* bias;
  bool bias_is_fp32;
  const void* residual;
  void* out;
  bool activates;
  Activation activation;
  bool gated;
  uint32_t splits;
  void* partials;
  uint32_t* counters;
};

struct QuantMatmulPlan {
  uint32_t tiles;
  uint32_t splits;
  int64_t workspace_bytes;  // of which `partials` is the beginning
};

// Of `tiles` tiles with `rows` rows of x.
inline int64_t partial_bytes(int64_t tiles, int64_t rows, uint32_t splits) {
  return splits > 1 ? tiles * splits * kTileRows * rows * 4 : 0;
}

}  // namespace llmos
