// A weight's part of a stage: where it lies in shared memory, and how it gets there.
#pragma once

#include "cuda/fragments.h"
#include "cuda/primitives.cuh"
#include "cuda/quant_product.h"

namespace llmos {

// Bytes of its parts.
template <WeightFormat kFormat>
struct WeightStage {
  static constexpr bool kGrouped = is_4bit(kFormat);
  static constexpr bool kHasZeros = kFormat == WeightFormat::kInt4Asym;
  static constexpr uint32_t kLoads = kStageSteps * loads_per_step(kFormat);
  // of the most groups that a stage has, those of 32
  static constexpr uint32_t kGroupEntries = kStageSteps * kPairRows;
  static constexpr uint32_t kWeights = kWarps * kLoads * 32 * 16;
  static constexpr uint32_t kScales = kGrouped ? kWarps * kGroupEntries * 2 : 0;
  static constexpr uint32_t kZeros = kHasZeros ? kWarps * kGroupEntries : 0;
  // 48 KB of weights ahead, or 64 KB where a stage has 32 KB of them
  static constexpr uint32_t kDepth = kGrouped ? 4 : 3;

  // The i-th 16 bytes that a lane has of pair `pair` of the tile. Where a step has two of them,
  // those of a lane lie in different banks: load_unit reads some of each.
  __device__ static uint32_t place(uint32_t pair, uint32_t i, uint32_t lane) {
    return ((pair * kLoads + i) * 32 + (lane ^ i % loads_per_step(kFormat) * 2)) * 16;
  }

  // The entry of a group and panel of pair `pair`: 16 scales, and zero points where there are any.
  __device__ static uint32_t group_place(uint32_t pair, uint32_t group, uint32_t panel) {
    return pair * kGroupEntries + scale_place(group, panel);
  }

  // A lane's words of a step: words[load][i] of its i-th row.
  __device__ static void load_step(uint8_t* weights, uint32_t pair, uint32_t step, uint32_t lane,
                                   uint32_t (&words)[loads_per_step(kFormat)][4]) {
#pragma unroll
    for (uint32_t load = 0; load < loads_per_step(kFormat); ++load)
      load_16_bytes(weights + place(pair, step * loads_per_step(kFormat) + load, lane),
                    words[load]);
  }

  // The word with k = 2 t and 2 t + 1 (t = lane % 4) of the step's unit `unit`, 8 k, for each of
  // the lane's four rows.
  __device__ static void load_unit(uint8_t* weights, uint32_t pair, uint32_t step, uint32_t unit,
                                   uint32_t lane, uint32_t (&words)[4]) {
    constexpr uint32_t kUnitWords = loads_per_step(kFormat);
    const uint32_t word = lane % 4 * kUnitWords / 4;
    load_16_bytes(weights + place(pair, step * kUnitWords + word, lane / 4 * 4 + unit), words);
  }

  // Of a group, for a lane's four rows.
  __device__ static void load_scales(uint8_t* groups, uint32_t pair, uint32_t group, uint32_t lane,
                                     float (&scales)[4]) {
    uint32_t pairs[2];
    load_8_bytes(groups + (group_place(pair, group, 0) + row_of(lane, 0)) * 2, pairs);
#pragma unroll
    for (int i = 0; i < 4; ++i)
      scales[i] = widen<FloatType::kBf16>(static_cast<uint16_t>(pairs[i / 2] >> (i % 2 * 16)));
  }

  // A byte for each of the four rows.
  __device__ static uint32_t load_zeros(uint8_t* groups, uint32_t pair, uint32_t group,
                                        uint32_t lane) {
    return load_4_bytes(groups + kScales + group_place(pair, group, 0) + row_of(lane, 0));
  }
};

// What a lane of warp `warp` copies: of pair `pair`, the warp-th one of the tile.
template <WeightFormat kFormat>
class WeightCopies {
  using Stage = WeightStage<kFormat>;

 public:
  __device__ WeightCopies(const QuantProduct& call, int64_t pair, uint32_t warp, uint32_t lane,
                          uint64_t policy)
      : call_(call), warp_(warp), lane_(lane), policy_(policy) {
    words_ = words_of_lane(call.weight, pair, lane);
    weights_ = call.packed + first_word(call.weight, pair, lane);
    if constexpr (Stage::kGrouped) {
      const int64_t panel = 2 * pair + group_panel();
      const auto all = static_cast<uint32_t>(llmos::groups(call.weight));
      groups_in_stage_ = groups_in_stage(call.weight);
      groups_ = panel < panels(call.weight) ? all : 0;
      first_group_ = (panel * all + group_number()) * kPanel;
    }
  }

  __device__ void copy_weights(uint32_t stage, uint8_t* to) const {
    constexpr uint32_t kStageWords = word_of(kFormat, kStageSteps, 0);
    const uint8_t* from = weights_ + int64_t{stage} * (kStageWords * kWordBytes);
#pragma unroll
    for (uint32_t i = 0; i < Stage::kLoads; ++i) {
      constexpr uint32_t kLoads = loads_per_step(kFormat);
      const uint32_t word = word_of(kFormat, i / kLoads, i % kLoads);
      copy_async(to + Stage::place(warp_, i, lane_), from + word * kWordBytes,
                 stage * kStageWords + word < words_, policy_);
    }
  }

  __device__ uint32_t groups_of_stage() const { return groups_in_stage_; }

  // Scales, and zero points behind them, of the pair for all groups of the stage.
  __device__ void copy_groups(uint32_t stage, uint8_t* to) const {
    if (group_number() >= groups_in_stage_) return;
    const uint32_t group = stage * groups_in_stage_;
    const bool exists = group + group_number() < groups_;
    const int64_t from = first_group_ + int64_t{group} * kPanel;
    const uint32_t place = Stage::group_place(warp_, group_number(), group_panel());
    copy_async(to + (place + group_half() * 8) * 2,
               static_cast<const uint16_t*>(call_.scales) + from + group_half() * 8, exists);
    if (Stage::kHasZeros && group_half() == 0)
      copy_async(to + Stage::kScales + place, call_.zeros + from, exists);
  }

 private:
  // A lane copies 8 scales of one panel and group of a stage.
  __device__ uint32_t group_number() const { return lane_ / 4; }
  __device__ uint32_t group_panel() const { return lane_ / 2 % 2; }
  __device__ uint32_t group_half() const { return lane_ % 2; }

  const QuantProduct& call_;
  const uint32_t warp_, lane_;
  const uint64_t policy_;
  const uint8_t* weights_;
  uint32_t words_;  // of the lane
  uint32_t groups_in_stage_, groups_;
  int64_t first_group_;
};

}  // namespace llmos
