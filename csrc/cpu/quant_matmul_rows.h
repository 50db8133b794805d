// Rows of x as the kernels read them. Include it inside a target region.
#pragma once

namespace llmos {
namespace {

// Lengths of one call. A word is what quant_formats.h calls one: 4 or 8 weights of a row.
struct Plan {
  int64_t words;            // of a weight row
  int64_t words_per_group;  // the last group may have fewer
  int64_t groups;
  bool streams;   // few rows: weights are read as they are stored
  int64_t strip;  // rows of x that lie interleaved
  int64_t depth;  // k, filled up with zeros to whole cache lines
};

// Prepared rows lie in strips, so that a register tile reads one stream from front to back:
// integers [strip][depth / 4][row][4], floats [strip][depth][row]; the last strip may be short.
// integers: int8 with a scale for each group; offsets: the sum of a group's integers times
// -code(0), which turns a sum over codes into one over levels; -1 stands for code(0) where every
// group has a zero point of its own. Both lie as [strip][group][row].
struct Rows {
  const int8_t* integers;
  const float* floats;
  const uint32_t* pairs;  // of bf16: [strip][depth / 2][row]
  const int32_t* offsets;
  const float* scales;
};

inline int32_t offset_factor(WeightFormat format) {
  return format == WeightFormat::kInt8 ? -128 : format == WeightFormat::kInt4 ? -8 : -1;
}

using Bytes = int8_t __attribute__((vector_size(16)));

// Nearest integers, half to even, their low bytes, and all lanes in one.
struct PlainRounding {
  static lanes::I round(lanes::F x) { return lanes::nearest_integers(x); }
  static Bytes narrow(lanes::I x) { return __builtin_convertvector(x, Bytes); }
  static uint32_t largest(lanes::U x) {
    uint32_t result = 0;
    for (int i = 0; i < lanes::kLanes; ++i) result = x[i] > result ? x[i] : result;
    return result;
  }
  static int32_t total(lanes::I x) {
    int32_t result = 0;
    for (int i = 0; i < lanes::kLanes; ++i) result += x[i];
    return result;
  }
};

// The largest magnitude, at least 1e-30; NaN where one is not finite. Inlined: out of line gcc 12
// warns about its own intrinsics.
template <typename Rounding, typename T>
LLMOS_INLINE float largest_magnitude(const T* x, int64_t count) {
  using lanes::U;
  U most = {};  // bits of |x|: integer order is float order, with inf and NaN on top
  for (int64_t i = 0; i < count; i += lanes::kLanes) {
    const U magnitude = lanes::as_bits(lanes::load(x + i, count - i)) & 0x7fffffffu;
    most = magnitude > most ? magnitude : most;
  }
  const uint32_t largest = Rounding::largest(most);
  if (largest >= 0x7f800000) return float_of(0x7fc00000);
  return float_of(largest) < 1e-30f ? 1e-30f : float_of(largest);
}

// One row into its place in a strip: `out`, `offsets` and `scales` are its first elements there.
template <typename Rounding, typename T>
void quantize_row(const T* x, const QuantMatmul& call, const Plan& plan, int8_t* out,
                  int32_t* offsets, float* scales) {
  using lanes::I;
  const int64_t k = call.weight.k;
  const int32_t factor = offset_factor(call.weight.format);
  for (int64_t group = 0; group < plan.groups; ++group) {
    // a group is a multiple of 32, or the whole row; the last one goes on with zeros
    const int64_t begin = group * call.weight.group_size;
    const bool last = group + 1 == plan.groups;
    const int64_t end = last ? k : begin + call.weight.group_size;
    const float amax = largest_magnitude<Rounding>(x + begin, end - begin);
    const bool finite = amax == amax;
    const float inverse = 127.0f / amax;

    I sum = {};
    for (int64_t i = begin; i < (last ? plan.depth : end); i += lanes::kLanes) {
      I integers = {};
      if (i < end && finite) integers = Rounding::round(lanes::load(x + i, end - i) * inverse);
      const Bytes bytes = Rounding::narrow(integers);
      for (int j = 0; j < lanes::kLanes; j += 4)
        std::memcpy(out + (i + j) * plan.strip, reinterpret_cast<const char*>(&bytes) + j, 4);
      sum += integers;
    }
    offsets[group * plan.strip] = Rounding::total(sum) * factor;
    scales[group * plan.strip] = amax / 127.0f;
  }
}

// One row of floats into its place, as `make` makes them of those in x.
template <typename T, typename Make>
void float_row(const T* x, int64_t k, const Plan& plan, float* out, Make make) {
  for (int64_t i = 0; i < plan.depth; i += lanes::kLanes) {
    lanes::F values = {};
    if (i < k) values = make(lanes::load(x + i, k - i));
    for (int j = 0; j < lanes::kLanes; ++j) out[(i + j) * plan.strip] = values[j];
  }
}

// The nearest numbers of e4m3, half to even, of |x| <= 464; NaN gives anything.
inline lanes::F nearest_e4m3(lanes::F x) {
  asm("" : "+m"(x));  // as in nearest_integers
  const lanes::U bits = lanes::as_bits(x);
  const lanes::F normal = lanes::as_float((bits + 0x7ffff + (bits >> 20 & 1)) & 0xfff00000u);
  // below the normal ones they are 2^-9 apart, as fp32's are from 2^14 on
  const lanes::F subnormal = (x + 0x1.8p14f) - 0x1.8p14f;
  return lanes::absolute(x) < 0x1p-6f ? subnormal : normal;
}

// As `float_row`, rounded to e4m3 with one scale.
template <typename Rounding, typename T>
void e4m3_row(const T* x, int64_t k, const Plan& plan, float* out) {
  const float amax = largest_magnitude<Rounding>(x, k);
  const float inverse = 448.0f / amax, scale = amax / 448.0f;
  float_row(x, k, plan, out,
            [=](lanes::F values) { return nearest_e4m3(values * inverse) * scale; });
}

inline void pair_row(const lanes::bf16* x, int64_t k, const Plan& plan, uint32_t* out) {
  for (int64_t i = 0; i < plan.depth; i += 2) {
    const uint32_t lower = i < k ? x[i].bits : 0, upper = i + 1 < k ? x[i + 1].bits : 0;
    out[i / 2 * plan.strip] = lower | upper << 16;
  }
}

}  // namespace
}  // namespace llmos
