// The CUDA kernels of quant_matmul on the GPU of simt/: as they are written, for shapes off the
// tile in every direction, with blocks, threads and copies in different orders. Integers and powers
// of two, so that every sum is exact and results have to be equal.
#include <algorithm>
#include <cstdio>

#include "cuda/quant_matmul_instances.cuh"
#include "cuda/quant_matmul_plan.h"

using namespace llmos;

namespace {

constexpr WeightFormat kFormats[] = {WeightFormat::kInt8, WeightFormat::kInt4,
                                     WeightFormat::kInt4Asym, WeightFormat::kNf4};

struct Random {
  uint64_t state = 1;
  uint32_t bits() {
    state = state * 6364136223846793005u + 1442695040888963407u;
    return state >> 33;
  }
  int below(int end) { return bits() % end; }
};

uint16_t narrow_of(FloatType type, float value) {
  return type == FloatType::kBf16 ? narrow<FloatType::kBf16>(value)
                                  : narrow<FloatType::kFp16>(value);
}

float widen_of(FloatType type, uint16_t bits) {
  return type == FloatType::kBf16 ? widen<FloatType::kBf16>(bits) : widen<FloatType::kFp16>(bits);
}

QuantMatmulKernel kernel_of(WeightFormat format, FloatType type, int64_t m) {
  switch (format) {
    case WeightFormat::kInt8:
      return instance_for<WeightFormat::kInt8>(type, m);
    case WeightFormat::kInt4:
      return instance_for<WeightFormat::kInt4>(type, m);
    case WeightFormat::kInt4Asym:
      return instance_for<WeightFormat::kInt4Asym>(type, m);
    default:
      return instance_for<WeightFormat::kNf4>(type, m);
  }
}

struct Case {
  WeightFormat format;
  FloatType type;
  int64_t m, n, k, group_size;
  uint32_t splits;
  bool gated, bias, bias_is_fp32, residual, relu;
};

class Problem {
 public:
  explicit Problem(const Case& c)
      : c_(c),
        shape_{c.n, c.k, c.group_size, c.format},
        columns_(c.gated ? c.n / 2 : c.n),
        x_stride_((c.k + 7) / 8 * 8 + 8),
        packed_(panels(shape_) * words(shape_) * kWordBytes, 0),
        scales_(panels(shape_) * groups(shape_) * kPanel * (is_4bit(c.format) ? 2 : 4), 0),
        zeros_(panels(shape_) * groups(shape_) * kPanel, 0),
        bias_(c.n * 4, 0),
        residual_(c.m * columns_ * 2, 0),
        x_(((c.m - 1) * x_stride_ + (c.k + 7) / 8 * 8) * 2, 0) {
    fill();
    define();
  }

  bool holds(bool late, bool backward) {
    simt::machine.late = late, simt::machine.backward = backward;
    const QuantMatmulKernel kernel = kernel_of(c_.format, c_.type, c_.m);
    const auto tiles = static_cast<uint32_t>((c_.n + kTileRows - 1) / kTileRows);
    const size_t partial_bytes =
        size_t{tiles} * c_.splits * kTileRows * kernel.x_tiles * kXTile * 4;
    Guarded partials(c_.splits > 1 ? partial_bytes : 0, 0), counters(tiles * 4, 0);
    Guarded out(c_.m * columns_ * 2, 0);
    std::memset(counters.data(), 0, tiles * 4);
    const CudaQuantMatmul call{reinterpret_cast<uint16_t*>(x_.data()),
                               x_stride_,
                               packed_.data(),
                               scales_.data(),
                               c_.format == WeightFormat::kInt4Asym ? zeros_.data() : nullptr,
                               c_.bias ? bias_.data() : nullptr,
                               c_.bias_is_fp32,
                               c_.residual ? halves(residual_) : nullptr,
                               halves(out),
                               c_.m,
                               shape_,
                               c_.relu,
                               Activation::relu,
                               c_.gated,
                               c_.splits,
                               reinterpret_cast<float*>(partials.data()),
                               reinterpret_cast<uint32_t*>(counters.data())};
    const bool inside = simt::run_grid({tiles, c_.splits}, kThreads, kernel.shared_bytes,
                                       [&] { kernel.function(call); });
    if (!inside) return report("memory beside the shared memory changed");
    for (Guarded* memory :
         {&packed_, &scales_, &zeros_, &bias_, &residual_, &x_, &partials, &counters, &out})
      if (!memory->guards_hold()) return report("memory beside a buffer changed");
    for (uint32_t i = 0; i < tiles; ++i)
      if (call.counters[i] != 0) return report("a counter is not 0 again");
    for (int64_t i = 0; i < c_.m * columns_; ++i)
      if (widen_of(c_.type, halves(out)[i]) != expected_[i]) {
        std::printf("row %d column %d: got %g, expected %g\n", int(i / columns_), int(i % columns_),
                    widen_of(c_.type, halves(out)[i]), expected_[i]);
        return report("wrong result");
      }
    return true;
  }

 private:
  static uint16_t* halves(Guarded& memory) { return reinterpret_cast<uint16_t*>(memory.data()); }

