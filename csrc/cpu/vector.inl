// Sixteen fp32 lanes in the compiler's own vector type: one zmm, two ymm or four xmm registers,
// whatever the target region that includes this file has.

constexpr int kLanes = 16;
using F = float __attribute__((vector_size(64)));
using I = int32_t __attribute__((vector_size(64)));
using U = uint32_t __attribute__((vector_size(64)));
using L = uint64_t __attribute__((vector_size(64)));
using H = uint16_t __attribute__((vector_size(32)));
using B = int8_t __attribute__((vector_size(16)));

#define LLMOS_INLINE static inline __attribute__((always_inline))

struct bf16 {
  uint16_t bits;
};

LLMOS_INLINE F splat(float x) { return x - F{}; }
LLMOS_INLINE F as_float(U x) { return (F)x; }
LLMOS_INLINE U as_bits(F x) { return (U)x; }
LLMOS_INLINE F select(I condition, F yes, F no) { return condition ? yes : no; }
LLMOS_INLINE F maximum(F a, F b) { return select(a > b, a, b); }
LLMOS_INLINE F absolute(F x) { return as_float(as_bits(x) & 0x7fffffffu); }

LLMOS_INLINE F load(const float* p) {
  F x;
  __builtin_memcpy(&x, p, sizeof x);
  return x;
}

#if defined(LLMOS_AVX512)  // gcc 12 converts each half by itself: 5 instructions for 1
LLMOS_INLINE U widen(H x) { return (U)_mm512_cvtepu16_epi32((__m256i)x); }
LLMOS_INLINE H narrow(U x) { return (H)_mm512_cvtepi32_epi16((__m512i)x); }
#else
LLMOS_INLINE U widen(H x) { return __builtin_convertvector(x, U); }
LLMOS_INLINE H narrow(U x) { return __builtin_convertvector(x, H); }
#endif

LLMOS_INLINE F load(const bf16* p) {
  H x;
  __builtin_memcpy(&x, p, sizeof x);
  return as_float(widen(x) << 16);
}

LLMOS_INLINE void store(float* p, F x) { __builtin_memcpy(p, &x, sizeof x); }

LLMOS_INLINE H round_bf16(F x) {
  U bits = as_bits(x);
  U rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  // rounding would carry some NaN over to zero
  rounded = (x != x) ? (U{} + 0x7fc0u) : rounded;
  return narrow(rounded);
}

LLMOS_INLINE void store(bf16* p, F x) {
  H bits = round_bf16(x);
  __builtin_memcpy(p, &bits, sizeof bits);
}

// The first n < kLanes elements; the other lanes are 0.
template <typename T>
LLMOS_INLINE F load(const T* p, int64_t n) {
  if (n >= kLanes) return load(p);
  T lanes[kLanes] = {};
  __builtin_memcpy(lanes, p, n * sizeof(T));
  return load(lanes);
}

template <typename T>
LLMOS_INLINE void store(T* p, F x, int64_t n) {
  if (n >= kLanes) return store(p, x);
  T lanes[kLanes];
  store(lanes, x);
  __builtin_memcpy(p, lanes, n * sizeof(T));
}

// A value as it will be read back from a tensor of type T.
template <typename T>
LLMOS_INLINE F rounded(F x) {
  T lanes[kLanes];
  store(lanes, x);
  return load(lanes);
}
template <>
inline __attribute__((always_inline)) F rounded<float>(F x) {
  return x;
}

// Nearest integers, half to even, of |x| < 2^22.
LLMOS_INLINE I nearest_integers(F x) {
  asm("" : "+m"(x));  // a product before it is rounded by itself, not in one step with this sum
  return (I)(x + 12582912.0f) - 0x4b400000;  // 1.5 * 2^23 has no bits for fractions
}

// Indices of shuffles for each lane l: what differs in the bit `distance` comes from the other one.
#define LLMOS_LANES(f, d)                                                                   \
  f(0, d), f(1, d), f(2, d), f(3, d), f(4, d), f(5, d), f(6, d), f(7, d), f(8, d), f(9, d), \
      f(10, d), f(11, d), f(12, d), f(13, d), f(14, d), f(15, d)
#define LLMOS_ACROSS(l, distance) ((l) ^ (distance))
#define LLMOS_SWAPPED(x, d) __builtin_shufflevector(x, x, LLMOS_LANES(LLMOS_ACROSS, d))

LLMOS_INLINE float sum(F x) {  // pairwise: the error grows with log2(lanes)
  x += LLMOS_SWAPPED(x, 8);
  x += LLMOS_SWAPPED(x, 4);
  x += LLMOS_SWAPPED(x, 2);
  return (x + LLMOS_SWAPPED(x, 1))[0];
}

