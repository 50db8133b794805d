#include "cpu/quant_matmul.h"

#include "cpu/bf16.h"
#include "cpu/dispatch.h"

namespace llmos {

namespace {

// A word of a panel holds the same columns of 16 rows: rows are gathered from one cache line each.
template <typename T>
void dequantize_rows(const WeightShape& shape, const uint8_t* packed, const void* scales,
                     const uint8_t* zeros, T* out) {
  // Levels of all codes once: the loops below only look up.
  float levels[256];
  for (int code = 0; code < (is_4bit(shape.format) ? 16 : 256); ++code)
    levels[code] = level_of(shape.format, code, 0);
#pragma omp parallel for if (shape.n * shape.k > 65536)
  for (int64_t row = 0; row < shape.n; ++row)
    for (int64_t begin = 0; begin < shape.k; begin += shape.group_size) {
      const int64_t index = scale_index(shape, row, begin);
      const int64_t end = begin + shape.group_size < shape.k ? begin + shape.group_size : shape.k;
      const float zero = zeros != nullptr ? zeros[index] : 0.0f;
      const float scale = is_4bit(shape.format)
                              ? load(static_cast<const uint16_t*>(scales) + index)
                              : static_cast<const float*>(scales)[index];
      for (int64_t column = begin; column < end; ++column)
        store(&out[row * shape.k + column],
              (levels[code_at(shape, packed, row, column)] - zero) * scale);
    }
}

}  // namespace

void quant_matmul(const QuantMatmul& call) {
  static const QuantMatmulKernels* const tables[] = {
#if defined(__x86_64__)
      &quant_matmul_avx512_bf16, &quant_matmul_avx512, &quant_matmul_avx2,
#elif defined(__aarch64__)
      &quant_matmul_neon_i8mm, &quant_matmul_neon_dotprod,
#endif
      &quant_matmul_generic};
  choose(tables).run(call);
}

void dequantize(const WeightShape& shape, const uint8_t* packed, const void* scales,
                const uint8_t* zeros, bool bf16, void* out) {
  if (bf16)
    dequantize_rows(shape, packed, scales, zeros, static_cast<uint16_t*>(out));
  else
    dequantize_rows(shape, packed, scales, zeros, static_cast<float*>(out));
}

}  // namespace llmos
