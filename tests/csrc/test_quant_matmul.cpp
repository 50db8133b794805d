// quant_matmul of every instruction set that runs here, forced by name, against plain loops in
// double. No framework and no torch: it also runs under an emulator and with any sanitizer.
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <vector>

#include "cpu/bf16.h"
#include "cpu/dispatch.h"
#include "cpu/quant_matmul.h"
#include "cpu/quant_rows.h"
#include "guarded.h"

using namespace llmos;

namespace {

constexpr WeightFormat kFormats[] = {WeightFormat::kInt8, WeightFormat::kInt4,
                                     WeightFormat::kInt4Asym, WeightFormat::kNf4,
                                     WeightFormat::kFp8};

struct Random {
  uint64_t state = 1;
  uint32_t bits() {
    state = state * 6364136223846793005u + 1442695040888963407u;
    return state >> 33;
  }
  int below(int end) { return bits() % end; }
  float uniform() { return bits() * 0x1p-30f - 1.0f; }  // [-1, 1)
};

// Values in fp32 or bf16, `shift` elements off a multiple of 64 bytes.
struct Values {
  bool bf16;
  Guarded memory;

  Values(int64_t count, bool bf16, int shift)
      : bf16(bf16), memory(count * (bf16 ? 2 : 4), shift * (bf16 ? 2 : 4)) {}
  void* data() { return memory.data(); }
  float* floats() { return reinterpret_cast<float*>(data()); }
  uint16_t* halves() { return reinterpret_cast<uint16_t*>(data()); }
  double at(int64_t i) { return bf16 ? load(halves() + i) : floats()[i]; }
  void set(int64_t i, float value) {
    bf16 ? store(halves() + i, value) : store(floats() + i, value);
  }
};

struct Case {
  WeightFormat format;
  int64_t m, n, k, group_size, x_stride;
  bool rounds, bf16, gated, bias, residual, broken;
  int activation;  // of enum Activation, or -1
  int shift;       // of all pointers
};

struct Bounded {
  double value, error;
};

// Each is at most 1.2 steep on [-1, 1] and beyond, but for relu2.
Bounded activate(int activation, Bounded y) {
  const double x = y.value;
  double value = x, slope = 1.2;
  if (activation == static_cast<int>(Activation::relu)) value = std::fmax(x, 0);
  if (activation == static_cast<int>(Activation::relu2)) {
    value = std::fmax(x, 0) * std::fmax(x, 0);
    slope = 2 * std::fabs(x) + y.error;
  }
  if (activation == static_cast<int>(Activation::gelu))
    value = x * std::erfc(-x / std::sqrt(2)) / 2;
  if (activation == static_cast<int>(Activation::gelu_tanh))
    value = x / (1 + std::exp(-2 * std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x)));
  if (activation == static_cast<int>(Activation::silu)) value = x / (1 + std::exp(-x));
  if (std::isnan(x)) value = x;  // which fmax drops
  return {value, slope * y.error + 1e-6 * std::fabs(x)};
}

// Of all finite codes the one nearest to |x|, the even one of two.
double nearest_fp8(double x) {
  int nearest = 0;
  for (int code = 1; code < 0x7f; ++code) {
    const double now = std::fabs(std::fabs(x) - fp8_value(nearest));
    const double then = std::fabs(std::fabs(x) - fp8_value(code));
    if (then < now || (then == now && code % 2 == 0)) nearest = code;
  }
  return std::copysign(fp8_value(nearest), x);
}

class Problem {
 public:
  explicit Problem(const Case& c)
      : c_(c),
        shape_{c.n, c.k, c.group_size, c.format},
        columns_(c.gated ? c.n / 2 : c.n),
        packed_(packed_bytes(), c.shift),
        scales_(panels() * groups(shape_) * kPanel, is_4bit(c.format), c.shift),
        zeros_(panels() * groups(shape_) * kPanel, c.shift),
        bias_(c.n, false, c.shift),
        residual_(c.m * columns_, c.bf16, c.shift),
        x_((c.m - 1) * c.x_stride + c.k, c.bf16, c.shift) {
    for (int64_t i = 0; i < packed_bytes(); ++i) packed_.data()[i] = random_.bits();
    for (int64_t i = 0; i < panels() * groups(shape_) * kPanel; ++i) {
      scales_.set(i, random_.uniform() * 0.1f);
      zeros_.data()[i] = random_.below(16);
    }
    for (int64_t i = 0; i < c.n; ++i) bias_.set(i, random_.uniform());
    for (int64_t i = 0; i < c.m * columns_; ++i) residual_.set(i, random_.uniform());
    for (int64_t i = 0; i < (c.m - 1) * c.x_stride + c.k; ++i)
      x_.set(i, i % c.x_stride < c.k ? random_.uniform() : NAN);  // NaN must not be read
    if (c.broken) {
      const float bad[] = {0.0f, INFINITY, -INFINITY, NAN};
      for (int i = 0; i < 4; ++i) scales_.set(random_.below(c.n), bad[i]);
      for (int i = 0; i < 2; ++i) x_.set(random_.below(c.m) * c.x_stride, bad[i + 1]);
    }
    define();
  }

