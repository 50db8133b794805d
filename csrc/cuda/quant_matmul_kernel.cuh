// The kernel of quant_matmul.h. Few rows of x make it a matter of reading the weight: 16-byte
// copies to shared memory run several stages ahead of the tensor cores, on every SM.
#pragma once

#include "cuda/epilogue.cuh"
#include "cuda/pipeline.cuh"
#include "cuda/quant_matmul.h"
#include "cuda/unpack.cuh"
#include "cuda/weight_stage.cuh"

namespace llmos {

// A stage of the ring in shared memory: the weight's parts, with x behind the weights.
template <WeightFormat kFormat, uint32_t kXTiles>
struct QuantMatmulRing : WeightStage<kFormat> {
  using Stage = WeightStage<kFormat>;
  static constexpr uint32_t kRows = kXTiles * kXTile;
  static constexpr uint32_t kX = kRows * kStage * 2;
  static constexpr uint32_t kGroups = Stage::kWeights + kX;  // where scales begin
  static constexpr uint32_t kBytes = kGroups + Stage::kScales + Stage::kZeros;
  // two blocks on an SM where their sums leave enough registers
  static constexpr uint32_t kBlocks = kXTiles <= 2 ? 2 : 1;
  static_assert(Stage::kDepth * kBytes <= 162 << 10, "an A100 has 163 KB for a block");
  static_assert(kBlocks * (Stage::kDepth * kBytes + 2048) <= 228 << 10, "an H200 has 228 KB");
};

// What one thread does for part `split` of the sums of tile `tile`.
template <WeightFormat kFormat, FloatType kType, uint32_t kXTiles>
class QuantMatmulThread {
  using Ring = QuantMatmulRing<kFormat, kXTiles>;
  static_assert(SumsOfThread<2 * kXTiles, float>::kSharedBytes <= Ring::kDepth * Ring::kBytes);
  using Sums = float[2 * kXTiles][4];  // of products of 16 rows: two for a pair and 8 rows of x

 public:
  __device__ QuantMatmulThread(const CudaQuantMatmul& call, uint32_t tile, uint32_t split,
                               uint32_t thread)
      : call_(call),
        tile_(tile),
        split_(split),
        thread_(thread),
        warp_(thread / 32),
        lane_(thread % 32),
        pair_(int64_t{tile} * kWarps + warp_),
        weights_(call, pair_, warp_, lane_, read_once_policy()),
        x_(call.x + x_row() * call.x_stride + x_unit() * 8) {}

