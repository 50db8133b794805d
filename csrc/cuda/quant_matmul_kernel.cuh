// The kernel of quant_matmul.h. Few rows of x make it a matter of reading the weight: 16-byte
// copies to shared memory run several stages ahead of the tensor cores, on every SM. Many rows make
// it one of tensor cores, which weights then reach already scaled.
#pragma once

#include "cuda/pipeline.cuh"
#include "cuda/product_tile.cuh"
#include "cuda/quant_matmul.h"
#include "cuda/unpack.cuh"
#include "cuda/weight_stage.cuh"

namespace llmos {

// A stage of the ring in shared memory: the weight's parts, with x behind the weights.
template <WeightFormat kFormat, typename Tile>
struct QuantMatmulRing : WeightStage<kFormat> {
  using Stage = WeightStage<kFormat>;
  static constexpr uint32_t kX = Tile::kRows * kStage * 2;
  static constexpr uint32_t kGroups = Stage::kWeights + kX;  // where scales begin
  static constexpr uint32_t kBytes = kGroups + Stage::kScales + Stage::kZeros;
  // a block has 163 KB on an A100, 227 KB on an H200
  static constexpr uint32_t kMostDepth = (Tile::kWarpgroups ? 226 << 10 : 162 << 10) / kBytes;
  static constexpr uint32_t kDepth = Stage::kDepth < kMostDepth ? Stage::kDepth : kMostDepth;
  static_assert(kDepth >= (Tile::kWarpgroups ? 3 : 2), "copies run ahead");
  static_assert(Tile::kBlocks * (kDepth * kBytes + 2048) <= 228 << 10, "an H200 has 228 KB");
};

// What one thread does for part `split` of the sums of tile `tile`.
template <WeightFormat kFormat, FloatType kType, uint32_t kXWarps, uint32_t kXTiles>
class QuantMatmulThread {
  using Tile = ProductTile<kXWarps, kXTiles>;
  using Ring = QuantMatmulRing<kFormat, Tile>;
  using Sums = float[Tile::kCount][4];
  static_assert(SumsOfThread<Tile::kCount, float>::kSharedBytes <= Ring::kDepth * Ring::kBytes);
  // several pairs leave no registers for sums of a group beside totals
  static constexpr bool kScalesWeights = Ring::kGrouped && (Tile::kPairs > 1 || Tile::kWarpgroups);
  static constexpr bool kHasTotals = Ring::kGrouped && !kScalesWeights;
  // steps at a time: of more, ptxas begins the next one so early that registers spill
  static constexpr uint32_t kUnrolled = kScalesWeights ? 1 : kStageSteps;

 public:
  __device__ QuantMatmulThread(const CudaQuantMatmul& call, uint32_t tile, uint32_t split,
                               uint32_t thread)
      : call_(call),
        split_(split),
        thread_(thread),
        warp_(thread / 32),
        lane_(thread % 32),
        tile_(call, tile, thread),
        neighbours_(lane_),
        weights_(call, tile_.first_pair() + warp_, warp_, lane_, tile_.weight_policy()),
        x_(call.x + (tile_.first_row() + x_row()) * call.x_stride + x_unit() * 8) {}

  __device__ void run() {
    const uint32_t begin = first_stage(stages(call_.weight), split_, call_.splits);
    const uint32_t count = first_stage(stages(call_.weight), split_ + 1, call_.splits) - begin;
    run_pipeline<Ring::kDepth, Tile::kWarpgroups>(
        count, [&](uint32_t number) { copy(begin + number, slot(number)); },
        [&](uint32_t number) { multiply(slot(number)); });
    if constexpr (Tile::kWarpgroups) hold(sums_);
    tile_.template finish<!Ring::kGrouped>(split_, kType, kHasTotals ? totals_ : sums_,
                                           [](int64_t) { return 1.0f; });
  }

 private:
  __device__ uint8_t* slot(uint32_t number) const {
    return shared_memory() + number % Ring::kDepth * Ring::kBytes;
  }

  // ---- global to shared memory ----

  __device__ void copy(uint32_t stage, uint8_t* slot) const {
    weights_.copy_weights(stage, slot);
    copy_x(stage, slot + Ring::kWeights);
    if constexpr (Ring::kGrouped) weights_.copy_groups(stage, slot + Ring::kGroups);
  }

  // A thread copies the same 8 k of every kXRows-th row.
  static constexpr uint32_t kXUnits = kStage / 8, kXRows = kThreads / kXUnits;
  __device__ uint32_t x_row() const { return thread_ / kXUnits; }
  __device__ uint32_t x_unit() const { return thread_ % kXUnits; }