// Lane l: a[l] + a[l + distance] where l has no such bit, else b[l] + b[l - distance].
#define LLMOS_FOLD_OTHER(l, distance) ((l) & (distance) ? 16 + (l) - (distance) : (l) + (distance))
#define LLMOS_FOLD_SAME(l, distance) ((l) & (distance) ? 16 + (l) : (l))
#define LLMOS_FOLD(a, b, d)                                         \
  (__builtin_shufflevector(a, b, LLMOS_LANES(LLMOS_FOLD_SAME, d)) + \
   __builtin_shufflevector(a, b, LLMOS_LANES(LLMOS_FOLD_OTHER, d)))

// Lane l is the sum of the lanes of x[l].
LLMOS_INLINE F lane_sums(F (&x)[kLanes]) {
  for (int i = 0; i < 8; ++i) x[i] = LLMOS_FOLD(x[i], x[i + 8], 8);
  for (int i = 0; i < 4; ++i) x[i] = LLMOS_FOLD(x[i], x[i + 4], 4);
  for (int i = 0; i < 2; ++i) x[i] = LLMOS_FOLD(x[i], x[i + 2], 2);
  return LLMOS_FOLD(x[0], x[1], 1);
}

// Lane l is the largest lane of x[l].
#define LLMOS_FOLD_MAXIMUM(a, b, d)                                       \
  maximum(__builtin_shufflevector(a, b, LLMOS_LANES(LLMOS_FOLD_SAME, d)), \
          __builtin_shufflevector(a, b, LLMOS_LANES(LLMOS_FOLD_OTHER, d)))
LLMOS_INLINE F lane_maxima(F (&x)[kLanes]) {
  for (int i = 0; i < 8; ++i) x[i] = LLMOS_FOLD_MAXIMUM(x[i], x[i + 8], 8);
  for (int i = 0; i < 4; ++i) x[i] = LLMOS_FOLD_MAXIMUM(x[i], x[i + 4], 4);
  for (int i = 0; i < 2; ++i) x[i] = LLMOS_FOLD_MAXIMUM(x[i], x[i + 2], 2);
  return LLMOS_FOLD_MAXIMUM(x[0], x[1], 1);
}

LLMOS_INLINE float maximum(F x) {
  x = maximum(x, LLMOS_SWAPPED(x, 8));
  x = maximum(x, LLMOS_SWAPPED(x, 4));
  x = maximum(x, LLMOS_SWAPPED(x, 2));
  return maximum(x, LLMOS_SWAPPED(x, 1))[0];
}

LLMOS_INLINE F first_lanes(F x, int64_t n, float other) {
  const I index = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  return select(index < (I{} + int32_t(n < kLanes ? n : kLanes)), x, splat(other));
}

LLMOS_INLINE F exponential_near_0(F r) {  // |r| <= log(2) / 2
  F p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  return p * r * r + r + 1.0f;
}

// exp(x) within 2 ulp; 0 below -87.3 (no subnormals), infinity above 88.7.
#if defined(LLMOS_AVX512)  // from files whose target region has it
LLMOS_INLINE F exponential(F x) {
  // min gives its second operand where one is NaN
  const F top = (F)_mm512_min_ps((__m512)splat(89.0f), (__m512)x);
  const F n = (F)_mm512_roundscale_ps((__m512)(top * 1.44269504f), _MM_FROUND_TO_NEAREST_INT);
  const F r = (top - n * 0.693359375f) - n * -2.12194440e-4f;
  const F p = exponential_near_0(r);
  const __mmask16 normal = _mm512_cmp_ps_mask((__m512)x, (__m512)splat(-87.3f), _CMP_NLT_UQ);
  return (F)_mm512_maskz_scalef_ps(normal, (__m512)p, (__m512)n);
}
#else
LLMOS_INLINE F exponential(F x) {
  const F clamped =
      select(x < splat(-87.3f), splat(-87.3f), select(x > splat(88.72f), splat(88.72f), x));
  const F magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const F shifted = clamped * 1.44269504f + magic;
  const F n = shifted - magic;
  const F r = (clamped - n * 0.693359375f) - n * -2.12194440e-4f;
  const F p = exponential_near_0(r);
  // 2^n in two steps, because n = 128 has no fp32 of its own
  const I whole = __builtin_convertvector(n, I);
  const I half = whole >> 1;
  const F scaled = p * (F)((half + 127) << 23) * (F)((whole - half + 127) << 23);
  const F result = select(x < splat(-87.3f), splat(0.0f),
                          select(x > splat(88.72f), splat(__builtin_inff()), scaled));
  return select(x != x, x, result);
}
#endif

