// Which thread of a quant_matmul kernel holds which element.
//
// A block of 8 warps computes 256 columns of the result (rows of the weight), each warp 32 of them,
// a pair of panels, or several pairs (product_tile.cuh). It walks along k in stages of 128, each 4
// steps of 32. Tensor cores multiply the weight from the left: a product's 16 rows are weight rows,
// its 8 columns are rows of x.
//
// Panels are read as they are stored. 16 bytes are one word of four neighbouring rows, and they are
// what a lane loads: lanes 0-15 read the first panel of the pair and 16-31 the second, lanes
// 4q .. 4q + 3 rows 4q .. 4q + 3 of it, one word each. A step is one such load for 4-bit weights
// and two for 8-bit ones; either way the lane then has k = 8 t + i (i = 0..7, t = lane % 4) of its
// four rows, and of x it needs the same 8 k, which lie side by side. Sums over k do not care about
// its order, so k is assigned to a fragment's places as unpack.cuh finds it.
#pragma once

#include <cstdint>

#include "quant_formats.h"

namespace llmos {

constexpr uint32_t kWarps = 8;
constexpr uint32_t kThreads = 32 * kWarps;
constexpr uint32_t kPairRows = 2 * kPanel;
constexpr uint32_t kTileRows = kWarps * kPairRows;
constexpr uint32_t kStep = 32;  // k
constexpr uint32_t kStageSteps = 4;
constexpr uint32_t kStage = kStep * kStageSteps;  // k; a multiple of every group size
constexpr uint32_t kXTile = 8;                    // rows of x in a product of the tensor cores
constexpr uint32_t kWordBytes = 4 * kPanel;

LLMOS_HOST_DEVICE constexpr uint32_t loads_per_step(WeightFormat format) {
  return is_4bit(format) ? 1 : 2;
}

LLMOS_HOST_DEVICE inline int64_t panels(const WeightShape& s) {
  return (s.n + kPanel - 1) / kPanel;
}

LLMOS_HOST_DEVICE inline uint32_t stages(const WeightShape& s) {
  return static_cast<uint32_t>((s.k + kStage - 1) / kStage);
}

// Groups of 4-bit weights.
LLMOS_HOST_DEVICE inline uint32_t groups_in_stage(const WeightShape& s) {
  return kStage / static_cast<uint32_t>(s.group_size);
}
LLMOS_HOST_DEVICE constexpr uint32_t group_of_step(uint32_t groups_in_stage, uint32_t step) {
  return step * groups_in_stage / kStageSteps;
}
LLMOS_HOST_DEVICE constexpr bool ends_group(uint32_t groups_in_stage, uint32_t step) {
  return (step + 1) * groups_in_stage % kStageSteps == 0;
}

LLMOS_HOST_DEVICE inline uint32_t tiles_of_columns(const WeightShape& s) {
  return static_cast<uint32_t>((s.n + kTileRows - 1) / kTileRows);
}

LLMOS_HOST_DEVICE inline uint32_t tiles_of_rows(int64_t m, uint32_t rows) {
  return static_cast<uint32_t>((m + rows - 1) / rows);
}

// Of m rows of x, `rows` of them in a tile.
LLMOS_HOST_DEVICE inline uint32_t tiles_of_product(const WeightShape& s, int64_t m, uint32_t rows) {
  return tiles_of_columns(s) * tiles_of_rows(m, rows);
}

// Where the 16 bytes of a lane's first load begin in the packed weight. Those of word_of(..) begin
// that many words of kWordBytes later, where the lane has so many.
LLMOS_HOST_DEVICE inline int64_t first_word(const WeightShape& s, int64_t pair, uint32_t lane) {
  const int64_t panel = 2 * pair + lane / 16;
  const int64_t word = lane % 4 * loads_per_step(s.format);
  return (panel * words(s) + word) * kWordBytes + lane / 4 % 4 * 16;
}

LLMOS_HOST_DEVICE constexpr uint32_t word_of(WeightFormat format, uint32_t step, uint32_t load) {
  return step * 4 * loads_per_step(format) + load;
}

// Words from a lane's first one to the end of the row; 0 in a panel that does not exist.
LLMOS_HOST_DEVICE inline uint32_t words_of_lane(const WeightShape& s, int64_t pair, uint32_t lane) {
  const int64_t before = lane % 4 * loads_per_step(s.format);
  const bool exists = 2 * pair + lane / 16 < panels(s) && before < words(s);
  return exists ? static_cast<uint32_t>(words(s) - before) : 0;
}

// The weight row, relative to the pair's first, of a lane's i-th row (0..3), which is row
// `lane / 4 + 8 * (i % 2)` of product i / 2.
LLMOS_HOST_DEVICE constexpr uint32_t row_of(uint32_t lane, uint32_t i) {
  return lane / 16 * kPanel + lane / 4 % 4 * 4 + i;
}

// The row of x, relative to its tile of 8, of element i (0..3) of a lane's sums.
LLMOS_HOST_DEVICE constexpr uint32_t x_row_of(uint32_t lane, uint32_t i) {
  return lane % 4 * 2 + i % 2;
}

// Where a row of kBytes holds its 16-byte piece `piece`: swapped so that one piece of 8 rows
// touches every bank of shared memory once. They are the swizzles of 32 and 64 bytes that Hopper's
// tensor cores know (warpgroup.cuh).
template <uint32_t kBytes>
LLMOS_HOST_DEVICE constexpr uint32_t swizzled(uint32_t row, uint32_t piece) {
  static_assert(kBytes == 32 || kBytes == 64, "other rows have other banks");
  return kBytes == 32 ? piece ^ row / 4 % 2 : piece ^ row / 2 % 4;
}

// Place of x in a stage, in units of 8 k (16 bytes), for `rows` rows: a step's 32 k of all rows lie
// together, so that 8 lanes, which read 2 rows of it, touch every bank of shared memory once.
LLMOS_HOST_DEVICE constexpr uint32_t x_place(uint32_t rows, uint32_t row, uint32_t unit) {
  return (unit / 4 * rows + row) * 4 + swizzled<64>(row, unit % 4);
}

// Rows of x that are rounded to int8 lie in steps, [step][row][32 of k], zeros after the last k. A
// lane multiplies the 8 k of its own, as above, in two words; it has the first in one piece of the
// row and the second in the other, where a fragment's halves of k are.
LLMOS_HOST_DEVICE inline int64_t steps(const WeightShape& s) { return (s.k + kStep - 1) / kStep; }

LLMOS_HOST_DEVICE inline int64_t rounded_place(int64_t m, int64_t row, int64_t step) {
  return (step * m + row) * kStep;
}

// Where word `word` (0..7), four k, begins in a row of a step.
LLMOS_HOST_DEVICE constexpr uint32_t rounded_word(uint32_t row, uint32_t word) {
  return swizzled<kStep>(row, word % 2) * 16 + word / 2 * 4;
}

// Their scales lie in [group][row]: rows from one group to the next, whose beginnings are aligned.
LLMOS_HOST_DEVICE inline int64_t rounded_scales(int64_t m) { return (m + 3) / 4 * 4; }

// Place of a group's 16 scales, or zero points, of one panel of a pair in a warp's part of a stage.
LLMOS_HOST_DEVICE constexpr uint32_t scale_place(uint32_t group_in_stage, uint32_t panel) {
  return (group_in_stage * 2 + panel) * kPanel;
}

// Place of a thread's four sums `index` of `count` among the partial results of a launch, in units
// of 16 bytes. Threads that hold the same rows of x are neighbours: few rows use whole sectors.
LLMOS_HOST_DEVICE inline int64_t partial_place(int64_t tile, uint32_t splits, uint32_t split,
                                               uint32_t count, uint32_t index, uint32_t thread) {
  const uint32_t lane = thread % 32;
  const uint32_t neighbours = thread / 32 * 32 + lane % 4 * 8 + lane / 4;
  return ((tile * splits + split) * count + index) * kThreads + neighbours;
}

// Of part `split`, whose stages end where those of the next part begin.
LLMOS_HOST_DEVICE inline uint32_t first_stage(uint32_t stages, uint32_t split, uint32_t splits) {
  const uint32_t longer = stages % splits;  // parts that have one stage more
  return split * (stages / splits) + (split < longer ? split : longer);
}

}  // namespace llmos
