#if defined(__x86_64__)

#include <immintrin.h>
#include <omp.h>

#include <type_traits>

#include "cpu/dispatch.h"
#include "cpu/kernels.h"
#include "cpu/scratch.h"
#include "cpu/target.h"

LLMOS_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,fma,prefer-vector-width=512")
namespace llmos {
namespace avx512 {

// 24 sums, 2 vectors of b and the broadcast element in 32 registers.
constexpr int kTileRows = 12, kTileVectors = 2;

#include "cpu/vector.inl"

LLMOS_INLINE L multiply_even(U a, U b) { return (L)_mm512_mul_epu32((__m512i)a, (__m512i)b); }

LLMOS_INLINE I sign_extend(B x) { return (I)_mm512_cvtepi8_epi32((__m128i)x); }

#include "cpu/kernels.inl"

}  // namespace avx512

const Kernels avx512_kernels = {
    "avx512",
    cpu_has_avx512,
    avx512::add_norm_forward,
    avx512::add_norm_backward,
    avx512::activation_forward,
    avx512::activation_backward,
    avx512::rotary,
    avx512::cross_entropy,
    avx512::attention_forward,
    avx512::attention_backward,
    avx512::attention_decode,
    avx512::cache_write,
};

}  // namespace llmos
LLMOS_TARGET_END

#endif
