#if defined(__x86_64__)

#include <immintrin.h>
#include <omp.h>

#include <type_traits>

#include "cpu/dispatch.h"
#include "cpu/kernels.h"
#include "cpu/scratch.h"
#include "cpu/target.h"

#define LLMOS_AVX512
LLMOS_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,fma,prefer-vector-width=512")
namespace llmos {
namespace avx512 {

#include "cpu/avx512.inl"

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
    avx512::linear_rows,
    avx512::product,
    avx512::embedding_forward,
    avx512::embedding_backward,
    avx512::adamw,
    avx512::square_sums,
};

}  // namespace llmos
LLMOS_TARGET_END

#endif
