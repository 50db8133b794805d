// y = activation(x W^T + bias) + residual, where W is stored in a format of quant_formats.h.
#pragma once

#include <cstdint>

#include "cpu/activation.h"
#include "quant_formats.h"

namespace llmos {

// x: m rows of weight.k, x_stride elements apart; out: (m, columns), columns = weight.n, or half of
// it where gated; residual: as out, or null. All three fp32, or bf16 where `bf16` is set.
// scales: fp32 for 8-bit formats, bf16 for 4-bit ones; zeros: for kInt4Asym, else null.
// bias: fp32 (weight.n), or null.
//
// gated: panels 0, 2, .. are a gate and 1, 3, .. its partner; weight.n is a multiple of 32, and
//        y = activation(x G^T + bias_g) (x U^T + bias_u) + residual
//
// rounds = false:  sums over scale[n, g] level(W[n, k]) x[m, k] in fp32; where x is bf16 and
//                  the CPU multiplies that, levels too are rounded to bf16, which changes kNf4 only
// rounds = true:   the same with x replaced by s q, where, in fp32, for each group of k (a row for
//                  8 bits), a = max(max_k |x[m, k]|, 1e-30). kInt8, of k <= 131072, kInt4 and
//                  kInt4Asym: s = a / 127, q = round_half_even(x (127 / a)), and sums over a group
//                  are exact. kFp8: s = a / 448, q is the number of e4m3 nearest to x (448 / a),
//                  half to even. A row with a non-finite x gives NaN. Not for kNf4.
// Every sum is taken in the order of k, by one thread: results do not depend on threads, nor, with
// rounds = true, on m.
struct QuantMatmul {
  const void* x;
  int64_t x_stride;
  const uint8_t* packed;
  const void* scales;
  const uint8_t* zeros;
  const float* bias;
  const void* residual;
  void* out;
  int64_t m;
  WeightShape weight;
  bool activates;
  Activation activation;
  bool rounds;
  bool bf16;
  bool gated;
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
extern const QuantMatmulKernels quant_matmul_avx512_bf16;
#elif defined(__aarch64__)
extern const QuantMatmulKernels quant_matmul_neon_dotprod;
extern const QuantMatmulKernels quant_matmul_neon_i8mm;
#endif

void quant_matmul(const QuantMatmul& call);

}  // namespace llmos
