// The kernel of integer_matmul.h. Weights are read as in quant_matmul_kernel.cuh.
#pragma once

#include <type_traits>

#include "cuda/integer_matmul.h"
#include "cuda/pipeline.cuh"
#include "cuda/product_tile.cuh"
#include "cuda/unpack_integers.cuh"
#include "cuda/weight_stage.cuh"

namespace llmos {

// A stage of the ring in shared memory: the weight's parts, x behind the weights, its scales last.
template <WeightFormat kFormat, typename Tile>
struct IntegerRing : WeightStage<kFormat> {
  using Stage = WeightStage<kFormat>;
  static constexpr uint32_t kX = Tile::kRows * kStage;
  static constexpr uint32_t kGroups = Stage::kWeights + kX;  // where the weight's scales begin
  static constexpr uint32_t kXScales = kGroups + Stage::kScales + Stage::kZeros;
  static constexpr uint32_t kBytes =
      kXScales + (Stage::kGrouped ? kStageSteps * Tile::kRows * 4 : 0);
  static constexpr uint32_t kDepth = Tile::kWarpgroups ? 4 : Stage::kDepth;
  static_assert(Tile::kWarpgroups || kDepth * kBytes <= 162 << 10, "an A100 has 163 KB");
  static_assert(Tile::kBlocks * (kDepth * kBytes + 2048) <= 228 << 10, "an H200 has 228 KB");
};

// What one thread does for part `split` of the sums of tile `tile`.
template <WeightFormat kFormat, uint32_t kXWarps, uint32_t kXTiles>
class IntegerMatmulThread {
  using Tile = ProductTile<kXWarps, kXTiles>;
  using Ring = IntegerRing<kFormat, Tile>;
  using Sums = int32_t[Tile::kCount][4];
  using Result = std::conditional_t<Ring::kGrouped, float, int32_t>;
  static_assert(SumsOfThread<Tile::kCount, Result>::kSharedBytes <= Ring::kDepth * Ring::kBytes);
  // 1.5 * 2^23: a float whose bits plus n are those of it plus n, up to |n| = 2^22. A group of 128
  // has sums to 128 * 15 * 127.
  static constexpr int32_t kMagicBits = 0x4b400000;
  static constexpr float kMagic = 12582912.0f;

 public:
  __device__ IntegerMatmulThread(const CudaIntegerMatmul& call, uint32_t tile, uint32_t split,
                                 uint32_t thread)
      : call_(call),
        split_(split),
        thread_(thread),
        warp_(thread / 32),
        lane_(thread % 32),
        tile_(call, tile, thread),
        steps_(static_cast<uint32_t>(steps(call.weight))),
        groups_(static_cast<uint32_t>(groups(call.weight))),
        weights_(call, tile_.first_pair() + warp_, warp_, lane_, tile_.weight_policy()) {
#pragma unroll
    for (uint32_t index = 0; index < Tile::kCount; ++index)
#pragma unroll
      for (uint32_t e = 0; e < 4; ++e) sums_[index][e] = Ring::kGrouped ? kMagicBits : 0;
  }

  __device__ void run() {
    const uint32_t begin = first_stage(stages(call_.weight), split_, call_.splits);
    const uint32_t count = first_stage(stages(call_.weight), split_ + 1, call_.splits) - begin;
    run_pipeline<Ring::kDepth, Tile::kWarpgroups>(
        count, [&](uint32_t number) { copy(begin + number, slot(number)); },
        [&](uint32_t number) { multiply(slot(number)); });
    if constexpr (Tile::kWarpgroups) hold(sums_);
    tile_.template finish<!Ring::kGrouped>(split_, call_.type, results(), [&](int64_t x_row) {
      return Ring::kGrouped ? 1.0f : call_.x_scales[x_row];
    });
  }

 private:
  __device__ uint8_t* slot(uint32_t number) const {
    return shared_memory() + number % Ring::kDepth * Ring::kBytes;
  }

  // ---- global to shared memory ----

  __device__ void copy(uint32_t stage, uint8_t* slot) const {
    weights_.copy_weights(stage, slot);
    copy_x(stage, slot + Ring::kWeights);
    if constexpr (Ring::kGrouped) {
      weights_.copy_groups(stage, slot + Ring::kGroups);
      copy_x_scales(stage, slot + Ring::kXScales);
    }
  }

