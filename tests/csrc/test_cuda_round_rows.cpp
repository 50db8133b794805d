// The CUDA kernel that rounds activations to int8, on the GPU of simt/, against the definition: bit
// by bit.
#include <cstdio>

#include "cuda/round_rows_kernel.cuh"
#include "cuda/values.cuh"
#include "product_problem.h"

using namespace llmos;

namespace {

enum Kind { kOrdinary, kTies, kZero, kTiny, kHuge, kInfinite, kNaN, kKinds };

// Element k of a row of this kind: the largest ones lie at its end.
float element(Random& random, Kind kind, int64_t k) {
  const float ordinary = (random.below(2001) - 1000) * (1 + k) / 7e6f;
  switch (kind) {
    case kTies:  // halves where 127 is the largest
      return k % 32 == 0 ? 127.0f : random.below(250) / 2.0f;
    case kZero:
      return k % 2 ? -0.0f : 0.0f;
    case kTiny:
      return ordinary * 1e-38f;
    case kHuge:
      return ordinary * 1e38f;
    case kInfinite:
      return random.below(9) ? ordinary : -INFINITY;
    case kNaN:
      return random.below(9) ? ordinary : NAN;
    default:
      return ordinary;
  }
}

// x begins `shift` elements behind an aligned address.
template <FloatType kType>
bool rounds(int64_t m, int64_t k, int64_t group_size, int64_t stride, int64_t shift) {
  constexpr int kBytes = kType == FloatType::kFp32 ? 4 : 2;
  const WeightShape shape{1, k, group_size, WeightFormat::kInt4};
  const int64_t scale_stride = rounded_scales(m);
  Guarded x(((m - 1) * stride + k) * kBytes, shift * kBytes);
  Guarded integers(m * steps(shape) * kStep, 0), scales(groups(shape) * scale_stride * 4, 0);
  Random random;
  for (int64_t row = 0; row < m; ++row)
    for (int64_t i = 0; i < k; ++i)
      store_value(kType, x.data(), row * stride + i,
                  element(random, Kind((row + i / group_size) % kKinds), i));
  const RoundRows call{x.data(),
                       stride,
                       m,
                       k,
                       group_size,
                       reinterpret_cast<int8_t*>(integers.data()),
                       reinterpret_cast<float*>(scales.data())};
  bool holds = simt::run_grid({uint32_t(m), 1}, kRoundThreads, kRoundSharedBytes,
                              [&] { round_rows_kernel<kType>(call); });
  const auto integer = [&](int64_t row, int64_t k) {
    const int8_t* found = call.integers + rounded_place(m, row, k / kStep);
    return found[rounded_word(row, k % kStep / 4) + k % 4];
  };
  for (Guarded* memory : {&x, &integers, &scales}) holds = holds && memory->guards_hold();
  for (int64_t row = 0; row < m; ++row)
    for (int64_t group = 0; group < groups(shape); ++group) {
      float amax = 1e-30f;
      const int64_t end = std::min(k, (group + 1) * group_size);
      const auto value = [&](int64_t i) { return load_value(kType, x.data(), row * stride + i); };
      for (int64_t i = group * group_size; i < end; ++i)
        amax = std::isfinite(value(i)) ? std::max(amax, std::fabs(value(i))) : NAN;
      const float scale = call.scales[group * scale_stride + row];
      holds = holds && (std::isnan(amax) ? std::isnan(scale) : scale == amax / 127.0f);
      if (std::isnan(amax)) continue;
      const float inverse = 127.0f / amax;
      for (int64_t i = group * group_size; i < end; ++i)
        holds = holds && integer(row, i) == std::nearbyint(value(i) * inverse);
    }
  for (int64_t row = 0; row < m; ++row)
    for (int64_t i = k; i < steps(shape) * kStep; ++i) holds = holds && integer(row, i) == 0;
  if (!holds)
    std::printf("FAILED: type %d m %d k %d group %d stride %d shift %d\n", int(kType), int(m),
                int(k), int(group_size), int(stride), int(shift));
  return holds;
}

template <FloatType kType>
void every_size(int* counts) {
  for (const bool backward : {false, true}) {
    simt::machine.backward = backward;
    for (const int64_t k : {1, 8, 31, 100, 1024, 1100, 8192, 9001})
      for (const int64_t group_size : {k, int64_t{32}, int64_t{64}, int64_t{128}}) {
        ++counts[rounds<kType>(9, k, group_size, (k + 7) / 8 * 8, 0)];
        ++counts[rounds<kType>(2, k, group_size, k + 3, 1)];
      }
  }
}

}  // namespace

int main() {
  int counts[2] = {0, 0};
  every_size<FloatType::kFp32>(counts);
  every_size<FloatType::kBf16>(counts);
  every_size<FloatType::kFp16>(counts);
  std::printf("%d passed, %d failed\n", counts[1], counts[0]);
  return counts[0] != 0;
}