  void fill() {
    for (int64_t i = 0; i < panels(shape_) * words(shape_) * kWordBytes; ++i)
      packed_.data()[i] = random_.bits();
    for (int64_t i = 0; i < panels(shape_) * groups(shape_) * kPanel; ++i) {
      const float scale = std::ldexp(random_.below(2) ? 1 : -1, random_.below(3));
      if (is_4bit(c_.format))
        halves(scales_)[i] = narrow<FloatType::kBf16>(scale);
      else
        reinterpret_cast<float*>(scales_.data())[i] = scale;
      zeros_.data()[i] = random_.below(16);
    }
    for (int64_t i = 0; i < c_.n; ++i)
      if (c_.bias_is_fp32)
        reinterpret_cast<float*>(bias_.data())[i] = random_.below(9) - 4;
      else
        halves(bias_)[i] = narrow_of(c_.type, random_.below(9) - 4);
    for (int64_t i = 0; i < c_.m * columns_; ++i)
      halves(residual_)[i] = narrow_of(c_.type, random_.below(9) - 4);
    // few of each row: the product of a gate and its partner has to fit fp16
    for (int64_t i = 0; i < (c_.m - 1) * x_stride_ + (c_.k + 7) / 8 * 8; ++i) {
      const int64_t column = i % x_stride_;
      const float value = random_.below(8) == 0 ? random_.below(3) - 1 : 0;
      halves(x_)[i] = column < c_.k ? narrow_of(c_.type, value) : 0;
      if (column >= (c_.k + 7) / 8 * 8) halves(x_)[i] = 0x7fff;  // NaN must not be read
    }
  }

  double product(int64_t x_row, int64_t row) {
    double sum = 0;
    for (int64_t k = 0; k < c_.k; ++k) {
      const int64_t at = scale_index(shape_, row, k);
      const float x = widen_of(c_.type, halves(x_)[x_row * x_stride_ + k]);
      if (x == 0) continue;
      float level = level_of(c_.format, code_at(shape_, packed_.data(), row, k), zeros_.data()[at]);
      if (c_.format == WeightFormat::kNf4) level = widen_of(c_.type, narrow_of(c_.type, level));
      const float scale = is_4bit(c_.format) ? widen<FloatType::kBf16>(halves(scales_)[at])
                                             : reinterpret_cast<float*>(scales_.data())[at];
      sum += double{x} * level * scale;
    }
    if (!c_.bias) return sum;
    return sum + (c_.bias_is_fp32 ? reinterpret_cast<float*>(bias_.data())[row]
                                  : widen_of(c_.type, halves(bias_)[row]));
  }

  void define() {
    for (int64_t x_row = 0; x_row < c_.m; ++x_row)
      for (int64_t column = 0; column < columns_; ++column) {
        const int64_t row = c_.gated ? column / kPanel * 2 * kPanel + column % kPanel : column;
        double y = product(x_row, row);
        if (c_.relu) y = std::max(y, 0.0);
        if (c_.gated) y *= product(x_row, row + kPanel);
        if (c_.residual) y += widen_of(c_.type, halves(residual_)[x_row * columns_ + column]);
        expected_.push_back(widen_of(c_.type, narrow_of(c_.type, static_cast<float>(y))));
      }
  }

  bool report(const char* what) {
    std::printf(
        "FAILED: %s: format %d type %d m %d n %d k %d group %d splits %d%s%s%s%s, copies %s, %s\n",
        what, int(c_.format), int(c_.type), int(c_.m), int(c_.n), int(c_.k), int(c_.group_size),
        int(c_.splits), c_.gated ? " gated" : "", c_.bias ? " bias" : "",
        c_.residual ? " residual" : "", c_.relu ? " relu" : "",
        simt::machine.late ? "late" : "at once", simt::machine.backward ? "backward" : "forward");
    return false;
  }

  Case c_;
  WeightShape shape_;
  int64_t columns_, x_stride_;
  Random random_;
  Guarded packed_, scales_, zeros_, bias_, residual_, x_;
  std::vector<float> expected_;
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

std::vector<Case> cases() {
  std::vector<Case> all;
  Random random;
  const auto add = [&](WeightFormat format, FloatType type, int64_t m, int64_t n, int64_t k) {
    const bool gated = random.below(3) == 0;
    if (gated) n = (n + 31) / 32 * 32;
    const auto stages = static_cast<int>((k + kStage - 1) / kStage);
    const int64_t group_size = is_4bit(format) ? 32 << random.below(3) : k;
    const uint32_t splits = 1 + random.below(stages);
    all.push_back({format, type, m, n, k, group_size, splits, gated, random.below(2) == 0,
                   random.below(2) == 0, random.below(2) == 0, random.below(2) == 0});
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
    }
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
  count(splits_cover_all_stages(), "splits do not cover all stages");
  count(plans_fill_the_chip(), "a plan does not fill the chip");
  bool backward = false;
  for (const Case& c : cases()) {
    Problem problem(c);
    for (const bool late : {false, true}) count(problem.holds(late, late != backward));
    backward = !backward;
  }
  std::printf("%d passed, %d failed\n", passed, failed);
  return failed != 0;
}