  __device__ void run() {
    const uint32_t begin = first_stage(stages(call_.weight), split_, call_.splits);
    const uint32_t count = first_stage(stages(call_.weight), split_ + 1, call_.splits) - begin;
    run_pipeline<Ring::kDepth>(
        count, [&](uint32_t number) { copy(begin + number, slot(number)); },
        [&](uint32_t number) { multiply(slot(number)); });
    const SumsOfThread<2 * kXTiles, float> sums(call_, tile_, split_, thread_);
    if (sums.take(Ring::kGrouped ? totals_ : sums_,
                  [&](uint32_t i) { return x_row_at(i) < call_.m; }))
      finish(sums);
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

  // A thread copies the same 8 k of every 16th row.
  static constexpr uint32_t kXUnits = kStage / 8;
  __device__ uint32_t x_row() const { return thread_ / kXUnits; }
  __device__ uint32_t x_unit() const { return thread_ % kXUnits; }

  __device__ void copy_x(uint32_t stage, uint8_t* to) const {
    const uint32_t k = stage * kStage + x_unit() * 8;
#pragma unroll
    for (uint32_t i = 0; i < Ring::kRows; i += kThreads / kXUnits) {
      const uint32_t row = x_row() + i;
      if (row < Ring::kRows)
        copy_async(to + x_place(Ring::kRows, row, x_unit()) * 16,
                   x_ + i * call_.x_stride + int64_t{stage} * kStage,
                   row < call_.m && k < call_.weight.k);
    }
  }

  // ---- products ----

  __device__ void multiply(uint8_t* slot) {
#pragma unroll
    for (uint32_t step = 0; step < kStageSteps; ++step) {
      const uint32_t group = Ring::kGrouped ? group_of_step(weights_.groups_of_stage(), step) : 0;
      uint32_t levels[4][4];  // pairs of the lane's four rows
      unpack_step(slot, step, group, levels);
#pragma unroll
      for (uint32_t tile = 0; tile < kXTiles; ++tile) {
        uint32_t x[4];
        x_of_step(slot + Ring::kWeights, step, tile, x);
#pragma unroll
        for (int j = 0; j < 2; ++j)
#pragma unroll
          for (int r = 0; r < 2; ++r)
            multiply_tile<kType>(sums_[2 * tile + r],
                                 {levels[2 * r][2 * j], levels[2 * r + 1][2 * j],
                                  levels[2 * r][2 * j + 1], levels[2 * r + 1][2 * j + 1]},
                                 {x[2 * j], x[2 * j + 1]});
      }
      if constexpr (Ring::kGrouped)
        if (ends_group(weights_.groups_of_stage(), step)) end_group(slot + Ring::kGroups, group);
    }
  }

  __device__ void unpack_step(uint8_t* slot, uint32_t step, uint32_t group,
                              uint32_t (&levels)[4][4]) const {
    uint32_t words[loads_per_step(kFormat)][4], zeros = 0;
    Ring::load_step(slot, warp_, step, lane_, words);
    if constexpr (Ring::kHasZeros)
      zeros = Ring::load_zeros(slot + Ring::kGroups, warp_, group, lane_);
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
  }

  __device__ void x_of_step(uint8_t* x, uint32_t step, uint32_t tile, uint32_t (&pairs)[4]) const {
    const uint32_t row = tile * kXTile + lane_ / 4, unit = step * 4 + lane_ % 4;
    uint32_t stored[4];
    load_16_bytes(x + x_place(Ring::kRows, row, unit) * 16, stored);
    permute_x(stored, pairs);
  }

  // The sums over a group, times its scales, go to the totals.
  __device__ void end_group(uint8_t* groups, uint32_t group) {
    float scales[4];
    Ring::load_scales(groups, warp_, group, lane_, scales);
#pragma unroll
    for (uint32_t index = 0; index < 2 * kXTiles; ++index)
#pragma unroll
      for (uint32_t e = 0; e < 4; ++e) {
        totals_[index][e] += scales[index % 2 * 2 + e / 2] * sums_[index][e];
        sums_[index][e] = 0.0f;
      }
  }

  // Of four columns `index`.
  __device__ uint32_t x_row_at(uint32_t index) const {
    return index / 2 * kXTile + x_row_of(lane_, index % 2);
  }

  __device__ void finish(const SumsOfThread<2 * kXTiles, float>& sums) const {
    const Epilogue epilogue(call_, kType, pair_, lane_);
    float scales[4] = {1.0f, 1.0f, 1.0f, 1.0f};
    if constexpr (!Ring::kGrouped) epilogue.load_scales(scales);
#pragma unroll 1
    for (uint32_t index = 0; index < 2 * kXTiles; ++index) {
      float values[4] = {};
      if (x_row_at(index) < call_.m) sums.read(index, values);
#pragma unroll
      for (int i = 0; i < 4; ++i) values[i] *= scales[i];
      epilogue.finish(x_row_at(index), values);
    }
  }

  const CudaQuantMatmul& call_;
  const uint32_t tile_, split_, thread_, warp_, lane_;
  const int64_t pair_;
  const WeightCopies<kFormat> weights_;
  const uint16_t* x_;
  Sums sums_ = {};    // of a group, or of a row where there are no groups
  Sums totals_ = {};  // of groups, scaled
};

template <WeightFormat kFormat, FloatType kType, uint32_t kXTiles>
__global__ void __launch_bounds__(kThreads, (QuantMatmulRing<kFormat, kXTiles>::kBlocks))
    quant_matmul_kernel(const __grid_constant__ CudaQuantMatmul call) {
  QuantMatmulThread<kFormat, kType, kXTiles>(call, blockIdx.x, blockIdx.y, threadIdx.x).run();
}

}  // namespace llmos
