// bias + activation over a row of results. Include it inside a target region: the loops are plain
// code, which the compiler vectorises for that region's instruction set.
#pragma once

namespace llmos {
namespace {

// exp to about 1 ulp: 2^n e^r, |r| <= ln(2) / 2. Saturates at e^-87.3 and e^88.
inline float exp_approximate(float x) {
  x = x < -87.3f ? -87.3f : x;
  x = x > 88.0f ? 88.0f : x;
  const float shifted = x * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: rounds to an integer
  const float n = shifted - 12582912.0f;
  float r = x - n * 0.693145752f;
  r = r - n * 1.42860677e-6f;
  float p = 1.98412698e-4f;
  p = p * r + 1.38888889e-3f;
  p = p * r + 8.33333333e-3f;
  p = p * r + 4.16666667e-2f;
  p = p * r + 1.66666667e-1f;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  return p * float_of((bits_of(shifted) - bits_of(12582912.0f) + 127) << 23);
}

// erf by two minimax polynomials that meet at 475/512 (N. Juffa), about 1 ulp.
inline float erf_approximate(float x) {
  const float t = x < 0.0f ? -x : x;
  const float s = x * x;
  float large = -1.72853470e-5f * t + 3.83197126e-4f;
  const float high = -3.88396438e-3f * t + 2.42546219e-2f;
  large = large * s + high;
  large = large * t - 1.06777877e-1f;
  large = large * t - 6.34846687e-1f;
  large = large * t - 1.28717512e-1f;
  large = large * t - t;
  large = 1.0f - exp_approximate(t > 4.0f ? -30.0f : large);
  large = x < 0.0f ? -large : large;
  float small = -5.96761703e-4f;
  small = small * s + 4.99119423e-3f;
  small = small * s - 2.67681349e-2f;
  small = small * s + 1.12819925e-1f;
  small = small * s - 3.76125336e-1f;
  small = small * s + 1.28379166e-1f;
  small = small * x + x;
  return t > 0.927734375f ? large : small;
}

inline float sigmoid(float x) { return 1.0f / (1.0f + exp_approximate(-x)); }

template <Activation A>
inline float activate(float x) {
  // written so that NaN stays NaN
  const float positive = x < 0.0f ? 0.0f : x;
  switch (A) {
    case Activation::kRelu:
      return positive;
    case Activation::kRelu2:
      return positive * positive;
    case Activation::kGelu:
      return 0.5f * x * (1.0f + erf_approximate(x * 0.707106781f));
    case Activation::kGeluTanh:  // 0.5 (1 + tanh(u)) = sigmoid(2 u)
      return x * sigmoid(1.59576912f * (x + 0.044715f * x * x * x));
    case Activation::kSilu:
      return x * sigmoid(x);
    default:
      return x;
  }
}

template <Activation A, typename T>
void finish_row(const float* sums, const float* bias, int64_t count, T* out) {
  if (bias != nullptr)
    for (int64_t i = 0; i < count; ++i) store(&out[i], activate<A>(sums[i] + bias[i]));
  else
    for (int64_t i = 0; i < count; ++i) store(&out[i], activate<A>(sums[i]));
}

template <typename T>
void finish_row(Activation activation, const float* sums, const float* bias, int64_t count,
                T* out) {
  switch (activation) {
    case Activation::kNone:
      return finish_row<Activation::kNone>(sums, bias, count, out);
    case Activation::kRelu:
      return finish_row<Activation::kRelu>(sums, bias, count, out);
    case Activation::kRelu2:
      return finish_row<Activation::kRelu2>(sums, bias, count, out);
    case Activation::kGelu:
      return finish_row<Activation::kGelu>(sums, bias, count, out);
    case Activation::kGeluTanh:
      return finish_row<Activation::kGeluTanh>(sums, bias, count, out);
    case Activation::kSilu:
      return finish_row<Activation::kSilu>(sums, bias, count, out);
  }
}

}  // namespace
}  // namespace llmos
