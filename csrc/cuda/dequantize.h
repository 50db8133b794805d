// Packed weights to floating point on a CUDA device.
#pragma once

#include <cstdint>

#include "cuda/float_type.h"
#include "quant_formats.h"

namespace llmos {

// out (n, k) = scale * level, computed in fp32 and rounded once. Pointers are of the device and
// as csrc/cpu/quant_matmul.h says; zeros may be null but for kInt4Asym. Launches on `stream`
// (a cudaStream_t) and returns the launch's cudaError_t.
int cuda_dequantize(const WeightShape& shape, const uint8_t* packed, const float* scales,
                    const uint8_t* zeros, FloatType type, void* out, void* stream);

const char* cuda_error_name(int error);

}  // namespace llmos
