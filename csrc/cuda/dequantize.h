// Packed weights to floating point on a CUDA device.
#pragma once

#include <cstdint>

#include "cuda/float_type.h"
#include "quant_formats.h"

namespace llmos {

// out (n, k) = scale * level, computed in fp32 and rounded once to the type that is asked for.
// Formats that lie in panels. scales: fp32 for kInt8, else bf16; zeros: for kInt4Asym. packed and
// out are aligned to 16 bytes.
struct Dequantize {
  WeightShape weight;
  const uint8_t* packed;
  const void* scales;
  const uint8_t* zeros;
  void* out;
};

// Launches on `stream` (a cudaStream_t) of the current device. A cudaError_t.
int cuda_dequantize(const Dequantize& call, FloatType type, void* stream);

}  // namespace llmos
