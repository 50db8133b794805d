#include "cpu/int8_peak.h"

#include <omp.h>

#include "cpu/dispatch.h"
#include "cpu/target.h"

namespace llmos {

#if defined(__x86_64__)
namespace {

constexpr int kLoops = 1 << 20, kChains = 16;  // enough chains to hide the latency

void multiply() {
  for (int i = 0; i < kLoops; ++i)
    asm volatile(
        "vpdpbusd %%zmm16, %%zmm17, %%zmm0\n vpdpbusd %%zmm16, %%zmm17, %%zmm1\n"
        "vpdpbusd %%zmm16, %%zmm17, %%zmm2\n vpdpbusd %%zmm16, %%zmm17, %%zmm3\n"
        "vpdpbusd %%zmm16, %%zmm17, %%zmm4\n vpdpbusd %%zmm16, %%zmm17, %%zmm5\n"
        "vpdpbusd %%zmm16, %%zmm17, %%zmm6\n vpdpbusd %%zmm16, %%zmm17, %%zmm7\n"
        "vpdpbusd %%zmm16, %%zmm17, %%zmm8\n vpdpbusd %%zmm16, %%zmm17, %%zmm9\n"
        "vpdpbusd %%zmm16, %%zmm17, %%zmm10\n vpdpbusd %%zmm16, %%zmm17, %%zmm11\n"
        "vpdpbusd %%zmm16, %%zmm17, %%zmm12\n vpdpbusd %%zmm16, %%zmm17, %%zmm13\n"
        "vpdpbusd %%zmm16, %%zmm17, %%zmm14\n vpdpbusd %%zmm16, %%zmm17, %%zmm15\n" ::
            : "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9",
              "xmm10", "xmm11", "xmm12", "xmm13", "xmm14", "xmm15");
}

}  // namespace

double int8_peak() {
  if (!cpu_has_avx512_vnni()) return 0.0;
  const double start = omp_get_wtime();
#pragma omp parallel
  multiply();
  return 128.0 * kChains * kLoops * omp_get_max_threads() / (omp_get_wtime() - start);
}
#else
double int8_peak() { return 0.0; }
#endif

}  // namespace llmos
