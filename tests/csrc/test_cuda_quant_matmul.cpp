// The CUDA kernels of quant_matmul on the GPU of simt/: as they are written, for shapes off the
// tile in every direction, with blocks, threads and copies in different orders. Integers and powers
// of two, so that every sum is exact and results have to be equal.
#include <algorithm>
#include <cstdio>

#include "cuda/quant_matmul_instances.cuh"
#include "cuda/quant_matmul_plan.h"
#include "product_problem.h"

using namespace llmos;

namespace {

constexpr WeightFormat kFormats[] = {WeightFormat::kInt8, WeightFormat::kInt4,
                                     WeightFormat::kInt4Asym, WeightFormat::kNf4};

// What is chosen, or a tile of 128 rows, which products as small as these do not get.
enum class Tile { kChosen, kLargest, kWarpgroups };

template <WeightFormat kFormat, FloatType kType>
QuantMatmulKernel kernel_of(const WeightShape& weight, int64_t m, Tile tile) {
  if (tile == Tile::kChosen) return instance_for<kFormat, kType>(weight, m, false);
  return tile == Tile::kLargest ? instance<kFormat, kType, 2, 8>()
                                : instance<kFormat, kType, 1, 16>();
}

template <WeightFormat kFormat>
QuantMatmulKernel kernel_of(const WeightShape& weight, FloatType type, int64_t m, Tile tile) {
  return type == FloatType::kBf16 ? kernel_of<kFormat, FloatType::kBf16>(weight, m, tile)
                                  : kernel_of<kFormat, FloatType::kFp16>(weight, m, tile);
}

QuantMatmulKernel kernel_of(const WeightShape& weight, FloatType type, int64_t m, Tile tile) {
  switch (weight.format) {
    case WeightFormat::kInt8:
      return kernel_of<WeightFormat::kInt8>(weight, type, m, tile);
    case WeightFormat::kInt4:
      return kernel_of<WeightFormat::kInt4>(weight, type, m, tile);
    case WeightFormat::kInt4Asym:
      return kernel_of<WeightFormat::kInt4Asym>(weight, type, m, tile);
    default:
      return kernel_of<WeightFormat::kNf4>(weight, type, m, tile);
  }
}

class Problem : public ProductProblem {
 public:
  explicit Problem(const Case& c)
      : ProductProblem(c),
        filled_((c.k + 7) / 8 * 8),
        x_stride_(filled_ + 8),
        x_(((c.m - 1) * x_stride_ + filled_) * 2, 0) {
    // few of each row: the product of a gate and its partner has to fit fp16
    for (int64_t i = 0; i < (c.m - 1) * x_stride_ + filled_; ++i) {
      const int64_t column = i % x_stride_;
      const float value = random_.below(8) == 0 ? random_.below(3) - 1 : 0;
      store_value(c.type, x_.data(), i, column < c.k ? value : 0);
      if (column >= filled_) halves()[i] = 0x7fff;  // NaN must not be read
    }
    define(
        [&](int64_t row, int64_t k) { return load_value(c.type, x_.data(), row * x_stride_ + k); });
  }

  bool holds(bool late, bool backward, Tile tile) {
    const QuantMatmulKernel kernel = kernel_of(shape_, c_.type, c_.m, tile);
    const uint32_t tiles = tiles_of_product(shape_, c_.m, kernel.rows);
    const Launch launch{tiles, kernel.rows, kernel.shared_bytes};
    return ProductProblem::holds(launch, {&x_}, late, backward, [&](const QuantProduct& product) {
      kernel.function({product, halves(), x_stride_});
    });
  }

 private:
  uint16_t* halves() { return reinterpret_cast<uint16_t*>(x_.data()); }

