#if defined(__x86_64__)

#include <immintrin.h>
#include <omp.h>

#include <type_traits>

#include "cpu/dispatch.h"
#include "cpu/kernels.h"
#include "cpu/scratch.h"
#include "cpu/target.h"

LLMOS_TARGET_BEGIN("avx2,fma")
namespace llmos {
namespace avx2 {

// 12 registers of sums, 2 of b and the broadcast element in 16.
constexpr int kTileRows = 6, kTileVectors = 1, kRegisterLanes = 8;

#include "cpu/vector.inl"

LLMOS_INLINE L multiply_even(U a, U b) {
  union {
    U lanes;
    __m256i half[2];
  } x = {a}, y = {b}, product;
  for (int i = 0; i < 2; ++i) product.half[i] = _mm256_mul_epu32(x.half[i], y.half[i]);
  return (L)product.lanes;
}

LLMOS_INLINE I sign_extend(B x) {
  union {
    I lanes;
    __m256i half[2];
  } wide;
  wide.half[0] = _mm256_cvtepi8_epi32((__m128i)x);
  wide.half[1] = _mm256_cvtepi8_epi32(_mm_unpackhi_epi64((__m128i)x, (__m128i)x));
  return wide.lanes;
}

#include "cpu/kernels.inl"

}  // namespace avx2

const Kernels avx2_kernels = {
    "avx2",
    cpu_has_avx2,
    avx2::add_norm_forward,
    avx2::add_norm_backward,
    avx2::activation_forward,
    avx2::activation_backward,
    avx2::rotary,
    avx2::cross_entropy,
    avx2::attention_forward,
    avx2::attention_backward,
    avx2::attention_decode,
    avx2::cache_write,
    avx2::linear_rows,
    avx2::product,
    avx2::embedding_forward,
    avx2::embedding_backward,
    avx2::adamw,
    avx2::square_sums,
};

}  // namespace llmos
LLMOS_TARGET_END

#endif