  // A thread copies the same half of a row's 32 k, of every kSteps-th step.
  __device__ void copy_x(uint32_t stage, uint8_t* to) const {
    constexpr uint32_t kPieces = Tile::kRows * 2, kSteps = kThreads / kPieces;
    const uint32_t piece = thread_ % kPieces;
    const int64_t row = tile_.first_row() + piece / 2;
#pragma unroll
    for (uint32_t i = 0; i < kStageSteps; i += kSteps) {
      const uint32_t in_stage = thread_ / kPieces + i;
      if (in_stage >= kStageSteps) return;
      const uint32_t step = stage * kStageSteps + in_stage;
      copy_async(to + (in_stage * kPieces + piece) * 16,
                 call_.x + rounded_place(call_.m, row, step) + piece % 2 * 16,
                 row < call_.m && step < steps_);
    }
  }

  // A thread copies the scales of four rows and one group of the stage.
  __device__ void copy_x_scales(uint32_t stage, uint8_t* to) const {
    const uint32_t group = thread_ / (Tile::kRows / 4);
    if (group >= weights_.groups_of_stage()) return;
    const uint32_t all = stage * weights_.groups_of_stage() + group;
    const int64_t row = tile_.first_row() + thread_ % (Tile::kRows / 4) * 4;
    copy_async(to + thread_ * 16, call_.x_scales + all * rounded_scales(call_.m) + row,
               row < call_.m && all < groups_);
  }

  // ---- products ----

  __device__ void multiply(uint8_t* slot) {
    if constexpr (Tile::kWarpgroups)
      multiply_by_warpgroups(slot);
    else
      multiply_by_warps(slot);
  }

  __device__ void multiply_by_warps(uint8_t* slot) {
#pragma unroll
    for (uint32_t step = 0; step < kStageSteps; ++step) {
      uint32_t levels[Tile::kPairs][2][4];
#pragma unroll
      for (uint32_t p = 0; p < Tile::kPairs; ++p)
        unpack_step(slot, step, tile_.pair() + p, levels[p]);
#pragma unroll
      for (uint32_t tile = 0; tile < kXTiles; ++tile) {
        const uint32_t x_row = step * Tile::kRows + tile_.row() + tile * kXTile + lane_ / 4;
        uint8_t* row = slot + Ring::kWeights + x_row * kStep;
        const uint32_t x[2] = {load_4_bytes(row + rounded_word(lane_ / 4, lane_ % 4 * 2)),
                               load_4_bytes(row + rounded_word(lane_ / 4, lane_ % 4 * 2 + 1))};
#pragma unroll
        for (uint32_t p = 0; p < Tile::kPairs; ++p)
#pragma unroll
          for (uint32_t r = 0; r < 2; ++r)
            multiply_tile(sums_[Tile::product_of(p, tile) + r], levels[p][r], x);
      }
      if constexpr (Ring::kGrouped)
        if (ends_group(weights_.groups_of_stage(), step))
          end_group(slot, group_of_step(weights_.groups_of_stage(), step));
    }
  }

  // A step's two products run while the next step's left operands are unpacked.
  __device__ void multiply_by_warpgroups(uint8_t* slot) {
#pragma unroll
    for (uint32_t step = 0; step < kStageSteps; ++step) {
      uint32_t (&levels)[2][4] = left_[step % 2];
      unpack_step(slot, step, tile_.pair(), levels);
      const uint64_t x = right_operand<kStep>(slot + Ring::kWeights + step * Tile::kRows * kStep);
      show_registers_to_products();
      multiply_warpgroup<0>(sums_, levels[0], x);
      multiply_warpgroup<1>(sums_, levels[1], x);
      commit_products();
      wait_for_products<1>();
    }
  }

