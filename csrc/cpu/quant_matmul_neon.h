// What the two NEON sets share: 4 columns to a register. Include it inside a target region.
#pragma once

namespace llmos {
namespace {

struct Neon {
  using Rounding = PlainRounding;
  using I = int32x4_t;
  using F = float32x4_t;
  static constexpr int kLanes = 4;
  static constexpr int kRegisters = 32;
  static constexpr int kRows = 6;  // 24 accumulators + 4 weights + 1 x of 32 registers
  static constexpr int kVectors = 4;
  static constexpr int kGroupedVectors = 4;
  static constexpr int kStreamRows = 4;
  static constexpr int stream_vectors(int rows, bool) { return rows == 1 ? 8 : 4; }
  static constexpr bool kPairs = false;

  static int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
  static F zero() { return vdupq_n_f32(0.0f); }
  static F broadcast(float value) { return vdupq_n_f32(value); }
  static F load_floats(const float* p) { return vld1q_f32(p); }
  static void store_floats(float* p, F v) { vst1q_f32(p, v); }
  static F multiply(F a, F b) { return vmulq_f32(a, b); }
  static F subtract(F a, F b) { return vsubq_f32(a, b); }
  static F fma(F a, F b, F c) { return vfmaq_f32(c, a, b); }
  static F to_float(I v) { return vcvtq_f32_s32(v); }
  static F load_bf16(const uint8_t* p) {
    return vreinterpretq_f32_u32(vshll_n_u16(vreinterpret_u16_u8(vld1_u8(p)), 16));
  }
  static I load_ints(const int32_t* p) { return vld1q_s32(p); }
  static void store_ints(int32_t* p, I v) { vst1q_s32(p, v); }
  static I load_bytes(const uint8_t* p) { return vreinterpretq_s32_u8(vld1q_u8(p)); }
  static void store_bytes(uint8_t* p, I v) { vst1q_u8(p, vreinterpretq_u8_s32(v)); }
  static I widen_bytes(const uint8_t* p) {
    uint32_t bytes;
    std::memcpy(&bytes, p, 4);
    const uint16x4_t halves = vget_low_u16(vmovl_u8(vreinterpret_u8_u32(vdup_n_u32(bytes))));
    return vreinterpretq_s32_u32(vmovl_u16(halves));
  }
  static I broadcast_int(int32_t value) { return vdupq_n_s32(value); }
  static I multiply(I a, int32_t b) { return vmulq_n_s32(a, b); }
  static I low_nibbles(I v) { return vandq_s32(v, vdupq_n_s32(0x0f0f0f0f)); }
  static I high_nibbles(I v) {
    return vreinterpretq_s32_u8(vshrq_n_u8(vreinterpretq_u8_s32(v), 4));
  }

  static I broadcast_word(const int8_t* p) {
    int32_t word;
    std::memcpy(&word, p, 4);
    return vdupq_n_s32(word);
  }

  template <WeightFormat kFormat>
  static uint8x16x4_t levels() {
    float table[16];
    for (int code = 0; code < 16; ++code)
      table[code] = is_4bit(kFormat) ? level_of(kFormat, code, 0) : 0.0f;
    uint8x16x4_t bytes;
    std::memcpy(&bytes, table, sizeof bytes);
    return bytes;
  }

  // Weight i of every word.
  template <WeightFormat kFormat>
  static F decode(I raw, int i, const uint8x16x4_t& levels) {
    const int shift = is_4bit(kFormat) ? nibble_shift(i) : 8 * i;
    const uint32x4_t shifted = vshlq_u32(vreinterpretq_u32_s32(raw), vdupq_n_s32(-shift));
    if constexpr (is_4bit(kFormat)) {  // bytes 4 code .. 4 code + 3 of the table
      const uint32x4_t code = vandq_u32(shifted, vdupq_n_u32(15));
      const uint32x4_t index = vmlaq_n_u32(vdupq_n_u32(0x03020100), code, 0x04040404);
      return vreinterpretq_f32_u8(vqtbl4q_u8(levels, vreinterpretq_u8_u32(index)));
    } else {
      const I byte = vreinterpretq_s32_u32(vandq_u32(shifted, vdupq_n_u32(255)));
      return vcvtq_f32_s32(vsubq_s32(byte, vdupq_n_s32(128)));
    }
  }
};

}  // namespace
}  // namespace llmos
