// The weight formats of llmos_fast/quantize.py, as seen by CPU and GPU code.
//
// A weight (n, k) is stored row by row. 8-bit formats: one byte per weight. 4-bit formats: rows of
// ceil(k / 2) bytes, weight 2j in the low nibble of byte j, weight 2j + 1 in the high one. A group
// is group_size consecutive weights of a row; the last one may be short. Row n has
// groups = ceil(k / group_size) scales, at scales[n * groups + g], and zero points alike.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define LLMOS_HOST_DEVICE __host__ __device__
#else
#define LLMOS_HOST_DEVICE
#endif

namespace llmos {

enum class WeightFormat : int { kInt8 = 0, kInt4 = 1, kInt4Asym = 2, kNf4 = 3, kFp8 = 4 };

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

LLMOS_HOST_DEVICE inline int64_t row_bytes(const WeightShape& s) {
  return is_4bit(s.format) ? (s.k + 1) / 2 : s.k;
}

LLMOS_HOST_DEVICE inline int64_t groups(const WeightShape& s) {
  return (s.k + s.group_size - 1) / s.group_size;
}

LLMOS_HOST_DEVICE inline int64_t scale_index(const WeightShape& s, int64_t row, int64_t column) {
  return row * groups(s) + column / s.group_size;
}

// The stored code of weight (row, column): a nibble or a byte.
LLMOS_HOST_DEVICE inline int code_at(const WeightShape& s, const uint8_t* packed, int64_t row,
                                     int64_t column) {
  const uint8_t* bytes = packed + row * row_bytes(s);
  if (!is_4bit(s.format)) return bytes[column];
  return (bytes[column / 2] >> (4 * (column % 2))) & 0xf;
}

// Quantiles of the normal distribution, scaled to [-1, 1] (QLoRA, appendix E).
LLMOS_HOST_DEVICE inline float nf4_value(int code) {
  constexpr float kTable[16] = {
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
      return static_cast<float>(static_cast<int8_t>(code));
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