  // The left operands of two products: rows i of 2 r and 2 r + 1, by the halves of the lane's k.
  __device__ void unpack_step(uint8_t* slot, uint32_t step, uint32_t pair,
                              uint32_t (&levels)[2][4]) const {
    uint32_t words[loads_per_step(kFormat)][4], zeros = 0;
    Ring::load_step(slot, pair, step, lane_, words);
    if constexpr (Ring::kHasZeros)
      zeros = Ring::load_zeros(slot + Ring::kGroups, pair,
                               group_of_step(weights_.groups_of_stage(), step), lane_);
#pragma unroll
    for (uint32_t i = 0; i < 4; ++i)
      if constexpr (Ring::kGrouped) {
        const uint32_t zero = Ring::kHasZeros ? spread_zero(zeros, i) : kEights;
        levels[i / 2][i % 2] = int4_levels(words[0][i], zero);
        levels[i / 2][i % 2 + 2] = int4_levels(words[0][i] >> 4, zero);
      } else {
        levels[i / 2][i % 2] = int8_levels(words[0][i]);
        levels[i / 2][i % 2 + 2] = int8_levels(words[1][i]);
      }
  }

  // The sums over a group, times its scales, go to the totals.
  __device__ void end_group(uint8_t* slot, uint32_t group) {
#pragma unroll
    for (uint32_t p = 0; p < Tile::kPairs; ++p) {
      float scales[4];
      Ring::load_scales(slot + Ring::kGroups, tile_.pair() + p, group, lane_, scales);
#pragma unroll
      for (uint32_t tile = 0; tile < kXTiles; ++tile) {
        const uint32_t x_row =
            group * Tile::kRows + tile_.row() + tile * kXTile + x_row_of(lane_, 0);
        uint32_t x_scales[2];
        load_8_bytes(slot + Ring::kXScales + x_row * 4, x_scales);
#pragma unroll
        for (uint32_t r = 0; r < 2; ++r)
#pragma unroll
          for (uint32_t e = 0; e < 4; ++e) {
            const uint32_t index = Tile::product_of(p, tile) + r;
            const float sum = float_of(sums_[index][e]) - kMagic;
            totals_[index][e] += sum * (scales[r * 2 + e / 2] * float_of(x_scales[e % 2]));
            sums_[index][e] = kMagicBits;
          }
      }
    }
  }

  // Where the sums of all k end up.
  __device__ Result (&results()) [Tile::kCount][4] {
    if constexpr (Ring::kGrouped)
      return totals_;
    else
      return sums_;
  }

  const CudaIntegerMatmul& call_;
  const uint32_t split_, thread_, warp_, lane_;
  const Tile tile_;
  const uint32_t steps_, groups_;
  const WeightCopies<kFormat> weights_;
  Sums sums_;                                                // of a group, or of a row
  float totals_[Ring::kGrouped ? Tile::kCount : 1][4] = {};  // of groups, scaled
  uint32_t left_[2][2][4];                                   // operands of products that may run
};

template <WeightFormat kFormat, uint32_t kXWarps, uint32_t kXTiles>
__global__ void __launch_bounds__(kThreads, (ProductTile<kXWarps, kXTiles>::kBlocks))
    integer_matmul_kernel(const __grid_constant__ CudaIntegerMatmul call) {
  if constexpr (kHasWarpgroups || !ProductTile<kXWarps, kXTiles>::kWarpgroups)
    IntegerMatmulThread<kFormat, kXWarps, kXTiles>(call, blockIdx.x, blockIdx.y, threadIdx.x).run();
}

struct IntegerMatmulKernel {
  void (*function)(CudaIntegerMatmul);
  int shared_bytes;
  uint32_t rows;  // of x in a tile
};

template <WeightFormat kFormat, uint32_t kXWarps, uint32_t kXTiles>
IntegerMatmulKernel integer_instance() {
  using Tile = ProductTile<kXWarps, kXTiles>;
  using Ring = IntegerRing<kFormat, Tile>;
  return {integer_matmul_kernel<kFormat, kXWarps, kXTiles>, Ring::kDepth * Ring::kBytes,
          Tile::kRows};
}

template <WeightFormat kFormat>
IntegerMatmulKernel integer_instance_for(int64_t m, bool warpgroups) {
  if (m <= 8) return integer_instance<kFormat, 1, 1>();
  if (m <= 16) return integer_instance<kFormat, 1, 2>();
  if (m <= 32) return integer_instance<kFormat, 1, 4>();
  // sums over a group and totals leave no registers for more rows
  if constexpr (!is_4bit(kFormat))
    if (m > 64)
      return warpgroups ? integer_instance<kFormat, 1, 16>() : integer_instance<kFormat, 2, 8>();
  return integer_instance<kFormat, 1, 8>();
}

}  // namespace llmos
