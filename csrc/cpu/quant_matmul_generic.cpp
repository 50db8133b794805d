// Plain C++: any CPU. Vectors are arrays of 16, which the compiler maps to what there is.
#include "cpu/quant_matmul_prelude.h"
// it opens no region, but builds in the same order
#include "cpu/bf16.h"
#include "cpu/quant_matmul_epilogue.h"
#include "cpu/quant_matmul_rows.h"
#include "cpu/quant_matmul_tile.h"
// in this order: they build on one another
#include "cpu/quant_matmul_kernel.h"

namespace llmos {
namespace {

template <typename T>
struct Array {
  T lane[16];
};

struct Generic {
  using Rounding = PlainRounding;
  using I = Array<int32_t>;
  using F = Array<float>;
  static constexpr int kLanes = 16;
  static constexpr int kRegisters = 16;
  static constexpr int kRows = 4;
  static constexpr int kVectors = 1;
  static constexpr int kGroupedVectors = 1;
  static constexpr int kStreamRows = 2;
  static constexpr int stream_vectors(int, bool) { return 1; }
  static constexpr bool kPairs = false;

  template <typename T, typename Of>
  static Array<T> each(Of of) {
    Array<T> result;
    for (int i = 0; i < kLanes; ++i) result.lane[i] = of(i);
    return result;
  }

  template <typename T>
  static Array<T> load_array(const void* p) {
    Array<T> result;
    std::memcpy(&result, p, sizeof result);
    return result;
  }

  static int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
  static F broadcast(float value) {
    return each<float>([=](int) { return value; });
  }
  static F zero() { return broadcast(0.0f); }
  static F load_floats(const float* p) { return load_array<float>(p); }
  static void store_floats(float* p, const F& v) { std::memcpy(p, &v, sizeof v); }
  static F multiply(const F& a, const F& b) {
    return each<float>([&](int i) { return a.lane[i] * b.lane[i]; });
  }
  static F subtract(const F& a, const F& b) {
    return each<float>([&](int i) { return a.lane[i] - b.lane[i]; });
  }
  static F fma(const F& a, const F& b, const F& c) {
    return each<float>([&](int i) { return a.lane[i] * b.lane[i] + c.lane[i]; });
  }
  static F to_float(const I& v) {
    return each<float>([&](int i) { return static_cast<float>(v.lane[i]); });
  }
  static I load_ints(const int32_t* p) { return load_array<int32_t>(p); }
  static void store_ints(int32_t* p, const I& v) { std::memcpy(p, &v, sizeof v); }
  static I load_bytes(const uint8_t* p) { return load_array<int32_t>(p); }
  static void store_bytes(uint8_t* p, const I& v) { std::memcpy(p, &v, sizeof v); }
  static I widen_bytes(const uint8_t* p) {
    return each<int32_t>([=](int i) { return p[i]; });
  }
  static I broadcast_int(int32_t value) {
    return each<int32_t>([=](int) { return value; });
  }
  static F load_bf16(const uint8_t* p) {
    return each<float>([=](int i) {
      uint16_t half;
      std::memcpy(&half, p + 2 * i, 2);
      return load(&half);
    });
  }
  static I multiply(const I& a, int32_t b) {
    return each<int32_t>([&](int i) { return a.lane[i] * b; });
  }
  static I low_nibbles(const I& v) {
    return each<int32_t>([&](int i) { return v.lane[i] & 0x0f0f0f0f; });
  }
  static I high_nibbles(const I& v) {
    return each<int32_t>([&](int i) { return (v.lane[i] >> 4) & 0x0f0f0f0f; });
  }
  static I broadcast_word(const int8_t* p) {
    int32_t word;
    std::memcpy(&word, p, 4);
    return each<int32_t>([=](int) { return word; });
  }

  template <bool k4Bit>
  static I dot(const I& acc, const I& weights, const I& x) {
    return each<int32_t>([&](int i) {
      int32_t sum = acc.lane[i];
      for (int byte = 0; byte < 32; byte += 8)
        sum += ((weights.lane[i] >> byte) & 255) * static_cast<int8_t>(x.lane[i] >> byte);
      return sum;
    });
  }

  template <WeightFormat kFormat>
  static Array<float> levels() {
    return each<float>([](int i) { return is_4bit(kFormat) ? level_of(kFormat, i, 0) : 0.0f; });
  }

  // Weight i of every word; the panels hold int8 + 128.
  template <WeightFormat kFormat>
  static F decode(const I& raw, int i, const F& levels) {
    return each<float>([&](int lane) {
      const uint32_t word = raw.lane[lane];
      if constexpr (is_4bit(kFormat)) return levels.lane[(word >> nibble_shift(i)) & 15];
      return static_cast<float>(static_cast<int>((word >> (8 * i)) & 255) - 128);
    });
  }
};

bool always() { return true; }

}  // namespace

extern const QuantMatmulKernels quant_matmul_generic = {"generic", &always, &run<Generic>};

}  // namespace llmos
