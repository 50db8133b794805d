// A product with a random stored weight on the GPU of simt/: what its kernels are given, and what
// they have to give, exactly.
#pragma once

#include <algorithm>
#include <cstdio>
#include <numeric>

#include "cuda/fragments.h"
#include "cuda/quant_product.h"
#include "cuda/values.cuh"

namespace llmos {

struct Random {
  uint64_t state = 1;
  uint32_t bits() {
    state = state * 6364136223846793005u + 1442695040888963407u;
    return state >> 33;
  }
  int below(int end) { return bits() % end; }
};

inline float rounded(FloatType type, float value) {
  uint32_t bits;
  store_value(type, &bits, 0, value);
  return load_value(type, &bits, 0);
}

struct Case {
  WeightFormat format;
  FloatType type;
  int64_t m, n, k, group_size;
  uint32_t splits;
  bool gated, bias, bias_is_fp32, residual, relu;
};

inline Case random_case(Random& random, WeightFormat format, FloatType type, int64_t m, int64_t n,
                        int64_t k) {
  const bool gated = random.below(3) == 0;
  if (gated) n = (n + 31) / 32 * 32;
  const auto stages = static_cast<int>((k + kStage - 1) / kStage);
  const int64_t group_size = is_4bit(format) ? 32 << random.below(3) : k;
  const uint32_t splits = 1 + random.below(stages);
  return {format,
          type,
          m,
          n,
          k,
          group_size,
          splits,
          gated,
          random.below(2) == 0,
          random.below(2) == 0,
          random.below(2) == 0,
          random.below(2) == 0};
}

// What a kernel is launched with.
struct Launch {
  uint32_t tiles, rows;  // rows of x in a tile
  int shared_bytes;
};

class ProductProblem {
 public:
  explicit ProductProblem(const Case& c)
      : c_(c),
        shape_{c.n, c.k, c.group_size, c.format},
        columns_(c.gated ? c.n / 2 : c.n),
        entries_(panels(shape_) * groups(shape_) * kPanel),
        element_(c.type == FloatType::kFp32 ? 4 : 2),
        packed_(panels(shape_) * words(shape_) * kWordBytes, 0),
        scales_(entries_ * (is_4bit(c.format) ? 2 : 4), 0),
        zeros_(entries_, 0),
        bias_(c.n * 4, 0),
        residual_(c.m * columns_ * element_, 0) {
    for (int64_t i = 0; i < panels(shape_) * words(shape_) * kWordBytes; ++i)
      packed_.data()[i] = random_.bits();
    const FloatType scale_type = is_4bit(c.format) ? FloatType::kBf16 : FloatType::kFp32;
    for (int64_t i = 0; i < entries_; ++i) {
      store_value(scale_type, scales_.data(), i,
                  std::ldexp(random_.below(2) ? 1 : -1, random_.below(3)));
      zeros_.data()[i] = random_.below(16);
    }
    for (int64_t i = 0; i < c.n; ++i)
      store_value(bias_type(), bias_.data(), i, random_.below(9) - 4);
    for (int64_t i = 0; i < c.m * columns_; ++i)
      store_value(c.type, residual_.data(), i, random_.below(9) - 4);
  }

  // kernel(product) on the grid of `launch`; `inputs` are more memory that it may read.
  template <typename Kernel>
  bool holds(const Launch& launch, std::vector<Guarded*> inputs, bool late, bool backward,
             Kernel kernel) {
    simt::machine.late = late, simt::machine.backward = backward;
    const size_t partial_bytes = size_t{launch.tiles} * c_.splits * kTileRows * launch.rows * 4;
    Guarded partials(c_.splits > 1 ? partial_bytes : 0, 0), counters(launch.tiles * 4, 0);
    Guarded out(c_.m * columns_ * element_, 0);
    std::memset(counters.data(), 0, launch.tiles * 4);
    const QuantProduct product{c_.m,
                               shape_,
                               packed_.data(),
                               scales_.data(),
                               c_.format == WeightFormat::kInt4Asym ? zeros_.data() : nullptr,
                               c_.bias ? bias_.data() : nullptr,
                               c_.bias_is_fp32,
                               c_.residual ? residual_.data() : nullptr,
                               out.data(),
                               c_.relu,
                               Activation::relu,
                               c_.gated,
                               c_.splits,
                               partials.data(),
                               reinterpret_cast<uint32_t*>(counters.data())};
    const bool inside = simt::run_grid({launch.tiles, c_.splits}, kThreads, launch.shared_bytes,
                                       [&] { kernel(product); });
    if (!inside) return report("memory beside the shared memory changed");
    inputs.insert(inputs.end(), {&packed_, &scales_, &zeros_, &bias_, &residual_});
    inputs.insert(inputs.end(), {&partials, &counters, &out});
    for (Guarded* memory : inputs)
      if (!memory->guards_hold()) return report("memory beside a buffer changed");
    for (uint32_t i = 0; i < launch.tiles; ++i)
      if (product.counters[i] != 0) return report("a counter is not 0 again");
    for (int64_t i = 0; i < c_.m * columns_; ++i) {
      const float found = load_value(c_.type, out.data(), i);
      if (found == expected_[i] || (std::isnan(found) && std::isnan(expected_[i]))) continue;
      std::printf("row %d column %d: got %g, expected %g\n", int(i / columns_), int(i % columns_),
                  found, expected_[i]);
      return report("wrong result");
    }
    return true;
  }

 protected:
  // The results, from x(x_row, k). What follows a sum is in fp32, as the kernels have it.
  template <typename X>
  void define(X x) {
    std::vector<double> weights, rows;
    for (int64_t i = 0; i < c_.n * c_.k; ++i) weights.push_back(weight(i / c_.k, i % c_.k));
    for (int64_t i = 0; i < c_.m * c_.k; ++i) rows.push_back(x(i / c_.k, i % c_.k));
    const auto product = [&](int64_t x_row, int64_t row) {
      const double* left = weights.data() + row * c_.k;
      const double* right = rows.data() + x_row * c_.k;
      const auto y = static_cast<float>(std::inner_product(left, left + c_.k, right, 0.0));
      return c_.bias ? y + load_value(bias_type(), bias_.data(), row) : y;
    };
    for (int64_t x_row = 0; x_row < c_.m; ++x_row)
      for (int64_t column = 0; column < columns_; ++column) {
        const int64_t row = c_.gated ? column / kPanel * 2 * kPanel + column % kPanel : column;
        float y = product(x_row, row);
        if (c_.relu && y < 0) y = 0;
        if (c_.gated) y *= product(x_row, row + kPanel);
        if (c_.residual) y += load_value(c_.type, residual_.data(), x_row * columns_ + column);
        expected_.push_back(rounded(c_.type, y));
      }
  }

  const Case c_;
  const WeightShape shape_;
  const int64_t columns_, entries_, element_;
  Random random_;

 private:
  FloatType bias_type() const { return c_.bias_is_fp32 ? FloatType::kFp32 : c_.type; }

  // level times scale of a weight
  double weight(int64_t row, int64_t k) {
    const int64_t at = scale_index(shape_, row, k);
    float level = level_of(c_.format, code_at(shape_, packed_.data(), row, k), zeros_.data()[at]);
    if (c_.format == WeightFormat::kNf4) level = rounded(c_.type, level);  // to x's type
    const FloatType scale_type = is_4bit(c_.format) ? FloatType::kBf16 : FloatType::kFp32;
    return double{level} * load_value(scale_type, scales_.data(), at);
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

  Guarded packed_, scales_, zeros_, bias_, residual_;
  std::vector<float> expected_;
};

}  // namespace llmos
