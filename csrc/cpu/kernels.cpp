#include "cpu/kernels.h"

#include <stdexcept>
#include <string>

#include "cpu/dispatch.h"

namespace llmos {

void refuse_outside(int64_t value, int64_t end, const char* what, const char* range) {
  if (value >= 0 && value < end) return;
  throw std::invalid_argument(std::string(what) + " must be in [0, " + std::to_string(end) + "), " +
                              range + ", got " + std::to_string(value));
}

const Kernels& kernels() {
#if defined(__x86_64__)
  static const Kernels* const tables[] = {&avx512_bf16_kernels, &avx512_kernels, &avx2_kernels,
                                          &generic_kernels};
#else
  static const Kernels* const tables[] = {&generic_kernels};
#endif
  return choose(tables);
}

}  // namespace llmos
