// The kernel of quant_matmul.h. Few rows of x make it a matter of reading the weight: 16-byte
// copies to shared memory run several stages ahead of the tensor cores, on every SM.
#pragma once

#include "cuda/activation.cuh"
#include "cuda/fragments.h"
#include "cuda/primitives.cuh"
#include "cuda/quant_matmul.h"
#include "cuda/unpack.cuh"

namespace llmos {

// A stage of the ring in shared memory: bytes of its parts, which lie in this order.
template <WeightFormat kFormat, uint32_t kXTiles>
struct QuantMatmulRing {
  static constexpr bool kGrouped = is_4bit(kFormat);
  static constexpr bool kHasZeros = kFormat == WeightFormat::kInt4Asym;
  static constexpr uint32_t kLoads = kStageSteps * loads_per_step(kFormat);
  static constexpr uint32_t kRows = kXTiles * kXTile;
  // of the most groups that a stage has, those of 32
  static constexpr uint32_t kGroupEntries = kStageSteps * kPairRows;
  static constexpr uint32_t kWeights = kWarps * kLoads * 32 * 16;
  static constexpr uint32_t kX = kRows * kStage * 2;
  static constexpr uint32_t kScales = kGrouped ? kWarps * kGroupEntries * 2 : 0;
  static constexpr uint32_t kZeros = kHasZeros ? kWarps * kGroupEntries : 0;
  static constexpr uint32_t kBytes = kWeights + kX + kScales + kZeros;
  // 48 KB of weights ahead, or 64 KB where a stage has 32 KB of them
  static constexpr uint32_t kDepth = kGrouped ? 4 : 3;
  // two blocks on an SM where their sums leave enough registers
  static constexpr uint32_t kBlocks = kXTiles <= 2 ? 2 : 1;
  static_assert(kDepth * kBytes <= 162 << 10, "an A100 has 163 KB for a block");
  static_assert(kBlocks * (kDepth * kBytes + 2048) <= 228 << 10, "an H200 has 228 KB");
};

// What one thread does for part `split` of the sums of tile `tile`.
template <WeightFormat kFormat, FloatType kType, uint32_t kXTiles>
class QuantMatmulThread {
  using Ring = QuantMatmulRing<kFormat, kXTiles>;
  using Sums = float[kXTiles][2][4];  // of products of 16 rows: two for a pair and 8 rows of x

 public:
  __device__ QuantMatmulThread(const CudaQuantMatmul& call, uint32_t tile, uint32_t split,
                               uint32_t thread)
      : call_(call),
        tile_(tile),
        split_(split),
        thread_(thread),
        warp_(thread / 32),
        lane_(thread % 32),
        pair_(int64_t{tile} * kWarps + thread / 32) {}

  __device__ void run() {
    const uint32_t begin = first_stage(stages(call_.weight), split_, call_.splits);
    const uint32_t count = first_stage(stages(call_.weight), split_ + 1, call_.splits) - begin;
    prepare_copies();
    const auto copy_number = [&](uint32_t number) {
      if (number < count) copy(begin + number, slot(number));
      commit_copies();  // an empty group beyond the last one
    };
    for (uint32_t number = 0; number < Ring::kDepth - 1; ++number) copy_number(number);
    for (uint32_t number = 0; number < count; ++number) {
      wait_for_copies<Ring::kDepth - 2>();
      // all threads' copies have landed, and nobody reads the slot that is filled next any more
      synchronize_block();
      copy_number(number + Ring::kDepth - 1);
      multiply(slot(number));
    }
    if (call_.splits == 1 || add_up_parts()) finish();
  }

 private:
  // ---- global to shared memory ----

  // Where the thread's copies begin, at the first stage of k.
  __device__ void prepare_copies() {
    policy_ = read_once_policy();
    words_ = words_of_lane(call_.weight, pair_, lane_);
    weights_ = call_.packed + first_word(call_.weight, pair_, lane_);
    x_ = call_.x + x_row() * call_.x_stride + x_unit() * 8;
    if constexpr (Ring::kGrouped) {
      groups_in_stage_ = kStage / static_cast<uint32_t>(call_.weight.group_size);
      const int64_t panel = 2 * pair_ + group_panel();
      const auto all = static_cast<uint32_t>(groups(call_.weight));
      groups_ = panel < panels(call_.weight) ? all : 0;
      first_group_ = (panel * all + group_number()) * kPanel;
    }
  }

  __device__ uint8_t* slot(uint32_t number) const {
    return shared_memory() + number % Ring::kDepth * Ring::kBytes;
  }