  int64_t filled_, x_stride_;
  Guarded x_;
};

// Every element of a weight is found once: by the lane, in the word and at the place of a pair that
// the index maps say.
bool finds_every_weight_once(WeightFormat format, int64_t n, int64_t k) {
  const WeightShape shape{n, k, 32, format};
  std::vector<int> found(panels(shape) * kPanel * words(shape) * per_word(format));
  const int64_t row_length = words(shape) * per_word(format);
  const int64_t bytes = panels(shape) * words(shape) * kWordBytes;
  std::vector<int> read(bytes);
  const int64_t pairs = (panels(shape) + 1) / 2;
  for (int64_t pair = 0; pair < pairs; ++pair)
    for (uint32_t lane = 0; lane < 32; ++lane)
      for (uint32_t step = 0; step < stages(shape) * kStageSteps; ++step)
        for (uint32_t load = 0; load < loads_per_step(format); ++load) {
          const uint32_t word = word_of(format, step, load);
          if (word >= words_of_lane(shape, pair, lane)) continue;
          const int64_t offset = first_word(shape, pair, lane) + int64_t{word} * kWordBytes;
          if (offset < 0 || offset + 16 > bytes) return false;
          for (int i = 0; i < 16; ++i) ++read[offset + i];
          for (uint32_t i = 0; i < 4; ++i)
            for (int w = 0; w < per_word(format); ++w) {
              const int64_t row = pair * kPairRows + row_of(lane, i);
              // the 8 k of a lane in a step; 4 in each load of 8-bit weights
              const int64_t column = step * kStep + lane % 4 * 8 + load * 4 + w;
              // the byte that code_at reads
              const int64_t stored = row / kPanel * words(shape) + column / per_word(format);
              const int64_t at = stored * kWordBytes + row % kPanel * 4 + column % 4;
              if (at != offset + i * 4 + w % 4) return false;
              ++found[row * row_length + column];
            }
        }
  const auto once = [](int count) { return count == 1; };
  return std::all_of(found.begin(), found.end(), once) &&
         std::all_of(read.begin(), read.end(), once);
}

template <FloatType kType>
bool is_level(WeightFormat format, uint32_t pair, int half, int code, int zero) {
  const float level = level_of(format, code, zero);
  return half_of<kType>(pair, half) == widen<kType>(narrow<kType>(level));
}

// Every code at every place, beside every other code, becomes its level.
template <FloatType kType>
bool unpacks_exactly() {
  bool exact = true;
  Random random;
  for (int place = 0; place < 8; ++place)
    for (int code = 0; code < 256; ++code)
      for (int zero = 0; zero < 16; ++zero) {
        const int j = place / 4, h = place % 4 % 2, half = place % 4 / 2, pair = 2 * j + h;
        uint32_t bytes[2] = {random.bits() << 1, random.bits() << 1}, pairs[4];
        bytes[j] = (bytes[j] & ~(0xffu << (place % 4 * 8))) | uint32_t(code) << (place % 4 * 8);
        unpack_int8<kType>(bytes, pairs);
        exact = exact && is_level<kType>(WeightFormat::kInt8, pairs[pair], half, code, 0);
        const uint32_t noise = random.bits() << 1;
        const uint32_t word = (noise & ~(0xfu << nibble_shift(place))) | uint32_t(code & 15)
                                                                             << nibble_shift(place);
        unpack_int4<kType>(word, kMinusEight<kType>, pairs);
        exact = exact && is_level<kType>(WeightFormat::kInt4, pairs[pair], half, code & 15, 0);
        const uint32_t zeros = (noise * 7 & 0x0f0f0f0f & ~(0xffu << (code / 64 * 8))) |
                               uint32_t(zero) << (code / 64 * 8);
        unpack_int4<kType>(word, minus_zero<kType>(zeros, code / 64), pairs);
        exact =
            exact && is_level<kType>(WeightFormat::kInt4Asym, pairs[pair], half, code & 15, zero);
        unpack_nf4<kType>(word, pairs);
        exact = exact && is_level<kType>(WeightFormat::kNf4, pairs[pair], half, code & 15, 0);
      }
  return exact;
}

// Likewise where a lane takes the pair of its neighbours.
template <FloatType kType>
bool finds_neighbours_exactly() {
  bool exact = true;
  Random random;
  for (uint32_t lane = 0; lane < 32; ++lane)
    for (int code = 0; code < 256; ++code)
      for (int half = 0; half < 2; ++half) {
        const NeighboursOfLane neighbours(lane);
        const int k = lane % 4 * 2 + half, byte = k % 4 * 8;
        const auto word = [&](uint32_t mask, int shift) {
          return (random.bits() << 1 & ~(mask << shift)) | (uint32_t(code) & mask) << shift;
        };
        const uint32_t eight = int8_pair<kType>(neighbours.bytes(word(0xff, byte)));
        exact = exact && is_level<kType>(WeightFormat::kInt8, eight, half, code, 0);
        const auto nibbles = [&] { return neighbours.nibbles(word(0xf, nibble_shift(k))); };
        const uint32_t four = int4_pair<kType>(nibbles(), kMinusEight<kType>);
        exact = exact && is_level<kType>(WeightFormat::kInt4, four, half, code & 15, 0);
        uint32_t pairs[2];
        unpack_nf4_pairs<kType>({nibbles(), nibbles()}, pairs);
        for (const uint32_t pair : pairs)
          exact = exact && is_level<kType>(WeightFormat::kNf4, pair, half, code & 15, 0);
      }
  return exact;
}

// Scales from 2^-30 to 2^20, of which fp16 holds a part.
template <FloatType kType>
bool scales_with_one_rounding() {
  bool exact = true;
  Random random;
  for (int i = 0; i < 10000; ++i) {
    const float low = random.below(31) - 15, high = nf4_value(random.below(16));
    const uint16_t levels[2] = {narrow<kType>(low), narrow<kType>(high)};
    const float scale = widen<FloatType::kBf16>(
        uint16_t(random.below(2) << 15 | (97 + random.below(51)) << 7 | random.below(128)));
    const uint32_t pair = scale_pair<kType>(levels[0] | uint32_t{levels[1]} << 16, scale);
    for (int half = 0; half < 2; ++half)
      exact = exact && half_of<kType>(pair, half) ==
                           widen<kType>(narrow<kType>(widen<kType>(levels[half]) * scale));
  }
  return exact;
}

bool splits_cover_all_stages() {
  for (uint32_t stages = 1; stages < 70; ++stages)
    for (uint32_t splits = 1; splits <= stages; ++splits) {
      if (first_stage(stages, 0, splits) != 0) return false;
      if (first_stage(stages, splits, splits) != stages) return false;
      for (uint32_t split = 0; split < splits; ++split) {
        const uint32_t count =
            first_stage(stages, split + 1, splits) - first_stage(stages, split, splits);
        if (count != stages / splits && count != stages / splits + 1) return false;
      }
    }
  return true;
}

// Most slots at work, in one wave, where there are fewer tiles than slots.
bool plans_fill_the_chip() {
  bool fills = choose_splits(1, 1, 264, 8) == 1 && choose_splits(1056, 64, 264, 8) == 1;
  for (const int64_t tiles : {16, 32, 43, 56, 112}) {
    const int64_t blocks = tiles * choose_splits(tiles, 64, 264, 8);
    fills = fills && blocks <= 264 && blocks > 200;
  }
  return fills;
}

// Tiles of 64 rows until there are many of 128.
bool tiles_are_many() {
  const auto rows = [](int64_t n, int64_t m) {
    return kernel_of({n, 4096, 128, WeightFormat::kInt4}, FloatType::kBf16, m, Tile::kChosen).rows;
  };
  return rows(28672, 64) == 64 && rows(28672, 65) == 128 && rows(8192, 128) == 64 &&
         rows(8192, 129) == 128 && rows(4096, 256) == 64;
}

std::vector<Case> cases() {
  std::vector<Case> all;
  Random random;
  const auto add = [&](WeightFormat format, FloatType type, int64_t m, int64_t n, int64_t k) {
    all.push_back(random_case(random, format, type, m, n, k));
  };
  for (const WeightFormat format : kFormats)
    for (const FloatType type : {FloatType::kBf16, FloatType::kFp16}) {
      // n off the row, panel, pair and tile; k off the word, step, stage and the ring's depth
      add(format, type, 1, 1, 1);
      add(format, type, 3, 20, 9);
      add(format, type, 8, 257, 1028);
      add(format, type, 9, 45, 130);
      add(format, type, 16, 32, 640);
      add(format, type, 21, 70, 301);
      add(format, type, 33, 290, 97);
      add(format, type, 64, 34, 392);
      // m off tiles of 64 and of 128 rows, one and several of them
      add(format, type, 67, 40, 330);
      add(format, type, 150, 274, 161);
      const int64_t group_size = is_4bit(format) ? 32 : 300;
      all.push_back({format, type, 140, 64, 300, group_size, 2, true, true, true, true, true});
    }
  // slots of the ring used again and again
  all.push_back({WeightFormat::kInt8, FloatType::kBf16, 66, 40, 1160, 1160, 1});
  all.push_back({WeightFormat::kInt4, FloatType::kBf16, 66, 40, 1160, 128, 1});
  return all;
}

}  // namespace

