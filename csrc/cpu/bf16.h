// fp32 and bf16 (as uint16_t) behind one pair of names, in plain code that compilers vectorise.
// Everything is internal to the including file: inside a target region it gets that region's code.
#pragma once

#include <cstdint>
#include <cstring>

namespace llmos {
namespace {

inline uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline float load(const float* source) { return *source; }
inline float load(const uint16_t* source) { return float_of(static_cast<uint32_t>(*source) << 16); }

inline void store(float* target, float value) { *target = value; }

// Round half to even; NaN stays NaN.
inline void store(uint16_t* target, float value) {
  const uint32_t bits = bits_of(value);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  *target = static_cast<uint16_t>((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
}

}  // namespace
}  // namespace llmos
