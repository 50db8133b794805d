// Codes to levels: 8 weights of a row become four pairs for the tensor cores, exactly (kNf4 rounded
// to the pair's type). Pair 2 j + h holds k = 4 j + h in its low half and 4 j + 2 + h in its high
// one, as bytes 0 and 2, and 1 and 3, of a stored word lie. permute_x gives x the same order.
#pragma once

#include "cuda/primitives.cuh"
#include "quant_formats.h"

namespace llmos {

// A code in the low bits of kMagic reads kMagic + code: 128 + n with the 7 bits of bf16's mantissa,
// 1024 + n with the 10 of fp16's.
template <FloatType kType>
constexpr uint32_t kMagic = kType == FloatType::kBf16 ? 0x43004300 : 0x64006400;
template <FloatType kType>
constexpr uint32_t kOne = kType == FloatType::kBf16 ? 0x3f803f80 : 0x3c003c00;
constexpr uint32_t kSigns = 0x80008000;

// -(kMagic + zero) in both halves, for byte `row` of `zeros`.
template <FloatType kType>
__device__ inline uint32_t minus_zero(uint32_t zeros, int row) {
  return permute_bytes(zeros, kMagic<kType> | kSigns, 0x5050 + 0x0101 * row);
}

// For the zero of kInt4.
template <FloatType kType>
constexpr uint32_t kMinusEight = kMagic<kType> | kSigns | 0x00080008;

// Of the nibbles in bits 0-3 and 16-19.
template <FloatType kType>
__device__ inline uint32_t int4_pair(uint32_t codes, uint32_t minus_zero) {
  return multiply_add_pair<kType>(and_or(codes, 0x000f000f, kMagic<kType>), kOne<kType>,
                                  minus_zero);
}

template <FloatType kType>
__device__ inline void unpack_int4(uint32_t word, uint32_t minus_zero, uint32_t (&pairs)[4]) {
#pragma unroll
  for (int j = 0; j < 2; ++j)
#pragma unroll
    for (int h = 0; h < 2; ++h)
      pairs[2 * j + h] = int4_pair<kType>(word >> nibble_shift(4 * j + h), minus_zero);
}

// Of the bytes in bits 0-7 and 16-23. bf16 cannot hold 8 bits beside its magic: the lower seven
// give 128 + n, and the upper one decides whether 128 or 256 is to be taken off.
template <FloatType kType>
__device__ inline uint32_t int8_pair(uint32_t codes) {
  if constexpr (kType == FloatType::kBf16)
    return multiply_add_pair<kType>(and_xor(codes, 0x00800080, 0x43804380), kOne<kType> | kSigns,
                                    and_or(codes, 0x007f007f, kMagic<kType>));
  else
    return multiply_add_pair<kType>(and_or(codes, 0x00ff00ff, kMagic<kType>), kOne<kType>,
                                    0xe480e480);  // -1152
}

// Two words of four weights.
template <FloatType kType>
__device__ inline void unpack_int8(const uint32_t (&words)[2], uint32_t (&pairs)[4]) {
#pragma unroll
  for (int j = 0; j < 2; ++j)
#pragma unroll
    for (int h = 0; h < 2; ++h) pairs[2 * j + h] = int8_pair<kType>(words[j] >> (8 * h));
}

// nf4_value of every code, rounded.
template <FloatType kType>
struct Nf4Table;
template <>
struct Nf4Table<FloatType::kBf16> {
  static constexpr uint16_t kValues[16] = {0xbf80, 0xbf32, 0xbf06, 0xbeca, 0xbe92, 0xbe3d,
                                           0xbdba, 0x0000, 0x3da3, 0x3e25, 0x3e7c, 0x3ead,
                                           0x3ee2, 0x3f10, 0x3f39, 0x3f80};
};
template <>
struct Nf4Table<FloatType::kFp16> {
  static constexpr uint16_t kValues[16] = {0xbc00, 0xb992, 0xb833, 0xb652, 0xb48d, 0xb1ea,
                                           0xadd4, 0x0000, 0x2d18, 0x3126, 0x33e0, 0x3568,
                                           0x370d, 0x3880, 0x39c9, 0x3c00};
};

// Low (shift 0) or high (8) bytes of entries 4 i .. 4 i + 3.
template <FloatType kType>
constexpr uint32_t nf4_bytes(int i, int shift) {
  uint32_t bytes = 0;
  for (int j = 0; j < 4; ++j)
    bytes |= static_cast<uint32_t>(Nf4Table<kType>::kValues[4 * i + j] >> shift & 0xff) << (8 * j);
  return bytes;
}

// Low and high bytes of all entries. Literals would be moved to registers before each use: 726
// instead of 612 instructions in a stage.
template <FloatType kType>
__constant__ uint32_t kNf4Bytes[2][4] = {{nf4_bytes<kType>(0, 0), nf4_bytes<kType>(1, 0),
                                          nf4_bytes<kType>(2, 0), nf4_bytes<kType>(3, 0)},
                                         {nf4_bytes<kType>(0, 8), nf4_bytes<kType>(1, 8),
                                          nf4_bytes<kType>(2, 8), nf4_bytes<kType>(3, 8)}};

// A byte of `table` for each of the lower four nibbles of `codes`: one from either half of it by
// the lower three bits, and of these two one by the upper bit.
__device__ inline uint32_t look_up(const uint32_t (&table)[4], uint32_t codes) {
  const uint32_t within_half = codes & 0x7777;
  return permute_bytes(permute_bytes(table[0], table[1], within_half),
                       permute_bytes(table[2], table[3], within_half),
                       and_or(codes >> 1, 0x4444, 0x3210));
}

template <FloatType kType>
__device__ inline void unpack_nf4(uint32_t word, uint32_t (&pairs)[4]) {
  // nibbles of k = 0, 4, 2, 6 and 1, 5, 3, 7
  const uint32_t ordered = permute_bytes(word, 0, 0x3120);
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const uint32_t codes = ordered >> (16 * h);
    const uint32_t low = look_up(kNf4Bytes<kType>[0], codes);
    const uint32_t high = look_up(kNf4Bytes<kType>[1], codes);
    pairs[h] = permute_bytes(low, high, 0x6240);
    pairs[2 + h] = permute_bytes(low, high, 0x7351);
  }
}

