// NEON with sdot: signed codes times signed x.
#if defined(__aarch64__)

#include <arm_neon.h>

#include "cpu/quant_matmul_prelude.h"

LLMOS_TARGET_BEGIN("arch=armv8.2-a+dotprod")

#include "cpu/bf16.h"
#include "cpu/quant_matmul_epilogue.h"
#include "cpu/quant_matmul_rows.h"
#include "cpu/quant_matmul_neon.h"
#include "cpu/quant_matmul_tile.h"
// in this order: they build on one another
#include "cpu/quant_matmul_kernel.h"

namespace llmos {
namespace {

struct NeonDotprod : Neon {
  template <bool k4Bit>
  static I dot(I acc, I weights, I x) {
    const int8x16_t codes = vreinterpretq_s8_s32(weights), xs = vreinterpretq_s8_s32(x);
    if constexpr (k4Bit) {
      return vdotq_s32(acc, codes, xs);
    } else {  // code = (code - 128) + 64 + 64, each a signed byte; the second half depends on x only
      const int8x16_t half = vdupq_n_s8(64);
      const I rest = vdotq_s32(vdotq_s32(vdupq_n_s32(0), half, xs), half, xs);
      return vaddq_s32(vdotq_s32(acc, veorq_s8(codes, vdupq_n_s8(-128)), xs), rest);
    }
  }
};

}  // namespace

extern const QuantMatmulKernels quant_matmul_neon_dotprod = {"neon_dotprod", &cpu_has_neon_dotprod,
                                                          &run<NeonDotprod>};

}  // namespace llmos

LLMOS_TARGET_END

#endif
