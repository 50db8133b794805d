// The tile of the result that a block computes, and which part of it is a thread's. Tiles with many
// rows of x give each warp several pairs of panels, and x to several rows of warps.
#pragma once

#include "cuda/epilogue.cuh"

namespace llmos {

// kXWarps rows of warps, each with kXTiles times 8 rows of x.
template <uint32_t kXWarps, uint32_t kXTiles>
class ProductTile {
 public:
  static constexpr uint32_t kRows = kXWarps * kXTiles * kXTile;  // of x
  static constexpr uint32_t kPairs = kXWarps;                    // of panels, in a warp
  // products of 16 rows in a warp: two for a pair and 8 rows of x
  static constexpr uint32_t kCount = kPairs * kXTiles * 2;
  // multiplied by warpgroups, which read x from shared memory: the warps' products r = 0 and 1 are
  // two products of each warpgroup
  static constexpr bool kWarpgroups = kXTiles == 16;
  // two blocks on an SM where their sums leave enough registers
  static constexpr uint32_t kBlocks = kXWarps * kXTiles <= 2 ? 2 : 1;

  // Tiles of the same columns are neighbours.
  __device__ ProductTile(const QuantProduct& call, uint32_t number, uint32_t thread)
      : call_(call),
        number_(number),
        thread_(thread),
        warp_(thread / 32),
        lane_(thread % 32),
        row_tiles_(tiles_of_rows(call.m, kRows)),
        first_row_(int64_t{number % row_tiles_} * kRows),
        first_pair_(int64_t{number / row_tiles_} * kWarps) {}

  // Of x, and of panels.
  __device__ int64_t first_row() const { return first_row_; }
  __device__ int64_t first_pair() const { return first_pair_; }

  __device__ uint64_t weight_policy() const {
    return row_tiles_ == 1 ? read_once_policy() : read_again_policy();
  }

  // The warp's first pair of the tile, and its first row of x there.
  __device__ uint32_t pair() const { return warp_ % (kWarps / kXWarps) * kPairs; }
  __device__ uint32_t row() const { return warp_ / (kWarps / kXWarps) * kXTiles * kXTile; }

  // The first of two products of the warp's pair `pair` and its 8 rows of x `tile`.
  __device__ static constexpr uint32_t product_of(uint32_t pair, uint32_t tile) {
    return (pair * kXTiles + tile) * 2;
  }

  // From the thread's sums over part `split` of k to results of `type`. Row x_row of x is scaled by
  // x_scale(x_row); those of the weight, where kScalesRows, by the scale of each.
  template <bool kScalesRows, typename T, typename XScale>
  __device__ void finish(uint32_t split, FloatType type, const T (&of_part)[kCount][4],
                         XScale x_scale) const {
    const SumsOfThread<kCount, T> sums(call_, number_, split, thread_);
    if (!sums.take(of_part, [&](uint32_t index) { return x_row_at(index) < call_.m; })) return;
#pragma unroll 1
    for (uint32_t p = 0; p < kPairs; ++p) {
      const Epilogue epilogue(call_, type, first_pair_ + pair() + p, lane_);
      float scales[4] = {1.0f, 1.0f, 1.0f, 1.0f};
      if constexpr (kScalesRows) epilogue.load_scales(scales);
#pragma unroll 1
      for (uint32_t index = product_of(p, 0); index < product_of(p + 1, 0); ++index) {
        const int64_t x_row = x_row_at(index);
        float scale = 1.0f, values[4];
        T four[4] = {};
        if (x_row < call_.m) {
          sums.read(index, four);
          scale = x_scale(x_row);
        }
#pragma unroll
        for (uint32_t i = 0; i < 4; ++i)
          values[i] = static_cast<float>(four[i]) * (scales[i] * scale);
        epilogue.finish(x_row, values);
      }
    }
  }

 private:
  // Of four columns `index`.
  __device__ int64_t x_row_at(uint32_t index) const {
    return first_row_ + row() + index / 2 % kXTiles * kXTile + x_row_of(lane_, index % 2);
  }

  const QuantProduct& call_;
  const uint32_t number_, thread_, warp_, lane_, row_tiles_;
  const int64_t first_row_, first_pair_;
};

}  // namespace llmos
