#include "cpu/quant_rows.h"

#include <stdexcept>
#include <string>

#include "cpu/bf16.h"

namespace llmos {

namespace {

// Weights [begin, end) of a row, which begin at `word`; words of one row are `step` bytes apart.
template <bool narrow, typename T>
const uint8_t* decode_group(const uint8_t* word, int64_t step, const float* levels, int64_t begin,
                            int64_t end, T* out) {
  constexpr int width = narrow ? 8 : 4;
  const auto level = [&](int i) {
    return levels[narrow ? word[i % 4] >> (i / 4 * 4) & 0xf : word[i]];
  };
  int64_t column = begin;
  for (; column + width <= end; column += width, word += step)
    for (int i = 0; i < width; ++i) store(&out[column + i], level(i));
  if (column == end) return word;
  for (int i = 0; column + i < end; ++i) store(&out[column + i], level(i));
  return word + step;
}

// A word of a panel holds the same columns of 16 rows: a row is read from one cache line per word.
template <bool narrow, typename T>
void decode_rows(const QuantRows& call) {
  const WeightShape& shape = call.weight;
  const bool rowwise = shape.format == WeightFormat::kFp8;
  constexpr int codes = narrow ? 16 : 256;
  float values[codes];
  for (int code = 0; code < codes; ++code) values[code] = level_of(shape.format, code, 0);
#pragma omp parallel for if (call.count * shape.k > kWorthThreads)
  for (int64_t i = 0; i < call.count; ++i) {
    const int64_t row = call.ids.data ? call.ids[i] : i;
    const int64_t word_index = row / kPanel * words(shape) * kPanel + row % kPanel;
    const uint8_t* word = call.packed + (rowwise ? row * shape.k : word_index * 4);
    T* out = static_cast<T*>(call.out) + i * shape.k;
    float levels[codes];
    for (int64_t begin = 0; begin < shape.k; begin += shape.group_size) {
      const int64_t index = scale_index(shape, row, begin);
      const int64_t end = begin + shape.group_size < shape.k ? begin + shape.group_size : shape.k;
      const float zero = call.zeros ? call.zeros[index] : 0.0f;
      const float scale = narrow ? load(static_cast<const uint16_t*>(call.scales) + index)
                                 : static_cast<const float*>(call.scales)[index];
      for (int code = 0; code < codes; ++code) levels[code] = (values[code] - zero) * scale;
      word = decode_group<narrow>(word, rowwise ? 4 : 4 * kPanel, levels, begin, end, out);
    }
  }
}

template <typename T>
void decode_rows(const QuantRows& call) {
  is_4bit(call.weight.format) ? decode_rows<true, T>(call) : decode_rows<false, T>(call);
}

}  // namespace

void quant_rows(const QuantRows& call) {
  for (int64_t i = 0; call.ids.data && i < call.count; ++i)
    if (call.ids[i] < 0 || call.ids[i] >= call.weight.n)
      throw std::out_of_range("quant_embedding: ids must be in [0, " +
                              std::to_string(call.weight.n) + "), got " +
                              std::to_string(call.ids[i]));
  call.type == DType::bf16 ? decode_rows<uint16_t>(call) : decode_rows<float>(call);
}

}  // namespace llmos
