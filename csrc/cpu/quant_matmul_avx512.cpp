// AVX-512 with VNNI.
#if defined(__x86_64__)

// GCC 12 warns about its own AVX-512 header (GCC bug 105593).
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>

#include "cpu/quant_matmul_prelude.h"

#define LLMOS_AVX512
LLMOS_TARGET_BEGIN("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,prefer-vector-width=512")

#include "cpu/bf16.h"
#include "cpu/quant_matmul_epilogue.h"
#include "cpu/quant_matmul_rows.h"
#include "cpu/quant_matmul_avx512.h"
#include "cpu/quant_matmul_tile.h"
// in this order: they build on one another
#include "cpu/quant_matmul_kernel.h"

namespace llmos {

extern const QuantMatmulKernels quant_matmul_avx512 = {"avx512", &cpu_has_avx512_vnni,
                                                       &run<Avx512>};

}  // namespace llmos

LLMOS_TARGET_END

#endif