  // Whether the set `name` gives what is defined, with that number of threads.
  bool holds(const std::string& name, int threads) {
    force_cpu(name);
    omp_set_num_threads(threads);
    Values out(c_.m * columns_, c_.bf16, c_.shift);
    quant_matmul({x_.data(), c_.x_stride, packed_.data(), scales_.data(), zeros(),
                  c_.bias ? bias_.floats() : nullptr, c_.residual ? residual_.data() : nullptr,
                  out.data(), c_.m, shape_, c_.activation >= 0,
                  static_cast<Activation>(std::max(c_.activation, 0)), c_.rounds, c_.bf16,
                  c_.gated});
    for (Guarded* memory : {&packed_, &zeros_, &scales_.memory, &bias_.memory, &residual_.memory,
                            &x_.memory, &out.memory})
      if (!memory->guards_hold()) return report(name, "memory beside a buffer changed");
    for (int64_t i = 0; i < c_.m * columns_; ++i) {
      const double got = out.at(i), expected = expected_[i].value;
      const double rounding = c_.bf16 ? std::fabs(expected) / 256 : 0;
      if (std::isfinite(expected) ? !(std::fabs(got - expected) <= expected_[i].error + rounding)
                                  : std::isfinite(got)) {
        std::printf("row %d column %d: got %.9g, expected %.9g within %.2g\n", int(i / columns_),
                    int(i % columns_), got, expected, expected_[i].error + rounding);
        return report(name, "wrong result");
      }
    }
    return true;
  }

  // The stored values in fp32 and bf16: exact. Every row, then some of them, backwards.
  bool dequantizes() {
    std::vector<int64_t> every, some;
    for (int64_t row = 0; row < c_.n; ++row) every.push_back(row);
    for (int64_t row = c_.n - 1; row >= 0; row -= 3) some.push_back(row);
    for (const bool bf16 : {false, true})
      if (!decodes(every, nullptr, bf16) || !decodes(some, some.data(), bf16)) return false;
    return true;
  }

 private:
  bool decodes(const std::vector<int64_t>& rows, const int64_t* ids, bool bf16) {
    const int64_t count = rows.size();
    Values out(count * c_.k, bf16, c_.shift);
    quant_rows({packed_.data(),
                scales_.data(),
                zeros(),
                {ids, true},
                count,
                out.data(),
                shape_,
                bf16 ? DType::bf16 : DType::f32});
    if (!out.memory.guards_hold()) return report("quant_rows", "memory beside a buffer changed");
    for (int64_t i = 0; i < count * c_.k; ++i) {
      const int64_t row = rows[i / c_.k], column = i % c_.k;
      Values one(1, bf16, 0);
      one.set(
          0, level(row, column) * static_cast<float>(scales_.at(scale_index(shape_, row, column))));
      if (one.at(0) != out.at(i) && !std::isnan(one.at(0) * out.at(i)))
        return report("quant_rows", "wrong result");
    }
    return true;
  }

  int64_t panels() const { return (c_.n + kPanel - 1) / kPanel; }
  int64_t packed_bytes() const {
    return c_.format == WeightFormat::kFp8 ? c_.n * c_.k : panels() * words(shape_) * kPanel * 4;
  }
  const uint8_t* zeros() { return c_.format == WeightFormat::kInt4Asym ? zeros_.data() : nullptr; }
  float level(int64_t row, int64_t column) {
    return level_of(c_.format, code_at(shape_, packed_.data(), row, column),
                    zeros_.data()[scale_index(shape_, row, column)]);
  }

  // A row of x as it is multiplied: where it is rounded, levels times the scale of a group.
  void prepare(int64_t row, std::vector<double>& values) {
    for (int64_t i = 0; i < c_.k; ++i) values[i] = x_.at(row * c_.x_stride + i);
    if (!c_.rounds) return;
    const bool fp8 = c_.format == WeightFormat::kFp8;
    const float most = fp8 ? 448.0f : 127.0f;
    for (int64_t begin = 0; begin < c_.k; begin += c_.group_size) {
      const int64_t end = std::min(begin + c_.group_size, c_.k);
      float largest = 1e-30f;
      bool finite = true;
      for (int64_t i = begin; i < end; ++i) {
        finite = finite && std::isfinite(values[i]);
        largest = std::fmax(largest, std::fabs(values[i]));
      }
      const float inverse = most / largest, scale = finite ? largest / most : NAN;
      for (int64_t i = begin; i < end; ++i) {
        volatile const float scaled = static_cast<float>(values[i]) * inverse;  // rounded to fp32
        values[i] = (fp8 ? nearest_fp8(scaled) : std::nearbyint(scaled)) * scale;
      }
    }
  }