  __device__ void copy(uint32_t stage, uint8_t* slot) const {
    copy_weights(stage, slot);
    copy_x(stage, slot + Ring::kWeights);
    if constexpr (Ring::kGrouped) copy_groups(stage, slot + Ring::kWeights + Ring::kX);
  }

  __device__ void copy_weights(uint32_t stage, uint8_t* to) const {
    constexpr uint32_t kStageWords = word_of(kFormat, kStageSteps, 0);
    const uint8_t* from = weights_ + int64_t{stage} * (kStageWords * kWordBytes);
#pragma unroll
    for (uint32_t i = 0; i < Ring::kLoads; ++i) {
      constexpr uint32_t kLoads = loads_per_step(kFormat);
      const uint32_t word = word_of(kFormat, i / kLoads, i % kLoads);
      copy_async(weights_of_lane(to, i), from + word * kWordBytes,
                 stage * kStageWords + word < words_, policy_);
    }
  }

  // Where the lane keeps its i-th 16 bytes of a stage: it reads what it has copied itself.
  __device__ uint8_t* weights_of_lane(uint8_t* weights, uint32_t i) const {
    return weights + ((warp_ * Ring::kLoads + i) * 32 + lane_) * 16;
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

  // A lane copies 8 scales of one panel and group of a stage.
  __device__ uint32_t group_number() const { return lane_ / 4; }
  __device__ uint32_t group_panel() const { return lane_ / 2 % 2; }
  __device__ uint32_t group_half() const { return lane_ % 2; }

  // Scales, and zero points, of the warp's pair for all groups of the stage.
  __device__ void copy_groups(uint32_t stage, uint8_t* to) const {
    if (group_number() >= groups_in_stage_) return;
    const uint32_t group = stage * groups_in_stage_;
    const bool exists = group + group_number() < groups_;
    const int64_t from = first_group_ + int64_t{group} * kPanel;
    const uint32_t place = group_place(group_number(), group_panel());
    copy_async(to + (place + group_half() * 8) * 2,
               static_cast<const uint16_t*>(call_.scales) + from + group_half() * 8, exists);
    if (Ring::kHasZeros && group_half() == 0)
      copy_async(to + Ring::kScales + place, call_.zeros + from, exists);
  }

  __device__ uint32_t group_place(uint32_t group, uint32_t panel) const {
    return warp_ * Ring::kGroupEntries + scale_place(group, panel);
  }

  // ---- products ----

  __device__ void multiply(uint8_t* slot) {
#pragma unroll
    for (uint32_t step = 0; step < kStageSteps; ++step) {
      const uint32_t group = Ring::kGrouped ? step * groups_in_stage_ / kStageSteps : 0;
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
            multiply_tile<kType>(sums_[tile][r],
                                 {levels[2 * r][2 * j], levels[2 * r + 1][2 * j],
                                  levels[2 * r][2 * j + 1], levels[2 * r + 1][2 * j + 1]},
                                 {x[2 * j], x[2 * j + 1]});
      }
      if constexpr (Ring::kGrouped)
        if ((step + 1) * groups_in_stage_ % kStageSteps == 0)
          end_group(slot + Ring::kWeights + Ring::kX, group);
    }
  }

  __device__ void unpack_step(uint8_t* slot, uint32_t step, uint32_t group,
                              uint32_t (&levels)[4][4]) const {
    constexpr uint32_t kLoads = loads_per_step(kFormat);
    uint32_t words[kLoads][4];
#pragma unroll
    for (uint32_t load = 0; load < kLoads; ++load)
      load_16_bytes(weights_of_lane(slot, step * kLoads + load), words[load]);
    uint32_t zeros = 0;
    if constexpr (Ring::kHasZeros)
      zeros = load_4_bytes(slot + Ring::kWeights + Ring::kX + Ring::kScales +
                           group_place(group, 0) + row_of(lane_, 0));
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
  __device__ void end_group(uint8_t* scales, uint32_t group) {
    uint32_t pairs[2];
    load_8_bytes(scales + (group_place(group, 0) + row_of(lane_, 0)) * 2, pairs);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const auto bits = static_cast<uint16_t>(pairs[i / 2] >> (i % 2 * 16));
      const float scale = widen<FloatType::kBf16>(bits);
#pragma unroll
      for (uint32_t tile = 0; tile < kXTiles; ++tile)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float& sum = sums_[tile][i / 2][i % 2 * 2 + e];
          totals_[tile][i / 2][i % 2 * 2 + e] += scale * sum;
          sum = 0.0f;
        }
    }
  }

