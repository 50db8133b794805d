// The element-wise functions in fp32.
#pragma once

#include "cpu/activation.h"
#include "cuda/primitives.cuh"

namespace llmos {

// Not inlined: a kernel would hold a copy for each of a thread's results.
__device__ __noinline__ inline float activate(Activation activation, float x) {
  switch (activation) {
    case Activation::relu:
      return x < 0.0f ? 0.0f : x;  // NaN passes
    case Activation::relu2:
      return x < 0.0f ? 0.0f : x * x;
    case Activation::gelu:
      return 0.5f * x * erfcf(-0.70710678f * x);
    case Activation::gelu_tanh:
      return x / (1.0f + expf(-1.5957691f * (x + 0.044715f * x * x * x)));
    default:
      return x / (1.0f + expf(-x));
  }
}

}  // namespace llmos
