// AVX2 + FMA: 8 columns to a register; products in 16 bits, sums in 32.
#if defined(__x86_64__)

#include <immintrin.h>

#include "cpu/quant_matmul_prelude.h"

LLMOS_TARGET_BEGIN("avx2,fma")

#include "cpu/bf16.h"
#include "cpu/quant_matmul_epilogue.h"
#include "cpu/quant_matmul_rows.h"
#include "cpu/quant_matmul_tile.h"
// in this order: they build on one another
#include "cpu/quant_matmul_kernel.h"

namespace llmos {
namespace {

struct Avx2 {
  using Rounding = PlainRounding;
  using I = __m256i;
  using F = __m256;
  static constexpr int kLanes = 8;
  static constexpr int kRegisters = 16;
  static constexpr int kRows = 4;
  static constexpr int kVectors = 2;
  static constexpr int kGroupedVectors = 2;
  static constexpr int kStreamRows = 4;
  static constexpr int stream_vectors(int rows, bool) { return rows == 1 ? 4 : 2; }
  static constexpr bool kPairs = false;

  static int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
  static F zero() { return _mm256_setzero_ps(); }
  static F broadcast(float value) { return _mm256_set1_ps(value); }
  static F load_floats(const float* p) { return _mm256_loadu_ps(p); }
  static void store_floats(float* p, F v) { _mm256_storeu_ps(p, v); }
  static F multiply(F a, F b) { return _mm256_mul_ps(a, b); }
  static F subtract(F a, F b) { return _mm256_sub_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  static F to_float(I v) { return _mm256_cvtepi32_ps(v); }
  static I load_ints(const void* p) { return _mm256_loadu_si256(static_cast<const I*>(p)); }
  static void store_ints(void* p, I v) { _mm256_storeu_si256(static_cast<I*>(p), v); }
  static I load_bytes(const uint8_t* p) { return load_ints(p); }
  static void store_bytes(uint8_t* p, I v) { store_ints(p, v); }
  static I widen_bytes(const uint8_t* p) {
    return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  }
  static I broadcast_int(int32_t value) { return _mm256_set1_epi32(value); }
  static F load_bf16(const uint8_t* p) {
    const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
  }
  static I multiply(I a, int32_t b) { return _mm256_mullo_epi32(a, _mm256_set1_epi32(b)); }
  static I low_nibbles(I v) { return _mm256_and_si256(v, _mm256_set1_epi8(15)); }
  static I high_nibbles(I v) { return low_nibbles(_mm256_srli_epi32(v, 4)); }

  static I broadcast_word(const int8_t* p) {
    int32_t word;
    std::memcpy(&word, p, 4);
    return _mm256_set1_epi32(word);
  }

  template <bool k4Bit>
  static I dot(I acc, I weights, I x) {
    if constexpr (k4Bit) {  // 2 * 15 * 127 fits 16 bits: vpmaddubsw cannot saturate
      const I pairs = _mm256_maddubs_epi16(weights, x);
      return _mm256_add_epi32(acc, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
    } else {  // 2 * 255 * 127 does not: bytes 0 2 and bytes 1 3 of a word, widened to 16 bits
      const I even = _mm256_and_si256(weights, _mm256_set1_epi16(255));
      const I odd = _mm256_srli_epi16(weights, 8);
      const I x_even = _mm256_srai_epi16(_mm256_slli_epi16(x, 8), 8);
      const I x_odd = _mm256_srai_epi16(x, 8);
      acc = _mm256_add_epi32(acc, _mm256_madd_epi16(even, x_even));
      return _mm256_add_epi32(acc, _mm256_madd_epi16(odd, x_odd));
    }
  }

  struct Levels {
    F low, high;
  };

  template <WeightFormat kFormat>
  static Levels levels() {
    alignas(32) float table[16];
    for (int code = 0; code < 16; ++code)
      table[code] = is_4bit(kFormat) ? level_of(kFormat, code, 0) : 0.0f;
    return {_mm256_load_ps(table), _mm256_load_ps(table + 8)};
  }

  // Weight i of every word.
  template <WeightFormat kFormat>
  static F decode(I raw, int i, const Levels& levels) {
    if constexpr (is_4bit(kFormat)) {  // vpermps reads three bits, the fourth chooses the table
      const I code = _mm256_srl_epi32(raw, _mm_cvtsi32_si128(nibble_shift(i)));
      return _mm256_blendv_ps(_mm256_permutevar8x32_ps(levels.low, code),
                              _mm256_permutevar8x32_ps(levels.high, code),
                              _mm256_castsi256_ps(_mm256_slli_epi32(code, 28)));
    } else {
      const I code = _mm256_srl_epi32(raw, _mm_cvtsi32_si128(8 * i));
      const I byte = _mm256_and_si256(code, _mm256_set1_epi32(255));
      return _mm256_cvtepi32_ps(_mm256_sub_epi32(byte, _mm256_set1_epi32(128)));
    }
  }
};

}  // namespace

extern const QuantMatmulKernels quant_matmul_avx2 = {"avx2", &cpu_has_avx2, &run<Avx2>};

}  // namespace llmos

LLMOS_TARGET_END

#endif
