// The kernel of dequantize.h: a thread reads 16 bytes, one word of four neighbouring rows, and
// writes a word's weights of each. Neighbours read neighbouring bytes, 8 words of 16 rows in a
// warp, so that a row is written in runs of 8 words.
#pragma once

#include <type_traits>

#include "cuda/dequantize.h"
#include "cuda/primitives.cuh"

namespace llmos {

constexpr uint32_t kDequantizeThreads = 256;
constexpr uint32_t kRowsOfThread = 4;
constexpr uint32_t kThreadsOfWord = kPanel / kRowsOfThread;

template <WeightFormat kFormat, FloatType kType>
class DequantizeThread {
  static constexpr uint32_t kCodes = per_word(kFormat);
  using Value = std::conditional_t<kType == FloatType::kFp32, float, uint16_t>;
  // written at once, or by 16 bytes
  struct alignas(kCodes * sizeof(Value) < 16 ? kCodes * sizeof(Value) : 16) Values {
    Value of[kCodes];
  };

 public:
  __device__ DequantizeThread(const Dequantize& call, uint32_t unit)
      : call_(call),
        word_(unit / kThreadsOfWord),
        first_row_(unit % kThreadsOfWord * kRowsOfThread),
        group_(word_ * kCodes / static_cast<uint32_t>(call.weight.group_size)),
        groups_(groups(call.weight)) {}

  // Of every `step`-th panel from `panel` on; `nf4` has the levels of kNf4.
  __device__ void run(int64_t panel, int64_t step, const float* nf4) const {
    const int64_t words = llmos::words(call_.weight);
    if (word_ >= words) return;
    for (; panel * kPanel < call_.weight.n; panel += step) {
      uint32_t stored[kRowsOfThread];
      load_16_bytes(call_.packed + ((panel * words + word_) * kPanel + first_row_) * 4, stored);
#pragma unroll
      for (uint32_t i = 0; i < kRowsOfThread; ++i) {
        const int64_t row = panel * kPanel + first_row_ + i;
        if (row < call_.weight.n) write(row, stored[i], nf4);
      }
    }
  }

 private:
  __device__ void write(int64_t row, uint32_t word, const float* nf4) const {
    const int64_t at = (row / kPanel * groups_ + group_) * kPanel + row % kPanel;
    const float scale =
        is_4bit(kFormat) ? widen<FloatType::kBf16>(static_cast<const uint16_t*>(call_.scales)[at])
                         : static_cast<const float*>(call_.scales)[at];
    const int zero = kFormat == WeightFormat::kInt4Asym ? call_.zeros[at] : 0;
    Values values;
#pragma unroll
    for (uint32_t i = 0; i < kCodes; ++i) {
      const int code = is_4bit(kFormat) ? word >> nibble_shift(i) & 0xf : word >> (8 * i) & 0xff;
      const float level = kFormat == WeightFormat::kNf4 ? nf4[code] : level_of(kFormat, code, zero);
      if constexpr (kType == FloatType::kFp32)
        values.of[i] = scale * level;
      else
        values.of[i] = narrow<kType>(scale * level);
    }
    const uint32_t column = word_ * kCodes;
    Value* target = static_cast<Value*>(call_.out) + row * call_.weight.k + column;
    if (call_.weight.k % kCodes == 0) {
      *reinterpret_cast<Values*>(target) = values;
      return;
    }
    for (uint32_t i = 0; i < kCodes && column + i < call_.weight.k; ++i) target[i] = values.of[i];
  }

  const Dequantize& call_;
  const uint32_t word_, first_row_, group_;
  const int64_t groups_;
};

template <WeightFormat kFormat, FloatType kType>
__global__ void __launch_bounds__(kDequantizeThreads)
    dequantize_kernel(const __grid_constant__ Dequantize call) {
  auto* nf4 = reinterpret_cast<float*>(shared_memory());
  if constexpr (kFormat == WeightFormat::kNf4) {
    if (threadIdx.x < 16) nf4[threadIdx.x] = nf4_value(static_cast<int>(threadIdx.x));
    synchronize_block();
  }
  DequantizeThread<kFormat, kType>(call, blockIdx.x * kDequantizeThreads + threadIdx.x)
      .run(blockIdx.y, gridDim.y, nf4);
}

// Blocks of a launch: threads for all words of a panel, by panels.
inline uint32_t dequantize_blocks(const WeightShape& weight) {
  const int64_t threads = words(weight) * kThreadsOfWord;
  return static_cast<uint32_t>((threads + kDequantizeThreads - 1) / kDequantizeThreads);
}

constexpr uint32_t kDequantizeSharedBytes = 16 * sizeof(float);

}  // namespace llmos
