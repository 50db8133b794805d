// y = activation(x W^T + bias), where W is stored in one of the formats of quant_formats.h.
#pragma once

#include <cstddef>
#include <cstdint>

#include "quant_formats.h"

namespace llmos {

enum class Activation : int { kNone = 0, kRelu, kRelu2, kGelu, kGeluTanh, kSilu };

// x: (m, weight.k), contiguous; out: (m, weight.n); both fp32, or bf16 where `bf16` is set.
// scales: fp32 (weight.n, groups); zeros: uint8 likewise (kInt4Asym), else null; bias: fp32, null.
//
// integer = false:  y = sum_g scale[n, g] sum_{k in g} x[m, k] level(W[n, k])
// integer = true:   the same with x replaced by s q, where, in fp32,
//                   a = max(max_k |x[m, k]|, 1e-30), s = a / 127, q = round_half_even(x (127 / a));
//                   sums over a group are exact. A row with a non-finite x gives NaN.
//                   kInt8, kInt4 and kInt4Asym only; k <= 131072.
// Every sum is taken in the order of k, by one thread: results depend neither on m nor on threads.
struct QuantMatmul {
  const void* x;
  const uint8_t* packed;
  const float* scales;
  const uint8_t* zeros;
  const float* bias;
  void* out;
  int64_t m;
  WeightShape weight;
  Activation activation;
  bool integer;
  bool bf16;
};

struct QuantMatmulKernels {
  const char* name;
  bool (*runs_here)();
  void (*run)(const QuantMatmul&);
};

extern const QuantMatmulKernels quant_matmul_generic;
#if defined(__x86_64__)
extern const QuantMatmulKernels quant_matmul_avx2;
extern const QuantMatmulKernels quant_matmul_avx512;
#endif

void quant_matmul(const QuantMatmul& call);

// out (n, k) in fp32, or bf16 where `bf16` is set: scale * level, rounded once.
void dequantize(const WeightShape& shape, const uint8_t* packed, const float* scales,
                const uint8_t* zeros, bool bf16, void* out);

// Memory of the calling thread, 64-byte aligned, kept between calls. Slots are independent.
enum class Scratch : int { kRows = 0, kTile = 1 };
void* thread_scratch(Scratch slot, size_t bytes);

}  // namespace llmos
