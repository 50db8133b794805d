// What follows the sums of a product: those of other parts of k, bias, activation, gate, residual.
#pragma once

#include "cuda/activation.cuh"
#include "cuda/fragments.h"
#include "cuda/primitives.cuh"
#include "cuda/quant_product.h"
#include "cuda/values.cuh"

namespace llmos {

// A thread's sums on the way from registers to the epilogue, which takes four neighbouring columns
// of a row at a time: through shared memory, or through global memory where k is in parts. From
// registers its loop would have to be unrolled: 14,000 instructions for 128 rows, each used once.
//
// sums: kCount / 2 pairs of products of 16 rows by 8 rows of x, as tensor cores leave them. Four
// columns `index` are those of pair index / 2 and its row x_row_of(lane, index % 2).
template <uint32_t kCount, typename T>
class SumsOfThread {
 public:
  static constexpr uint32_t kSharedBytes = kCount * kThreads * 16;

  __device__ SumsOfThread(const QuantProduct& call, uint32_t tile, uint32_t split, uint32_t thread)
      : call_(call), tile_(tile), split_(split), thread_(thread) {}

  // After the last stage; takes what is `needed(index)`. Whether this block is to finish the tile.
  template <typename Needed>
  __device__ bool take(const T (&sums)[kCount][4], Needed needed) const {
    const auto store = [&](auto place) {
#pragma unroll
      for (uint32_t index = 0; index < kCount; ++index) {
        const uint32_t first = index / 2 * 2, e = index % 2;
        if (needed(index))
          store_16_bytes<T>(place(index), {sums[first][e], sums[first][e + 2], sums[first + 1][e],
                                           sums[first + 1][e + 2]});
      }
    };
    if (call_.splits == 1) {
      synchronize_block();  // nobody reads the ring any more
      store([&](uint32_t index) { return here(index); });
      return true;
    }
    store([&](uint32_t index) { return part(split_, index); });
    if (arrive(call_.counters + tile_) != call_.splits - 1) return false;
    if (thread_ == 0) call_.counters[tile_] = 0;
    return true;
  }

  // Those of all parts, added up in order; `index` is a needed one.
  __device__ void read(uint32_t index, T (&four)[4]) const {
    if (call_.splits == 1) {
      load_16_bytes(here(index), four);
      return;
    }
    four[0] = four[1] = four[2] = four[3] = 0;
    for (uint32_t split = 0; split < call_.splits; ++split) {
      T others[4];
      load_shared_by_blocks(part(split, index), others);
      four[0] += others[0], four[1] += others[1], four[2] += others[2], four[3] += others[3];
    }
  }

 private:
  __device__ uint8_t* here(uint32_t index) const {
    return shared_memory() + (index * kThreads + thread_) * 16;
  }
  __device__ uint8_t* part(uint32_t split, uint32_t index) const {
    return static_cast<uint8_t*>(call_.partials) +
           partial_place(tile_, call_.splits, split, kCount, index, thread_) * 16;
  }

  const QuantProduct& call_;
  const uint32_t tile_, split_, thread_;
};

// The element-wise end of a product, in a lane that holds four neighbouring columns of its rows:
// rows row_of(lane, 0..3) of the weight's pair `pair`. `type`: of the result.
class Epilogue {
 public:
  __device__ Epilogue(const QuantProduct& call, FloatType type, int64_t pair, uint32_t lane)
      : call_(call),
        type_(type),
        row_(pair * kPairRows + row_of(lane, 0)),
        columns_(call.gated ? call.weight.n / 2 : call.weight.n),
        column_(call.gated ? pair * kPanel + row_of(lane, 0) : row_),
        stores_(!call.gated || lane < 16) {
    const FloatType bias_type = call.bias_is_fp32 ? FloatType::kFp32 : type;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const bool has_bias = row_ + i < call.weight.n && call.bias != nullptr;
      biases_[i] = has_bias ? load_value(bias_type, call.bias, row_ + i) : 0.0f;
    }
  }

  // For whole rows of the weight that have one scale each; 0 beyond the last row.
  __device__ void load_scales(float (&scales)[4]) const {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      scales[i] =
          row_ + i < call_.weight.n ? static_cast<const float*>(call_.scales)[row_ + i] : 0.0f;
  }

  // values: sums, scaled, of row `x_row` of x. Called by whole warps.
  __device__ void finish(int64_t x_row, float (&values)[4]) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float value = values[i] + biases_[i];
      // the partner of a gate's panel lies in the other half of the warp
      const float partner = call_.gated ? exchange(value, 16) : 1.0f;
      if (call_.activates) value = activate(call_.activation, value);
      values[i] = value * partner;
    }
    if (x_row < call_.m && stores_) store(x_row * columns_ + column_, values);
  }

 private:
  __device__ void store(int64_t at, float (&values)[4]) const {
    if (call_.residual != nullptr)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (column_ + i < columns_) values[i] += load_value(type_, call_.residual, at + i);
    if (columns_ % 4 == 0) {
      if (column_ < columns_) store_values(type_, call_.out, at, values);
      return;
    }
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (column_ + i < columns_) store_value(type_, call_.out, at + i, values[i]);
  }

  const QuantProduct& call_;
  const FloatType type_;
  const int64_t row_, columns_, column_;
  const bool stores_;
  float biases_[4];
};

}  // namespace llmos
