// AVX-512 with VNNI and BF16: 16-bit activations meet levels in bf16, two k at a time.
#if defined(__x86_64__)

// GCC 12 warns about its own AVX-512 header (GCC bug 105593).
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>

#include "cpu/quant_matmul_prelude.h"

#define LLMOS_AVX512
LLMOS_TARGET_BEGIN(
    "avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16,prefer-vector-width=512")

#include "cpu/bf16.h"
#include "cpu/quant_matmul_epilogue.h"
#include "cpu/quant_matmul_rows.h"
#include "cpu/quant_matmul_avx512.h"
#include "cpu/quant_matmul_tile.h"
// in this order: they build on one another
#include "cpu/quant_matmul_kernel.h"

namespace llmos {
namespace {

struct Avx512Bf16 : Avx512 {
  static constexpr bool kPairs = true;

  static F dot_pairs(F acc, I weights, I x) {
    // not the intrinsic, for the reason given at Avx512::dot
    asm("vdpbf16ps %2, %1, %0" : "+v"(acc) : "v"(weights), "v"(x));
    return acc;
  }

  static F rounded_to_bf16(F v) {
    const I bits = _mm512_castps_si512(v);
    const I odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const I up = _mm512_add_epi32(_mm512_add_epi32(bits, odd), _mm512_set1_epi32(0x7fff));
    return _mm512_castsi512_ps(_mm512_and_si512(up, _mm512_set1_epi32(~0xffff)));
  }

  // Two levels that bf16 holds exactly, as the lower and the upper half of each lane.
  static I pair(F lower, F upper) {
    return _mm512_ternarylogic_epi32(_mm512_castps_si512(upper),
                                     _mm512_set1_epi32(static_cast<int>(0xffff0000u)),
                                     _mm512_srli_epi32(_mm512_castps_si512(lower), 16), 0xea);
  }
};

}  // namespace

extern const QuantMatmulKernels quant_matmul_avx512_bf16 = {"avx512_bf16", &cpu_has_avx512_bf16,
                                                            &run<Avx512Bf16>};

}  // namespace llmos

LLMOS_TARGET_END

#endif
