#include "cpu/quant_matmul.h"

#include "cpu/dispatch.h"

namespace llmos {

void quant_matmul(const QuantMatmul& call) {
  static const QuantMatmulKernels* const tables[] = {
#if defined(__x86_64__)
      &quant_matmul_avx512_bf16, &quant_matmul_avx512, &quant_matmul_avx2,
#elif defined(__aarch64__)
      &quant_matmul_neon_i8mm, &quant_matmul_neon_dotprod,
#endif
      &quant_matmul_generic};
  choose(tables).run(call);
}

}  // namespace llmos