// What a lane needs of 8 weights where x keeps its order, as a warpgroup's x does: the pair of
// k = 2 t and 2 t + 1 (t = lane % 4), from the word that holds them.
class NeighboursOfLane {
 public:
  __device__ explicit NeighboursOfLane(uint32_t lane)
      : selector_(lane % 2 ? 0x4342 : 0x4140), shift_(lane % 4 / 2 * 4) {}

  // Codes of 8 bits, in bits 0-7 and 16-23.
  __device__ uint32_t bytes(uint32_t word) const { return permute_bytes(word, 0, selector_); }

  // Codes of 4 bits, in bits 0-3 and 16-19, beside others.
  __device__ uint32_t nibbles(uint32_t word) const { return bytes(word) >> shift_; }

 private:
  const uint32_t selector_, shift_;
};

// nf4_value of `nibbles` of two words, rounded.
template <FloatType kType>
__device__ inline void unpack_nf4_pairs(const uint32_t (&nibbles)[2], uint32_t (&pairs)[2]) {
  uint32_t neighbours[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint32_t both = nibbles[i] & 0x000f000f;
    neighbours[i] = both | both >> 12;
  }
  const uint32_t codes = permute_bytes(neighbours[0], neighbours[1], 0x0040);
  const uint32_t low = look_up(kNf4Bytes<kType>[0], codes);
  const uint32_t high = look_up(kNf4Bytes<kType>[1], codes);
  pairs[0] = permute_bytes(low, high, 0x5140);
  pairs[1] = permute_bytes(low, high, 0x7362);
}

// Both of a pair times `scale`, a bf16, rounded once.
template <FloatType kType>
__device__ inline uint32_t scale_pair(uint32_t pair, float scale) {
  if constexpr (kType == FloatType::kBf16)
    return multiply_add_pair<kType>(pair, permute_bytes(bits_of(scale), 0, 0x3232), kSigns);  // -0
  else  // does not hold every scale
    return narrow_to_fp16(widen<kType>(static_cast<uint16_t>(pair)) * scale,
                          widen<kType>(static_cast<uint16_t>(pair >> 16)) * scale);
}

// 8 elements of x in their order to the pairs' order: pair 2 j + h as above.
__device__ inline void permute_x(const uint32_t (&x)[4], uint32_t (&pairs)[4]) {
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    pairs[2 * j] = permute_bytes(x[2 * j], x[2 * j + 1], 0x5410);
    pairs[2 * j + 1] = permute_bytes(x[2 * j], x[2 * j + 1], 0x7632);
  }
}

}  // namespace llmos