int main() {
  int passed = 0, failed = 0;
  const auto count = [&](bool holds, const char* what = nullptr) {
    holds ? ++passed : ++failed;
    if (!holds && what != nullptr) std::printf("FAILED: %s\n", what);
  };
  for (const WeightFormat format : kFormats)
    for (const int64_t n : {1, 16, 17, 33, 300})
      for (const int64_t k : {1, 7, 32, 33, 130, 300})
        count(finds_every_weight_once(format, n, k), "a weight is not found once");
  count(unpacks_exactly<FloatType::kBf16>(), "a code does not become its level in bf16");
  count(unpacks_exactly<FloatType::kFp16>(), "a code does not become its level in fp16");
  count(finds_neighbours_exactly<FloatType::kBf16>(), "a lane does not find its pair in bf16");
  count(finds_neighbours_exactly<FloatType::kFp16>(), "a lane does not find its pair in fp16");
  count(scales_with_one_rounding<FloatType::kBf16>(), "a scaled level is not rounded once in bf16");
  count(scales_with_one_rounding<FloatType::kFp16>(), "a scaled level is not rounded once in fp16");
  count(splits_cover_all_stages(), "splits do not cover all stages");
  count(plans_fill_the_chip(), "a plan does not fill the chip");
  count(tiles_are_many(), "a product does not get its tile");
  bool backward = false;
  for (const Case& c : cases()) {
    Problem problem(c);
    for (const bool late : {false, true}) {
      if (late || c.m <= 64) count(problem.holds(late, late != backward, Tile::kChosen));
      if (c.m <= 64) continue;
      count(problem.holds(late, late != backward, Tile::kLargest));
      count(problem.holds(late, late != backward, Tile::kWarpgroups));
    }
    backward = !backward;
  }
  std::printf("%d passed, %d failed\n", passed, failed);
  return failed != 0;
}
