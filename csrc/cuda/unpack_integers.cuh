// Codes to levels in int8: four weights of a row in a word.
#pragma once

#include "cuda/primitives.cuh"

namespace llmos {

constexpr uint32_t kSignBits = 0x80808080;

__device__ inline uint32_t int8_levels(uint32_t codes) { return codes ^ kSignBits; }

// Of four nibbles, minus the zero in all bytes of `zeros`. The sign bits keep bytes from borrowing.
__device__ inline uint32_t int4_levels(uint32_t nibbles, uint32_t zeros) {
  return (and_or(nibbles, 0x0f0f0f0f, kSignBits) - zeros) ^ kSignBits;
}

// Byte `row` of `zeros` four times.
__device__ inline uint32_t spread_zero(uint32_t zeros, uint32_t row) {
  return permute_bytes(zeros, 0, 0x1111 * row);
}

constexpr uint32_t kEights = 0x08080808;  // the zero of kInt4

}  // namespace llmos
