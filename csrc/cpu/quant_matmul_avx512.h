// What the AVX-512 sets share: 16 columns to a register, vpdpbusd takes unsigned codes times signed
// x. Include it inside a target region.
#pragma once

namespace llmos {
namespace {

struct Avx512Rounding {
  static lanes::I round(lanes::F x) { return (lanes::I)_mm512_cvtps_epi32((__m512)x); }
  static Bytes narrow(lanes::I x) { return (Bytes)_mm512_cvtepi32_epi8((__m512i)x); }
  static uint32_t largest(lanes::U x) { return _mm512_reduce_max_epu32((__m512i)x); }
  static int32_t total(lanes::I x) { return _mm512_reduce_add_epi32((__m512i)x); }
};

struct Avx512 {
  using Rounding = Avx512Rounding;
  using I = __m512i;
  using F = __m512;
  static constexpr int kLanes = 16;
  static constexpr int kRegisters = 32;
  static constexpr int kRows = 6;  // 24 accumulators + 4 weights + 1 x of 32 registers
  static constexpr int kVectors = 4;
  static constexpr int kGroupedVectors = 2;
  static constexpr int kStreamRows = 8;
  static constexpr int stream_vectors(int rows, bool grouped) {
    return rows <= 4 || !grouped ? 4 : 1;
  }
  static constexpr bool kPairs = false;

  static int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
  static F zero() { return _mm512_setzero_ps(); }
  static F broadcast(float value) { return _mm512_set1_ps(value); }
  static F load_floats(const float* p) { return _mm512_loadu_ps(p); }
  static void store_floats(float* p, F v) { _mm512_storeu_ps(p, v); }
  static F multiply(F a, F b) { return _mm512_mul_ps(a, b); }
  static F subtract(F a, F b) { return _mm512_sub_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static F to_float(I v) { return _mm512_cvtepi32_ps(v); }
  static F load_bf16(const uint8_t* p) {
    const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
  }
  static I load_ints(const int32_t* p) { return _mm512_loadu_si512(p); }
  static void store_ints(int32_t* p, I v) { _mm512_storeu_si512(p, v); }
  static I load_bytes(const uint8_t* p) { return _mm512_loadu_si512(p); }
  static void store_bytes(uint8_t* p, I v) { _mm512_storeu_si512(p, v); }
  static I widen_bytes(const uint8_t* p) {
    return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static I broadcast_int(int32_t value) { return _mm512_set1_epi32(value); }
  static I multiply(I a, int32_t b) { return _mm512_mullo_epi32(a, _mm512_set1_epi32(b)); }
  static I low_nibbles(I v) { return _mm512_and_si512(v, _mm512_set1_epi8(15)); }
  static I high_nibbles(I v) { return low_nibbles(_mm512_srli_epi32(v, 4)); }

  static I broadcast_word(const int8_t* p) {
    int32_t word;
    std::memcpy(&word, p, 4);
    return _mm512_set1_epi32(word);
  }

  template <bool k4Bit>
  static I dot(I acc, I weights, I x) {
    // not _mm512_dpbusd_epi32: GCC 12 copies and spills its accumulators, at half the speed
    asm("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(weights), "v"(x));
    return acc;
  }

  // vpermps reads the low four bits of an index only: a 4-bit code needs no mask.
  template <WeightFormat kFormat>
  static F levels() {
    alignas(64) float table[16];
    for (int code = 0; code < 16; ++code)
      table[code] = is_4bit(kFormat) ? level_of(kFormat, code, 0) : 0.0f;
    return _mm512_load_ps(table);
  }

  // Weight i of every word.
  template <WeightFormat kFormat>
  static F decode(I raw, int i, F levels) {
    if constexpr (is_4bit(kFormat)) {
      const I code = _mm512_srl_epi32(raw, _mm_cvtsi32_si128(nibble_shift(i)));
      return _mm512_permutexvar_ps(code, levels);
    } else {
      // code + 2^23 as float by setting the bits of 2^23 above it; then minus (2^23 + 128)
      const I code = _mm512_srl_epi32(raw, _mm_cvtsi32_si128(8 * i));
      const I bits = _mm512_ternarylogic_epi32(code, _mm512_set1_epi32(255),
                                               _mm512_set1_epi32(0x4b000000), 0xea);
      return _mm512_sub_ps(_mm512_castsi512_ps(bits), _mm512_set1_ps(8388736.0f));
    }
  }
};

}  // namespace
}  // namespace llmos