  // Where the sums of all k end up.
  __device__ Sums& results() { return Ring::kGrouped ? totals_ : sums_; }

  // ---- results ----

  // Hands this part's sums in; in the last block to do so, they become those of all parts.
  __device__ bool add_up_parts() {
    Sums& results = this->results();
    const auto place = [&](uint32_t split, uint32_t index) {
      return reinterpret_cast<float4*>(call_.partials) +
             partial_place(tile_, call_.splits, split, 2 * kXTiles, index, thread_);
    };
    const auto needed = [&](uint32_t tile) { return tile * kXTile + x_row_of(lane_, 0) < call_.m; };
#pragma unroll
    for (uint32_t tile = 0; tile < kXTiles; ++tile)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float* four = results[tile][r];
        if (needed(tile)) *place(split_, 2 * tile + r) = {four[0], four[1], four[2], four[3]};
      }
    if (arrive(call_.counters + tile_) != call_.splits - 1) return false;
    if (thread_ == 0) call_.counters[tile_] = 0;
#pragma unroll
    for (uint32_t tile = 0; tile < kXTiles; ++tile)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        float (&four)[4] = results[tile][r];
        four[0] = four[1] = four[2] = four[3] = 0.0f;
        if (needed(tile))
          for (uint32_t split = 0; split < call_.splits; ++split) {
            const float4 part = load_shared_by_blocks(place(split, 2 * tile + r));
            four[0] += part.x, four[1] += part.y, four[2] += part.z, four[3] += part.w;
          }
      }
    return true;
  }

  // Scales of rows, bias, activation, gate and residual. A lane has four neighbouring columns.
  __device__ void finish() {
    Sums& results = this->results();
    const int64_t row = pair_ * kPairRows + row_of(lane_, 0);
    float scales[4], biases[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const bool exists = row + i < call_.weight.n;
      scales[i] = 1.0f;
      if (!Ring::kGrouped && exists) scales[i] = static_cast<const float*>(call_.scales)[row + i];
      biases[i] = exists && call_.bias != nullptr ? bias(row + i) : 0.0f;
    }
#pragma unroll
    for (uint32_t tile = 0; tile < kXTiles; ++tile)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float values[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          float value = results[tile][i / 2][i % 2 * 2 + e] * scales[i] + biases[i];
          // the partner of a gate's panel lies in the other half of the warp
          const float partner = call_.gated ? exchange(value, 16) : 1.0f;
          if (call_.activates) value = activate(call_.activation, value);
          values[i] = value * partner;
        }
        const uint32_t x_row = tile * kXTile + x_row_of(lane_, e);
        if (x_row < call_.m) store(x_row, row, values);
      }
  }

  __device__ float bias(int64_t row) const {
    return call_.bias_is_fp32 ? static_cast<const float*>(call_.bias)[row]
                              : widen<kType>(static_cast<const uint16_t*>(call_.bias)[row]);
  }

  __device__ void store(uint32_t x_row, int64_t row, const float (&values)[4]) const {
    if (call_.gated && lane_ >= 16) return;
    const int64_t columns = call_.gated ? call_.weight.n / 2 : call_.weight.n;
    const int64_t column = call_.gated ? pair_ * kPanel + row_of(lane_, 0) : row;
    const int64_t at = x_row * columns + column;
    uint16_t bits[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const bool adds = call_.residual != nullptr && column + i < columns;
      bits[i] = narrow<kType>(adds ? values[i] + widen<kType>(call_.residual[at + i]) : values[i]);
    }
    if (columns % 4 == 0) {
      if (column < columns) store_8_bytes(call_.out + at, bits);
      return;
    }
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (column + i < columns) call_.out[at + i] = bits[i];
  }

  const CudaQuantMatmul& call_;
  const uint32_t tile_, split_, thread_, warp_, lane_;
  const int64_t pair_;
  uint64_t policy_;
  const uint8_t* weights_;
  uint32_t words_;  // of the lane
  const uint16_t* x_;
  uint32_t groups_in_stage_, groups_;
  int64_t first_group_;
  Sums sums_ = {};    // of a group, or of a row where there are no groups
  Sums totals_ = {};  // of groups, scaled
};

template <WeightFormat kFormat, FloatType kType, uint32_t kXTiles>
__global__ void __launch_bounds__(kThreads, (QuantMatmulRing<kFormat, kXTiles>::kBlocks))
    quant_matmul_kernel(const __grid_constant__ CudaQuantMatmul call) {
  QuantMatmulThread<kFormat, kType, kXTiles>(call, blockIdx.x, blockIdx.y, threadIdx.x).run();
}

}  // namespace llmos