  __device__ void copy_x(uint32_t stage, uint8_t* to) const {
    const uint32_t k = stage * kStage + x_unit() * 8;
#pragma unroll
    for (uint32_t i = 0; i < Tile::kRows; i += kXRows) {
      const uint32_t row = x_row() + i;
      if (Tile::kRows % kXRows == 0 || row < Tile::kRows)
        copy_async(to + x_place(Tile::kRows, row, x_unit()) * 16,
                   x_ + i * call_.x_stride + int64_t{stage} * kStage,
                   tile_.first_row() + row < call_.m && k < call_.weight.k);
    }
  }

  // ---- products ----

  __device__ void multiply(uint8_t* slot) {
    if constexpr (Tile::kWarpgroups)
      multiply_by_warpgroups(slot);
    else
      multiply_by_warps(slot);
  }

  __device__ void multiply_by_warps(uint8_t* slot) {
#pragma unroll kUnrolled
    for (uint32_t step = 0; step < kStageSteps; ++step) {
      const uint32_t group = Ring::kGrouped ? group_of_step(weights_.groups_of_stage(), step) : 0;
      uint32_t levels[Tile::kPairs][4][4];  // pairs of the lane's four rows
#pragma unroll
      for (uint32_t p = 0; p < Tile::kPairs; ++p)
        unpack_step(slot, step, tile_.pair() + p, group, levels[p]);
#pragma unroll
      for (uint32_t tile = 0; tile < kXTiles; ++tile) {
        uint32_t x[4];
        x_of_step(slot + Ring::kWeights, step, tile, x);
#pragma unroll
        for (uint32_t p = 0; p < Tile::kPairs; ++p)
          multiply_pair(levels[p], x, &sums_[Tile::product_of(p, tile)]);
      }
      if constexpr (kHasTotals)
        if (ends_group(weights_.groups_of_stage(), step)) end_group(slot + Ring::kGroups, group);
    }
  }

  // A pair of panels by 8 rows of x: two products, for the halves of the step's k.
  __device__ static void multiply_pair(const uint32_t (&levels)[4][4], const uint32_t (&x)[4],
                                       float (*sums)[4]) {
#pragma unroll
    for (int j = 0; j < 2; ++j)
#pragma unroll
      for (int r = 0; r < 2; ++r)
        multiply_tile<kType>(sums[r],
                             {levels[2 * r][2 * j], levels[2 * r + 1][2 * j],
                              levels[2 * r][2 * j + 1], levels[2 * r + 1][2 * j + 1]},
                             {x[2 * j], x[2 * j + 1]});
  }

  // Halves of a step: two products run while the next ones' left operands are unpacked.
  __device__ void multiply_by_warpgroups(uint8_t* slot) {
#pragma unroll 1
    for (uint32_t step = 0; step < kStageSteps; ++step)
#pragma unroll
      for (uint32_t half = 0; half < 2; ++half) {
        unpack_half(slot, step, half, left_[half]);
        const uint8_t* x = slot + Ring::kWeights + (step * Tile::kRows * 2 + half) * kStep;
        show_registers_to_products();
        multiply_warpgroup<kType, 0>(sums_, left_[half][0], right_operand<2 * kStep>(x));
        multiply_warpgroup<kType, 1>(sums_, left_[half][1], right_operand<2 * kStep>(x));
        commit_products();
        wait_for_products<1>();
      }
  }

  // The left operands of two products: rows i of 2 r and 2 r + 1, by the half's two units of k.
  __device__ void unpack_half(uint8_t* slot, uint32_t step, uint32_t half,
                              uint32_t (&levels)[2][4]) const {
    uint8_t* groups = slot + Ring::kGroups;
    const uint32_t group = Ring::kGrouped ? group_of_step(weights_.groups_of_stage(), step) : 0;
    float scales[4];
    if constexpr (Ring::kGrouped) Ring::load_scales(groups, tile_.pair(), group, lane_, scales);
    uint32_t zeros = 0;
    if constexpr (Ring::kHasZeros) zeros = Ring::load_zeros(groups, tile_.pair(), group, lane_);
#pragma unroll
    for (uint32_t unit = 0; unit < 2; ++unit) {
      uint32_t words[4];
      Ring::load_unit(slot, tile_.pair(), step, 2 * half + unit, lane_, words);
#pragma unroll
      for (uint32_t r = 0; r < 2; ++r) {
        uint32_t pairs[2];
        unpack_neighbours(words[2 * r], words[2 * r + 1], zeros, 2 * r, pairs);
#pragma unroll
        for (uint32_t i = 0; i < 2; ++i)
          levels[r][2 * unit + i] =
              Ring::kGrouped ? scale_pair<kType>(pairs[i], scales[2 * r + i]) : pairs[i];
      }
    }
  }

