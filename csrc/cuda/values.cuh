// Numbers of a type that is known when a kernel runs, or, inlined, when it is compiled.
#pragma once

#include "cuda/primitives.cuh"

namespace llmos {

__device__ inline float load_value(FloatType type, const void* values, int64_t i) {
  if (type == FloatType::kFp32) return static_cast<const float*>(values)[i];
  const uint16_t bits = static_cast<const uint16_t*>(values)[i];
  return type == FloatType::kBf16 ? widen<FloatType::kBf16>(bits) : widen<FloatType::kFp16>(bits);
}

__device__ inline uint16_t narrow_to(FloatType type, float value) {
  return type == FloatType::kBf16 ? narrow<FloatType::kBf16>(value)
                                  : narrow<FloatType::kFp16>(value);
}

__device__ inline void store_value(FloatType type, void* values, int64_t i, float value) {
  if (type == FloatType::kFp32)
    static_cast<float*>(values)[i] = value;
  else
    static_cast<uint16_t*>(values)[i] = narrow_to(type, value);
}

// At i .. i + 3, a multiple of four elements from an address that is one.
__device__ inline void store_values(FloatType type, void* values, int64_t i,
                                    const float (&four)[4]) {
  if (type == FloatType::kFp32) {
    store_16_bytes(static_cast<float*>(values) + i, four);
    return;
  }
  const auto pair = [&](int j) {
    return narrow_to(type, four[j]) | uint32_t{narrow_to(type, four[j + 1])} << 16;
  };
  store_8_bytes(static_cast<uint16_t*>(values) + i, {pair(0), pair(2)});
}

}  // namespace llmos
