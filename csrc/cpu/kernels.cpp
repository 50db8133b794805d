#include "cpu/kernels.h"

#include "cpu/dispatch.h"

namespace llmos {

const Kernels& kernels() {
#if defined(__x86_64__)
  static const Kernels* const tables[] = {&avx512_kernels, &avx2_kernels, &generic_kernels};
#else
  static const Kernels* const tables[] = {&generic_kernels};
#endif
  return choose(tables);
}

}  // namespace llmos