  // The lane's pairs of rows `row` and row + 1.
  __device__ void unpack_neighbours(uint32_t first, uint32_t second, uint32_t zeros, uint32_t row,
                                    uint32_t (&pairs)[2]) const {
    const uint32_t words[2] = {first, second};
    if constexpr (kFormat == WeightFormat::kNf4)
      unpack_nf4_pairs<kType>({neighbours_.nibbles(first), neighbours_.nibbles(second)}, pairs);
    else
#pragma unroll
      for (uint32_t i = 0; i < 2; ++i)
        if constexpr (kFormat == WeightFormat::kInt8)
          pairs[i] = int8_pair<kType>(neighbours_.bytes(words[i]));
        else
          pairs[i] = int4_pair<kType>(
              neighbours_.nibbles(words[i]),
              Ring::kHasZeros ? minus_zero<kType>(zeros, row + i) : kMinusEight<kType>);
  }

  __device__ void unpack_step(uint8_t* slot, uint32_t step, uint32_t pair, uint32_t group,
                              uint32_t (&levels)[4][4]) const {
    uint32_t words[loads_per_step(kFormat)][4], zeros = 0;
    Ring::load_step(slot, pair, step, lane_, words);
    if constexpr (Ring::kHasZeros)
      zeros = Ring::load_zeros(slot + Ring::kGroups, pair, group, lane_);
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if constexpr (kFormat == WeightFormat::kInt8)
        unpack_int8<kType>({words[0][i], words[1][i]}, levels[i]);
      else if constexpr (kFormat == WeightFormat::kNf4)
        unpack_nf4<kType>(words[0][i], levels[i]);
      else
        unpack_int4<kType>(words[0][i],
                           Ring::kHasZeros ? minus_zero<kType>(zeros, i) : kMinusEight<kType>,
                           levels[i]);
    if constexpr (kScalesWeights) scale_levels(slot + Ring::kGroups, pair, group, levels);
  }

  __device__ void scale_levels(uint8_t* groups, uint32_t pair, uint32_t group,
                               uint32_t (&levels)[4][4]) const {
    float scales[4];
    Ring::load_scales(groups, pair, group, lane_, scales);
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) levels[i][j] = scale_pair<kType>(levels[i][j], scales[i]);
  }

  __device__ void x_of_step(uint8_t* x, uint32_t step, uint32_t tile, uint32_t (&pairs)[4]) const {
    const uint32_t row = tile_.row() + tile * kXTile + lane_ / 4, unit = step * 4 + lane_ % 4;
    uint32_t stored[4];
    load_16_bytes(x + x_place(Tile::kRows, row, unit) * 16, stored);
    permute_x(stored, pairs);
  }

  // The sums over a group, times its scales, go to the totals.
  __device__ void end_group(uint8_t* groups, uint32_t group) {
    float scales[4];
    Ring::load_scales(groups, tile_.pair(), group, lane_, scales);
#pragma unroll
    for (uint32_t index = 0; index < Tile::kCount; ++index)
#pragma unroll
      for (uint32_t e = 0; e < 4; ++e) {
        totals_[index][e] += scales[index % 2 * 2 + e / 2] * sums_[index][e];
        sums_[index][e] = 0.0f;
      }
  }

  const CudaQuantMatmul& call_;
  const uint32_t split_, thread_, warp_, lane_;
  const Tile tile_;
  const NeighboursOfLane neighbours_;
  const WeightCopies<kFormat> weights_;
  const uint16_t* x_;
  Sums sums_ = {};          // of a group, or of a row where there are no groups
  Sums totals_ = {};        // of groups, scaled
  uint32_t left_[2][2][4];  // operands of products that may run
};

template <WeightFormat kFormat, FloatType kType, uint32_t kXWarps, uint32_t kXTiles>
__global__ void __launch_bounds__(kThreads, (ProductTile<kXWarps, kXTiles>::kBlocks))
    quant_matmul_kernel(const __grid_constant__ CudaQuantMatmul call) {
  using Thread = QuantMatmulThread<kFormat, kType, kXWarps, kXTiles>;
  if constexpr (kHasWarpgroups || !ProductTile<kXWarps, kXTiles>::kWarpgroups)
    Thread(call, blockIdx.x, blockIdx.y, threadIdx.x).run();
}

}  // namespace llmos
