// The kernel of round_rows.h: a block for each row, whose threads hold up to 8192 elements between
// finding their largest and rounding them. Longer rows are read again, from the cache.
#pragma once

#include "cuda/fragments.h"
#include "cuda/primitives.cuh"
#include "cuda/round_rows.h"

namespace llmos {

constexpr uint32_t kRoundThreads = 128;
constexpr uint32_t kRoundSharedBytes = kRoundThreads / 32 * sizeof(uint32_t);

template <FloatType kType>
class RoundThread {
  static constexpr uint32_t kUnit = 8;  // elements that are read and written at a time
  static constexpr uint32_t kHeld = 8;  // units of a thread
  static constexpr uint32_t kBytes = kType == FloatType::kFp32 ? 4 : 2;
  static constexpr uint32_t kLoads = kUnit * kBytes / 16;
  using Unit = uint32_t[kLoads][4];

 public:
  __device__ RoundThread(const RoundRows& call, int64_t row, uint32_t thread)
      : call_(call),
        row_(row),
        thread_(thread),
        units_(static_cast<uint32_t>((call.k + kStep - 1) / kStep * (kStep / kUnit))),
        x_(static_cast<const uint8_t*>(call.x) + row * call.x_stride * kBytes),
        aligned_(reinterpret_cast<uintptr_t>(x_) % 16 == 0) {}

  __device__ void run() const {
    if (call_.group_size < call_.k)
      round_groups();
    else
      round_row();
  }

 private:
  __device__ void round_row() const {
    Unit held[kHeld], unit;
    uint32_t largest = 0;
#pragma unroll
    for (uint32_t i = 0; i < kHeld; ++i) {
      load(thread_ + i * kRoundThreads, held[i]);
      largest = larger(largest, largest_of(held[i]));
    }
    for (uint32_t i = thread_ + kHeld * kRoundThreads; i < units_; i += kRoundThreads) {
      load(i, unit);
      largest = larger(largest, largest_of(unit));
    }
    largest = largest_of_block(largest);
    const float inverse = 127.0f / amax(largest);
#pragma unroll
    for (uint32_t i = 0; i < kHeld; ++i) store(thread_ + i * kRoundThreads, held[i], inverse);
    for (uint32_t i = thread_ + kHeld * kRoundThreads; i < units_; i += kRoundThreads) {
      load(i, unit);
      store(i, unit, inverse);
    }
    if (thread_ == 0) call_.scales[row_] = scale(largest);
  }

  // A group lies in neighbouring lanes.
  __device__ void round_groups() const {
    const uint32_t lanes = static_cast<uint32_t>(call_.group_size) / kUnit;
    for (uint32_t first = 0; first < units_; first += kRoundThreads) {
      const uint32_t i = first + thread_;
      Unit unit;
      load(i, unit);
      const uint32_t largest = largest_of_lanes(largest_of(unit), lanes);
      store(i, unit, 127.0f / amax(largest));
      if (i % lanes == 0 && i * kUnit < call_.k)
        call_.scales[i / lanes * rounded_scales(call_.m) + row_] = scale(largest);
    }
  }

  // Zeros beyond the last element.
  __device__ void load(uint32_t i, Unit& unit) const {
    const int64_t first = int64_t{i} * kUnit;
    if (aligned_ && first + kUnit <= call_.k) {
#pragma unroll
      for (uint32_t j = 0; j < kLoads; ++j) load_16_bytes(x_ + first * kBytes + j * 16, unit[j]);
      return;
    }
#pragma unroll
    for (uint32_t e = 0; e < kUnit; ++e) {
      const uint32_t bits = first + e < call_.k ? element(first + e) : 0;
      uint32_t& word = unit[e * kBytes / 16][e * kBytes / 4 % 4];
      word = kBytes == 4 || e % 2 == 0 ? bits : word | bits << 16;
    }
  }

  __device__ uint32_t element(int64_t i) const {
    if constexpr (kBytes == 4) return reinterpret_cast<const uint32_t*>(x_)[i];
    return reinterpret_cast<const uint16_t*>(x_)[i];
  }

  __device__ static float value(const Unit& unit, uint32_t e) {
    const uint32_t word = unit[e * kBytes / 16][e * kBytes / 4 % 4];
    if constexpr (kType == FloatType::kFp32)
      return float_of(word);
    else
      return widen<kType>(static_cast<uint16_t>(word >> (e % 2 * 16)));
  }

  // Of magnitudes' bits: their order is that of the numbers, with inf and NaN on top.
  __device__ static uint32_t larger(uint32_t a, uint32_t b) { return a > b ? a : b; }

  __device__ static uint32_t largest_of(const Unit& unit) {
    uint32_t largest = 0;
#pragma unroll
    for (uint32_t e = 0; e < kUnit; ++e)
      largest = larger(largest, bits_of(value(unit, e)) & 0x7fffffff);
    return largest;
  }

  __device__ static uint32_t largest_of_lanes(uint32_t mine, uint32_t lanes) {
    for (uint32_t mask = 1; mask < lanes; mask *= 2) mine = larger(mine, exchange(mine, mask));
    return mine;
  }

  __device__ uint32_t largest_of_block(uint32_t mine) const {
    auto* of_warps = reinterpret_cast<uint32_t*>(shared_memory());
    of_warps[thread_ / 32] = largest_of_lanes(mine, 32);
    synchronize_block();
    uint32_t largest = 0;
#pragma unroll
    for (uint32_t warp = 0; warp < kRoundThreads / 32; ++warp)
      largest = larger(largest, of_warps[warp]);
    return largest;
  }

  __device__ static float amax(uint32_t largest) {
    const float value = float_of(largest);
    return value < 1e-30f ? 1e-30f : value;
  }

  __device__ static float scale(uint32_t largest) {
    return largest < 0x7f800000 ? amax(largest) / 127.0f : float_of(0x7fc00000);
  }

  __device__ void store(uint32_t i, const Unit& unit, float inverse) const {
    if (i >= units_) return;
    const uint32_t step = i / (kStep / kUnit), first_word = i % (kStep / kUnit) * 2;
    int8_t* row = call_.integers + rounded_place(call_.m, row_, step);
#pragma unroll
    for (uint32_t j = 0; j < 2; ++j) {
      const auto integer = [&](uint32_t e) {
        return static_cast<uint32_t>(nearest_integer(value(unit, 4 * j + e) * inverse));
      };
      const uint32_t word = permute_bytes(permute_bytes(integer(0), integer(1), 0x0040),
                                          permute_bytes(integer(2), integer(3), 0x0040), 0x5410);
      store_4_bytes(row + rounded_word(static_cast<uint32_t>(row_), first_word + j), word);
    }
  }

  const RoundRows& call_;
  const int64_t row_;
  const uint32_t thread_, units_;
  const uint8_t* x_;
  const bool aligned_;
};

template <FloatType kType>
__global__ void __launch_bounds__(kRoundThreads)
    round_rows_kernel(const __grid_constant__ RoundRows call) {
  RoundThread<kType>(call, blockIdx.x, threadIdx.x).run();
}

}  // namespace llmos