LLMOS_INLINE F power_of_2_near_0(F r) {  // |r| <= 1/2
  F p = splat(1.3264727197e-3f);
  p = p * r + 9.6715126396e-3f;
  p = p * r + 5.5507337433e-2f;
  p = p * r + 2.4022242085e-1f;
  p = p * r + 6.9314697760e-1f;
  return p * r + 1.0f;
}

// 2^x within 1.7e-7 of it for x up to 127; 0 below -125.
#if defined(LLMOS_AVX512)
LLMOS_INLINE F power_of_2(F x) {
  const F n = (F)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT);
  const F p = power_of_2_near_0(x - n);
  const __mmask16 normal = _mm512_cmp_ps_mask((__m512)x, (__m512)splat(-125.0f), _CMP_NLT_UQ);
  return (F)_mm512_maskz_scalef_ps(normal, (__m512)p, (__m512)n);
}
#else
LLMOS_INLINE F power_of_2(F x) {
  const F clamped = select(x < splat(-125.0f), splat(-125.0f), x);
  const F magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const F shifted = clamped + magic;
  const F p = power_of_2_near_0(clamped - (shifted - magic));
  const F result = as_float(as_bits(p) + (as_bits(shifted) << 23));
  return select(x != x, x, select(x < splat(-125.0f), F{}, result));
}
#endif

// log(x) within 2 ulp, of normal x > 0 or NaN (the polynomial is that of Cephes' logf).
LLMOS_INLINE F logarithm(F x) {
  // x = 2^n (1 + r), where 1 + r lies between the roots of 1/2 and 2
  constexpr uint32_t root = 0x3f3504f3u;
  const U shifted = as_bits(x) - root;
  const F n = __builtin_convertvector((I)shifted >> 23, F);
  const F r = as_float((shifted & 0x7fffffu) + root) - 1.0f, square = r * r;
  F p = splat(7.0376836292e-2f);
  p = p * r - 1.1514610310e-1f;
  p = p * r + 1.1676998740e-1f;
  p = p * r - 1.2420140846e-1f;
  p = p * r + 1.4249322787e-1f;
  p = p * r - 1.6668057665e-1f;
  p = p * r + 2.0000714765e-1f;
  p = p * r - 2.4999993993e-1f;
  p = p * r + 3.3333331174e-1f;
  const F small = p * r * square + n * -2.12194440e-4f - 0.5f * square;
  return select(x != x, x, r + small + n * 0.693359375f);
}

// 1 / (1 + e^-x), and 1 minus that without cancellation.
LLMOS_INLINE F sigmoid(F x, F* other) {
  const F e = exponential(-x), s = 1.0f / (1.0f + e);
  *other = select(x < splat(-80.0f), splat(1.0f), e * s);  // infinity times 0 is NaN
  return s;
}

LLMOS_INLINE F tangent_hyperbolic(F x) {
  const F y = absolute(x), square = x * x;
  // 1 - 2 / (e^2y + 1) cancels near 0: there the Taylor series, whose error at 0.3 is 1e-8
  F series = splat(-0.00886323552990219657f);
  series = series * square + 0.0218694885361552028f;
  series = series * square - 0.0539682539682539683f;
  series = series * square + 0.133333333333333333f;
  series = series * square - 0.333333333333333333f;
  series = x + x * square * series;
  const F far = 1.0f - 2.0f / (exponential(y + y) + 1.0f);
  return select(y < splat(0.3f), series, select(x < splat(0.0f), -far, far));
}

// Phi(x), the normal distribution, and its density. erfc(u) e^(u^2) / 2 is a polynomial of degree 9
// in 1 / (1 + u / 2), fitted here to a relative error of 2e-7 over [0, 10].
LLMOS_INLINE F normal_cdf(F x, F* density) {
  const F u = absolute(x) * 0.70710678118f;
  const F t = 1.0f / (1.0f + 0.5f * u);
  F p = splat(-0.02953447587788105f);
  p = p * t + 0.1422874629497528f;
  p = p * t - 0.24359990656375885f;
  p = p * t + 0.13903352618217468f;
  p = p * t - 0.01331279892474413f;
  p = p * t + 0.10134342312812805f;
  p = p * t + 0.12155188620090485f;
  p = p * t + 0.1411876529455185f;
  p = p * t + 0.14104321599006653f;
  const F gaussian = exponential(-0.5f * x * x);
  const F tail = p * t * gaussian;
  *density = gaussian * 0.3989422804f;
  return select(x < splat(0.0f), tail, 1.0f - tail);
}
