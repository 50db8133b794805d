// The weight formats of llmos_fast/quantize.py, as seen by CPU and GPU code.
//
// A weight (n, k) lies in panels of 16 rows, filled up with zeros: word w of a panel is 64 bytes,
// four of each row. 8 bits: byte j of a row's word is the code of k = 4 w + j. 4 bits: it holds
// k = 8 w + j in the low nibble and k = 8 w + 4 + j in the high one. A group is group_size
// consecutive weights of a row; the last one may be short. Scales and zero points lie in panels too:
// [panel][group][16 rows]. fp8 lies in rows instead, with one scale per row.
#pragma once

#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
#define LLMOS_HOST_DEVICE __host__ __device__
#else
#define LLMOS_HOST_DEVICE
#endif

namespace llmos {

enum class WeightFormat : int { kInt8 = 0, kInt4 = 1, kInt4Asym = 2, kNf4 = 3, kFp8 = 4 };

constexpr int kPanel = 16;  // rows

struct WeightShape {
  int64_t n;
  int64_t k;
  int64_t group_size;
  WeightFormat format;
};

LLMOS_HOST_DEVICE constexpr bool is_4bit(WeightFormat format) {
  return format == WeightFormat::kInt4 || format == WeightFormat::kInt4Asym ||
         format == WeightFormat::kNf4;
}

// Weights of a row that one word of a panel holds.
LLMOS_HOST_DEVICE constexpr int per_word(WeightFormat format) { return is_4bit(format) ? 8 : 4; }

// Where the code of weight i begins in a word of 4-bit weights.
LLMOS_HOST_DEVICE constexpr int nibble_shift(int i) { return i % 4 * 8 + i / 4 * 4; }

LLMOS_HOST_DEVICE inline int64_t words(const WeightShape& s) {
  return (s.k + per_word(s.format) - 1) / per_word(s.format);
}

LLMOS_HOST_DEVICE inline int64_t groups(const WeightShape& s) {
  return (s.k + s.group_size - 1) / s.group_size;
}

LLMOS_HOST_DEVICE inline int64_t scale_index(const WeightShape& s, int64_t row, int64_t column) {
  return (row / kPanel * groups(s) + column / s.group_size) * kPanel + row % kPanel;
}

// The stored code of weight (row, column): a nibble or a byte.
LLMOS_HOST_DEVICE inline int code_at(const WeightShape& s, const uint8_t* packed, int64_t row,
                                     int64_t column) {
  if (s.format == WeightFormat::kFp8) return packed[row * s.k + column];
  const int64_t word = column / per_word(s.format), i = column % per_word(s.format);
  const int64_t first = ((row / kPanel * words(s) + word) * kPanel + row % kPanel) * 4;
  const int byte = packed[first + i % 4];
  return is_4bit(s.format) ? (byte >> (i / 4 * 4)) & 0xf : byte;
}

// Quantiles of the normal distribution, scaled to [-1, 1] (QLoRA, appendix E).
LLMOS_HOST_DEVICE inline float nf4_value(int code) {
  static constexpr float kTable[16] = {
      -1.0f,
      -0.6961928009986877f,
      -0.5250730514526367f,
      -0.39491748809814453f,
      -0.28444138169288635f,
      -0.18477343022823334f,
      -0.09105003625154495f,
      0.0f,
      0.07958029955625534f,
      0.16093020141124725f,
      0.24611230194568634f,
      0.33791524171829224f,
      0.44070982933044434f,
      0.5626170039176941f,
      0.7229568362236023f,
      1.0f,
  };
  return kTable[code];
}

// e4m3: sign, 4 bits of exponent (bias 7), 3 bits of mantissa; 0x7f and 0xff are NaN.
LLMOS_HOST_DEVICE inline float fp8_value(int code) {
  if ((code & 0x7f) == 0x7f) return NAN;
  const int exponent = (code >> 3) & 0xf;
  const int mantissa = code & 7;
  float magnitude = exponent == 0 ? mantissa * (1.0f / 512) : (8 + mantissa) * (1.0f / 1024);
  for (int i = 0; i < exponent; ++i) magnitude *= 2.0f;
  return code & 0x80 ? -magnitude : magnitude;
}

// What a code stands for before its group's scale; `zero` counts for kInt4Asym only.
LLMOS_HOST_DEVICE inline float level_of(WeightFormat format, int code, int zero) {
  switch (format) {
    case WeightFormat::kInt8:
      return static_cast<float>(code - 128);
    case WeightFormat::kInt4:
      return static_cast<float>(code - 8);
    case WeightFormat::kInt4Asym:
      return static_cast<float>(code - zero);
    case WeightFormat::kNf4:
      return nf4_value(code);
    default:
      return fp8_value(code);
  }
}

}  // namespace llmos
