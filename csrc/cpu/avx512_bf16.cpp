// As avx512.cpp, where attention in bf16 multiplies bf16.
#if defined(__x86_64__)

#include <immintrin.h>
#include <omp.h>

#include <type_traits>

#include "cpu/dispatch.h"
#include "cpu/kernels.h"
#include "cpu/scratch.h"
#include "cpu/target.h"

#define LLMOS_AVX512
#define LLMOS_BF16_DOT
LLMOS_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma,prefer-vector-width=512")
namespace llmos {
namespace avx512_bf16 {

#include "cpu/avx512.inl"

}  // namespace avx512_bf16

const Kernels avx512_bf16_kernels = {
    "avx512_bf16",
    cpu_has_avx512_bf16,
    avx512_bf16::add_norm_forward,
    avx512_bf16::add_norm_backward,
    avx512_bf16::activation_forward,
    avx512_bf16::activation_backward,
    avx512_bf16::rotary,
    avx512_bf16::cross_entropy,
    avx512_bf16::attention_forward,
    avx512_bf16::attention_backward,
    avx512_bf16::attention_decode,
    avx512_bf16::cache_write,
    avx512_bf16::linear_rows,
    avx512_bf16::product,
    avx512_bf16::embedding_forward,
    avx512_bf16::embedding_backward,
    avx512_bf16::adamw,
    avx512_bf16::square_sums,
};

}  // namespace llmos
LLMOS_TARGET_END

#endif
