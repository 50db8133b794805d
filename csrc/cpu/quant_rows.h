// Rows of a quantized weight as floating point.
#pragma once

#include "cpu/kernels.h"
#include "quant_formats.h"

namespace llmos {

// out[i] = scale * level of row ids[i], or of row i where ids is null; rounded once.
struct QuantRows {
  const uint8_t* packed;
  const void* scales;  // as in QuantMatmul
  const uint8_t* zeros;
  Integers ids;
  int64_t count;
  void* out;  // [count, weight.k]
  WeightShape weight;
  DType type;  // of out
};

// std::out_of_range, an IndexError of Python, for ids that are no rows.
void quant_rows(const QuantRows& call);

}  // namespace llmos
