// Activations to int8 on a CUDA device, as round_activations of
// llmos_fast/reference/quant_matmul.py.
#pragma once

#include <cstdint>

#include "cuda/float_type.h"

namespace llmos {

// For each group of group_size (32, 64, 128, or k) elements of a row of x: a = max(max |x|, 1e-30),
// integers = round_half_even(x (127 / a)), scale = a / 127, in fp32; a group with inf or NaN has
// scale NaN. Both lie as rounded_place, rounded_word and rounded_scales of fragments.h say;
// integers are aligned to 4 bytes. x: m rows, x_stride elements apart.
struct RoundRows {
  const void* x;
  int64_t x_stride;
  int64_t m;
  int64_t k;
  int64_t group_size;
  int8_t* integers;
  float* scales;
};

// Launches on `stream` (a cudaStream_t) of the current device. A cudaError_t.
int cuda_round_rows(const RoundRows& call, FloatType type, void* stream);

}  // namespace llmos