  void define() {
    std::vector<double> weights(c_.n * c_.k), x(c_.k);
    for (int64_t i = 0; i < c_.n * c_.k; ++i)
      weights[i] = level(i / c_.k, i % c_.k) * scales_.at(scale_index(shape_, i / c_.k, i % c_.k));
    // roundings of fp32 on the way of one product into its sum
    const bool exact = c_.rounds && c_.format != WeightFormat::kFp8;
    const double roundings = 8 + (exact ? groups(shape_) : c_.k);
    // some sets round the levels of this format to bf16 where x is bf16
    const double level = c_.format == WeightFormat::kNf4 && c_.bf16 ? 0x1p-9 : 0;
    const auto product = [&](int64_t row) {
      double sum = 0, size = 0;
      for (int64_t i = 0; i < c_.k; ++i) {
        const double term = weights[row * c_.k + i] * x[i];
        sum += term;
        size += std::fabs(term);
      }
      const double bias = c_.bias ? bias_.at(row) : 0;
      const double error = roundings * 0x1p-24 * (size + std::fabs(bias)) + level * size;
      return Bounded{sum + bias, error};
    };
    for (int64_t row = 0; row < c_.m; ++row) {
      prepare(row, x);
      for (int64_t column = 0; column < columns_; ++column) {
        const int64_t pair = column / kPanel * 2 * kPanel + column % kPanel;
        Bounded y = activate(c_.activation, product(c_.gated ? pair : column));
        if (c_.gated) {
          const Bounded up = product(pair + kPanel);
          y.error = y.error * (std::fabs(up.value) + up.error) + std::fabs(y.value) * up.error;
          y.value *= up.value;
        }
        if (c_.residual) y.value += residual_.at(row * columns_ + column);
        y.error += 0x1p-22 * std::fabs(y.value) + 1e-30;
        expected_.push_back(y);
      }
    }
  }

  bool report(const std::string& name, const char* what) {
    std::printf(
        "FAILED %s: %s: format %d m %d n %d k %d group %d x_stride %d %s %s%s%s%s%s "
        "activation %d shift %d\n",
        name.c_str(), what, int(c_.format), int(c_.m), int(c_.n), int(c_.k), int(c_.group_size),
        int(c_.x_stride), c_.rounds ? "rounded" : "float", c_.bf16 ? "bf16" : "fp32",
        c_.gated ? " gated" : "", c_.bias ? " bias" : "", c_.residual ? " residual" : "",
        c_.broken ? " broken" : "", c_.activation, c_.shift);
    return false;
  }

  Case c_;
  WeightShape shape_;
  int64_t columns_;
  Random random_;
  Guarded packed_;
  Values scales_;
  Guarded zeros_;
  Values bias_, residual_, x_;
  std::vector<Bounded> expected_;
};

// The sizes in `shapes` by these m; what is beside the shape is drawn.
std::vector<Case> cases() {
  const int64_t shapes[][2] = {{1, 1}, {16, 32}, {35, 65}, {67, 261}, {130, 401}};
  std::vector<int64_t> rows = {70};
  for (int64_t m = 1; m <= 20; ++m) rows.push_back(m);
  std::vector<Case> all;
  Random random;
  const auto add = [&](WeightFormat format, bool rounds, bool bf16, int64_t m, int64_t n,
                       int64_t k) {
    const bool gated = random.below(3) == 0, broken = random.below(8) == 0;
    if (gated) n = (n + 31) / 32 * 32;
    const bool whole = format == WeightFormat::kInt8 || format == WeightFormat::kFp8;
    all.push_back({format, m, n, k, whole ? k : 32 << random.below(3), k + random.below(2) * 7,
                   rounds, bf16, gated, random.below(2) == 0, random.below(2) == 0, broken,
                   broken ? -1 : random.below(6) - 1, random.below(4)});
  };
  for (const WeightFormat format : kFormats)
    for (const bool rounds : {false, true})
      for (const bool bf16 : {false, true}) {
        if (rounds && format == WeightFormat::kNf4) continue;
        // every m with one of the shapes, every shape with some m
        const int first = random.below(5);
        for (const int64_t m : rows) {
          const auto& shape = shapes[(first + m) % 5];
          add(format, rounds, bf16, m, shape[0], shape[1]);
        }
        add(format, rounds, bf16, 70, 130, 401);
        add(format, rounds, bf16, 520, 33, 40);  // two blocks of rows
      }
  return all;
}

}  // namespace

int main() {
  int passed = 0, failed = 0;
  const auto count = [&](bool holds) { holds ? ++passed : ++failed; };
  std::printf("sets:");
  for (const std::string& name : cpu_sets()) std::printf(" %s", name.c_str());
  std::printf("\n");
  for (const Case& c : cases()) {
    Problem problem(c);
    for (const std::string& name : cpu_sets()) count(problem.holds(name, 1 + passed % 3));
    if (c.m == 1 || c.m == 3) count(problem.dequantizes());
  }
  std::printf("%d passed, %d failed\n", passed, failed);
  return failed != 0;
}
