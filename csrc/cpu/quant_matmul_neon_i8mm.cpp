// NEON with usdot: unsigned codes times signed x.
#if defined(__aarch64__)

#include <arm_neon.h>

#include "cpu/quant_matmul_prelude.h"

LLMOS_TARGET_BEGIN("arch=armv8.2-a+dotprod+i8mm")

#include "cpu/bf16.h"
#include "cpu/quant_matmul_epilogue.h"
#include "cpu/quant_matmul_rows.h"
#include "cpu/quant_matmul_neon.h"
#include "cpu/quant_matmul_tile.h"
// in this order: they build on one another
#include "cpu/quant_matmul_kernel.h"

namespace llmos {
namespace {

struct NeonI8mm : Neon {
  template <bool k4Bit>
  static I dot(I acc, I weights, I x) {
    return vusdotq_s32(acc, vreinterpretq_u8_s32(weights), vreinterpretq_s8_s32(x));
  }
};

}  // namespace

extern const QuantMatmulKernels quant_matmul_neon_i8mm = {"neon_i8mm", &cpu_has_neon_i8mm,
                                                    &run<NeonI8mm>};

}  // namespace llmos

LLMOS_TARGET_END

#endif
