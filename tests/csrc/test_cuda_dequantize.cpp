// The CUDA kernel that dequantizes, on the GPU of simt/, against the definition: bit by bit.
#include <cstdio>

#include "cuda/dequantize_kernel.cuh"

using namespace llmos;

namespace {

template <WeightFormat kFormat, FloatType kType>
bool dequantizes(int64_t n, int64_t k, int64_t group_size) {
  constexpr int kBytes = kType == FloatType::kFp32 ? 4 : 2;
  const WeightShape shape{n, k, kFormat == WeightFormat::kInt8 ? k : group_size, kFormat};
  const int64_t panels = (n + kPanel - 1) / kPanel, entries = panels * groups(shape) * kPanel;
  Guarded packed(panels * words(shape) * kPanel * 4, 0), zeros(entries, 0);
  Guarded scales(entries * (is_4bit(kFormat) ? 2 : 4), 0), out(n * k * kBytes, 0);
  uint32_t state = 1;
  const auto random = [&] { return (state = state * 1664525 + 1013904223) >> 16; };
  for (int64_t i = 0; i < panels * words(shape) * kPanel * 4; ++i) packed.data()[i] = random();
  const auto scale_of = [&](int64_t i) {
    return is_4bit(kFormat) ? widen<FloatType::kBf16>(reinterpret_cast<uint16_t*>(scales.data())[i])
                            : reinterpret_cast<float*>(scales.data())[i];
  };
  for (int64_t i = 0; i < entries; ++i) {
    const float scale = (random() % 1000 - 500.0f) / 7000;
    if (is_4bit(kFormat))
      reinterpret_cast<uint16_t*>(scales.data())[i] = narrow<FloatType::kBf16>(scale);
    else
      reinterpret_cast<float*>(scales.data())[i] = scale;
    zeros.data()[i] = random() % 16;
  }
  const Dequantize call{shape, packed.data(), scales.data(),
                        kFormat == WeightFormat::kInt4Asym ? zeros.data() : nullptr, out.data()};
  // fewer blocks than panels, so that blocks walk
  const uint32_t rows_of_blocks = panels > 2 ? 2 : 1;
  bool holds =
      simt::run_grid({dequantize_blocks(shape), rows_of_blocks}, kDequantizeThreads,
                     kDequantizeSharedBytes, [&] { dequantize_kernel<kFormat, kType>(call); });
  for (Guarded* memory : {&packed, &zeros, &scales, &out}) holds = holds && memory->guards_hold();
  for (int64_t row = 0; row < n; ++row)
    for (int64_t column = 0; column < k; ++column) {
      const int64_t at = scale_index(shape, row, column);
      const int zero = zeros.data()[at];
      const float expected =
          scale_of(at) * level_of(kFormat, code_at(shape, packed.data(), row, column), zero);
      const void* found = out.data() + (row * k + column) * kBytes;
      if constexpr (kType == FloatType::kFp32)
        holds = holds && *static_cast<const float*>(found) == expected;
      else
        holds = holds && *static_cast<const uint16_t*>(found) == narrow<kType>(expected);
    }
  if (!holds)
    std::printf("FAILED: format %d type %d n %d k %d group %d\n", int(kFormat), int(kType), int(n),
                int(k), int(group_size));
  return holds;
}

template <WeightFormat kFormat>
void every_type(int* counts) {
  const int64_t sizes[][3] = {
      {1, 1, 32}, {50, 72, 64}, {17, 613, 32}, {40, 1100, 128}, {16, 6, 64}};
  for (const auto& size : sizes) {
    ++counts[dequantizes<kFormat, FloatType::kFp32>(size[0], size[1], size[2])];
    ++counts[dequantizes<kFormat, FloatType::kBf16>(size[0], size[1], size[2])];
    ++counts[dequantizes<kFormat, FloatType::kFp16>(size[0], size[1], size[2])];
  }
}

}  // namespace

int main() {
  int counts[2] = {0, 0};
  every_type<WeightFormat::kInt8>(counts);
  every_type<WeightFormat::kInt4>(counts);
  every_type<WeightFormat::kInt4Asym>(counts);
  every_type<WeightFormat::kNf4>(counts);
  std::printf("%d passed, %d failed\n", counts[1], counts[0]);
  return counts[0] != 0;
}
