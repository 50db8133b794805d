// The kernels of one format, for its .cu file.
#pragma once

#include "cuda/quant_matmul_kernel.cuh"
#include "cuda/quant_matmul_kernels.h"

namespace llmos {

template <WeightFormat kFormat, FloatType kType, uint32_t kXWarps, uint32_t kXTiles>
QuantMatmulKernel instance() {
  using Tile = ProductTile<kXWarps, kXTiles>;
  using Ring = QuantMatmulRing<kFormat, Tile>;
  return {quant_matmul_kernel<kFormat, kType, kXWarps, kXTiles>, Ring::kDepth * Ring::kBytes,
          Tile::kRows};
}

// Tiles of 128 rows by which most multiprocessors are busy. Fewer of them would cut k into many
// parts, which one block adds up; tiles of 64 rows are more. A guess until it is measured.
constexpr uint32_t kManyTiles = 64;

template <WeightFormat kFormat, FloatType kType>
QuantMatmulKernel instance_for(const WeightShape& weight, int64_t m, bool warpgroups) {
  if (m <= 8) return instance<kFormat, kType, 1, 1>();
  if (m <= 16) return instance<kFormat, kType, 1, 2>();
  if (m <= 32) return instance<kFormat, kType, 1, 4>();
  if (m > 64 && tiles_of_product(weight, m, 128) >= kManyTiles)
    return warpgroups ? instance<kFormat, kType, 1, 16>() : instance<kFormat, kType, 2, 8>();
  return instance<kFormat, kType, 1, 8>();
}

template <WeightFormat kFormat>
QuantMatmulKernel instance_for(const WeightShape& weight, FloatType type, int64_t m,
                               bool warpgroups) {
  return type == FloatType::kBf16 ? instance_for<kFormat, FloatType::kBf16>(weight, m, warpgroups)
                                  : instance_for<kFormat, FloatType::kFp16>(weight, m, warpgroups);
}

}  // namespace llmos
