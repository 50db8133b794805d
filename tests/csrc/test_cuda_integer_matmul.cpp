// The CUDA kernels of integer_matmul.h on the GPU of simt/, as test_cuda_quant_matmul.cpp does it:
// sums are exact, scales powers of two, so results have to be equal.
#include "cuda/integer_matmul_kernel.cuh"
#include "product_problem.h"

using namespace llmos;

namespace {

IntegerMatmulKernel kernel_of(WeightFormat format, int64_t m, bool warpgroups) {
  if (format == WeightFormat::kInt8)
    return integer_instance_for<WeightFormat::kInt8>(m, warpgroups);
  if (format == WeightFormat::kInt4)
    return integer_instance_for<WeightFormat::kInt4>(m, warpgroups);
  return integer_instance_for<WeightFormat::kInt4Asym>(m, warpgroups);
}

class Problem : public ProductProblem {
 public:
  explicit Problem(const Case& c)
      : ProductProblem(c),
        stride_(rounded_scales(c.m)),
        integers_(c.m * steps(shape_) * kStep, 0),
        x_scales_(stride_ * groups(shape_) * 4, 0) {
    // several groups are added in fp32
    const int most = groups(shape_) == 1 ? 127 : 7;
    for (int64_t row = 0; row < c.m; ++row)
      for (int64_t k = 0; k < steps(shape_) * kStep; ++k)
        *integer(row, k) = k < c.k ? random_.below(2 * most + 1) - most : 0;
    // NaN in what fills rows up, and in a group of a row that was not finite
    for (int64_t group = 0; group < groups(shape_); ++group)
      for (int64_t row = 0; row < stride_; ++row)
        x_scale(row, group) =
            row < c.m ? std::ldexp(1, -random_.below(3) - (most == 127 ? 8 : 0)) : NAN;
    if (c.m > 2) x_scale(c.m / 2, groups(shape_) - 1) = NAN;
    define([&](int64_t row, int64_t k) {
      return double{x_scale(row, k / c.group_size)} * *integer(row, k);
    });
  }

  bool holds(bool late, bool backward, bool warpgroups) {
    const IntegerMatmulKernel kernel = kernel_of(c_.format, c_.m, warpgroups);
    const uint32_t tiles = tiles_of_product(shape_, c_.m, kernel.rows);
    const Launch launch{tiles, kernel.rows, kernel.shared_bytes};
    const auto run = [&](const QuantProduct& product) {
      kernel.function(
          {product, reinterpret_cast<int8_t*>(integers_.data()), &x_scale(0, 0), c_.type});
    };
    return ProductProblem::holds(launch, {&integers_, &x_scales_}, late, backward, run);
  }

 private:
  int8_t* integer(int64_t row, int64_t k) {
    uint8_t* found = integers_.data() + rounded_place(c_.m, row, k / kStep) +
                     rounded_word(row, k % kStep / 4) + k % 4;
    return reinterpret_cast<int8_t*>(found);
  }
  float& x_scale(int64_t row, int64_t group) {
    return reinterpret_cast<float*>(x_scales_.data())[group * stride_ + row];
  }

  int64_t stride_;
  Guarded integers_, x_scales_;
};

// Every code beside every other one.
bool unpacks_exactly() {
  bool exact = true;
  Random random;
  for (uint32_t i = 0; i < 4; ++i)
    for (int code = 0; code < 256; ++code) {
      const uint32_t noise = (random.bits() << 1) & ~(0xffu << (8 * i));
      const auto level = [i](uint32_t word) { return float(int8_t(word >> (8 * i))); };
      const uint32_t word = noise | uint32_t(code) << (8 * i);
      exact = exact && level(int8_levels(word)) == level_of(WeightFormat::kInt8, code, 0);
      const uint32_t four = int4_levels(word, kEights);
      exact = exact && level(four) == level_of(WeightFormat::kInt4, code & 15, 0);
      for (int zero = 0; zero < 16; ++zero)
        for (uint32_t row = 0; row < 4; ++row) {
          const uint32_t others = random.bits() * 5 & 0x0f0f0f0f & ~(0xffu << (8 * row));
          const uint32_t spread = spread_zero(others | uint32_t(zero) << (8 * row), row);
          const float expected = level_of(WeightFormat::kInt4Asym, code & 15, zero);
          exact = exact && level(int4_levels(word, spread)) == expected;
        }
    }
  return exact;
}

std::vector<Case> cases() {
  std::vector<Case> all;
  Random random;
  const auto add = [&](WeightFormat format, FloatType type, int64_t m, int64_t n, int64_t k) {
    all.push_back(random_case(random, format, type, m, n, k));
  };
  constexpr FloatType kTypes[] = {FloatType::kFp32, FloatType::kBf16, FloatType::kFp16};
  for (const WeightFormat format :
       {WeightFormat::kInt8, WeightFormat::kInt4, WeightFormat::kInt4Asym})
    for (const FloatType type : kTypes) {
      // n off the row, panel, pair and tile; k off the word, step, stage and the ring's depth; m
      // off every tile, with one tile of rows and several
      add(format, type, 1, 1, 1);
      add(format, type, 3, 20, 9);
      add(format, type, 8, 257, 1028);
      add(format, type, 9, 45, 130);
      add(format, type, 21, 70, 301);
      add(format, type, 33, 290, 97);
      add(format, type, 64, 34, 392);
      add(format, type, 67, 40, 650);
      add(format, type, 150, 274, 161);
    }
  // slots of the ring used again and again
  all.push_back({WeightFormat::kInt8, FloatType::kBf16, 66, 40, 1160, 1160, 1});
  // exact where a float is not
  all.push_back({WeightFormat::kInt8, FloatType::kFp32, 2, 18, 6000, 6000, 3});
  return all;
}

}  // namespace

int main() {
  int passed = 0, failed = 0;
  const auto count = [&](bool holds) { holds ? ++passed : ++failed; };
  count(unpacks_exactly());
  bool backward = false;
  for (const Case& c : cases()) {
    Problem problem(c);
    for (const bool late : {false, true}) {
      count(problem.holds(late, late != backward, false));
      if (c.m > 64 && c.format == WeightFormat::kInt8)
        count(problem.holds(late, late != backward, true));
    }
    backward = !backward;
  }
  std::printf("%d passed, %d failed\n", passed, failed);
  return failed != 0;
}
