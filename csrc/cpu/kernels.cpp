#include "cpu/kernels.h"

#include "cpu/dispatch.h"

namespace llmos {

const Kernels& kernels() {
  static const Kernels* const tables[] = {&avx512_kernels, &avx2_kernels, &generic_kernels};
  return choose(tables);
}

}  // namespace llmos
