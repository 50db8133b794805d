// What products read: fp32, or pairs of bf16 where the CPU multiplies these; rows,
// columns and results, laid out so that multiply streams them.

// What the products read of a T, and how many elements of T that is.
template <typename T>
struct OperandOf {
  using Type = float;
};
#if defined(LLMOS_BF16_DOT)
template <>
struct OperandOf<bf16> {
  using Type = Pair;
};
#endif
template <typename E>
constexpr int64_t elements_in = 1;
template <>
constexpr int64_t elements_in<Pair> = 2;

LLMOS_INLINE int64_t count_of(int64_t elements, int64_t per) { return (elements + per - 1) / per; }

// 16 pairs from x on, of which `count` elements exist; the others are 0.
LLMOS_INLINE U pairs_along(const bf16* x, int64_t count) {
  U pairs = {};
  // of a length that the compiler does not know it is a call, 3 times as slow as what it copies
  if (count >= 2 * kLanes)
    __builtin_memcpy(&pairs, x, sizeof pairs);
  else
    __builtin_memcpy(&pairs, x, count * sizeof(bf16));
  return pairs;
}

// Of pairs that are pairs already.
LLMOS_INLINE U pairs_along(const Pair* x, int64_t count) {
  U pairs = {};
  if (count >= kLanes)
    __builtin_memcpy(&pairs, x, sizeof pairs);
  else
    __builtin_memcpy(&pairs, x, count * sizeof(Pair));
  return pairs;
}

// 16 pairs of what the rows `low` and `high` hold in a column.
LLMOS_INLINE U pairs_across(F low, F high, const bf16*) {
  return as_bits(low) >> 16 | as_bits(high);
}

#if defined(LLMOS_BF16_DOT)
// fp32 is rounded on the way.
LLMOS_INLINE U pairs_along(const float* x, int64_t count) {
  const F first = load(x, count), second = count > kLanes ? load(x + kLanes, count - kLanes) : F{};
  return (U)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
}

LLMOS_INLINE U pairs_across(F low, F high, const float*) {
  using W = uint16_t __attribute__((vector_size(64)));
  const W both = (W)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
  return (U)__builtin_shuffle(both,
                              W{0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31});
}
#endif

// 16 operands from x on, of which `count` elements exist; the others are 0.
template <typename E, typename T>
LLMOS_INLINE auto load_operands(const T* x, int64_t count) {
  if constexpr (elements_in<E> == 1)
    return load(x, count);
  else
    return pairs_along(x, count);
}

// Short rows that lie far apart: no prefetcher of a CPU follows them (19 instead of 12 GB/s).
template <int rows, typename T>
LLMOS_INLINE void prefetch_rows(const T* x, int64_t row_stride) {
#pragma GCC unroll 16
  for (int row = 0; row < rows; ++row) __builtin_prefetch(x + row * row_stride, 0, 2);
}
constexpr int64_t kRowsAhead = 16;

// `rows` rows of x, each `columns` long, times `scale`, padded with zeros to `width`.
template <typename T>
LLMOS_INLINE void gather_rows(const T* x, int64_t row_stride, int64_t rows, int64_t columns,
                              float scale, float* out, int64_t width) {
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t i = 0; i < width; i += kLanes)
      store(out + row * width + i,
            i < columns ? load(x + row * row_stride + i, columns - i) * scale : F{});
}

// Pairs of bf16 take no scale: they would be rounded once more.
LLMOS_INLINE void gather_rows(const bf16* x, int64_t row_stride, int64_t rows, int64_t columns,
                              float, Pair* out, int64_t width) {
  for (int64_t row = 0; row < rows; ++row) {
    __builtin_memset(out + row * width, 0, width * sizeof(Pair));
    __builtin_memcpy(out + row * width, x + row * row_stride, columns * sizeof(bf16));
  }
}

// 16 operands whose k is the first row of x (and the second): `rows` and `columns` of x exist, the
// others are 0.
template <typename E, typename T>
LLMOS_INLINE auto load_factor(const T* x, int64_t row_stride, int64_t rows, int64_t columns) {
  if constexpr (elements_in<E> == 1) {
    return load(x, columns);
  } else {
    const F low = load(x, columns), high = rows > 1 ? load(x + row_stride, columns) : F{};
    return pairs_across(low, high, x);
  }
}

// The rows as the second factor of a product whose k they are: panels, b_panel apart.
template <typename E, typename T>
LLMOS_INLINE void gather_factor(const T* x, int64_t row_stride, int64_t rows, int64_t columns,
                                E* out, int64_t b_panel) {
  for (int64_t row = 0; row < rows; row += elements_in<E>, out += kPanel)
    for (int64_t i = 0; i < columns; i += kLanes) {
      prefetch_rows<elements_in<E>>(x + (row + kRowsAhead) * row_stride + i, row_stride);
      const auto vector =
          load_factor<E>(x + row * row_stride + i, row_stride, rows - row, columns - i);
      __builtin_memcpy(out + i / kPanel * b_panel + i % kPanel, &vector, 64);
    }
}

// Number i and the 15 after it as the first factor of a product whose k they are.
LLMOS_INLINE void store_operands(float* out, int64_t i, F x) { store(out + i, x); }

#if defined(LLMOS_BF16_DOT)
LLMOS_INLINE void store_operands(Pair* out, int64_t i, F x) {
  const auto narrow = _mm512_cvtneps_pbh((__m512)x);
  __builtin_memcpy(out + i / 2, &narrow, sizeof narrow);
}
#endif

// The same of the elements_in<E> rows that are one k.
LLMOS_INLINE void store_rows(float* out, const F* x) { store(out, x[0]); }

#if defined(LLMOS_BF16_DOT)
LLMOS_INLINE void store_rows(Pair* out, const F* x) {
  const U pairs = pairs_across(x[0], x[1], static_cast<const float*>(nullptr));
  __builtin_memcpy(out, &pairs, sizeof pairs);
}
#endif

// x[i][l] and x[l][i] change places where i and l differ in the bit `distance`.
#define LLMOS_UPPER(l, distance) ((l) & (distance) ? 16 + (l) - (distance) : (l))
#define LLMOS_LOWER(l, distance) ((l) & (distance) ? 16 + (l) : (l) + (distance))
#define LLMOS_EXCHANGE(x, d)                                                   \
  for (int i = 0; i < kLanes; ++i)                                             \
    if (!(i & (d))) {                                                          \
      const auto a = x[i], b = x[i + (d)];                                     \
      x[i] = __builtin_shufflevector(a, b, LLMOS_LANES(LLMOS_UPPER, d));       \
      x[i + (d)] = __builtin_shufflevector(a, b, LLMOS_LANES(LLMOS_LOWER, d)); \
    }

// The rows as the columns of a second factor, operand by operand, panel after panel; whole vectors
// are written.
template <typename E, typename T>
LLMOS_INLINE void gather_columns(const T* x, int64_t row_stride, int64_t rows, int64_t columns,
                                 E* out) {
  constexpr int64_t per = elements_in<E>;
  const int64_t depth = count_of(columns, per);
  for (int64_t row = 0; row < rows; row += kLanes)
    for (int64_t i = 0; i < columns; i += per * kLanes) {
      decltype(load_operands<E>(x, 0)) square[kLanes];
      prefetch_rows<kLanes>(x + (row + kLanes) * row_stride + i, row_stride);
#pragma GCC unroll 16
      for (int lane = 0; lane < kLanes; ++lane)
        square[lane] = load_operands<E>(x + (row + lane) * row_stride + i,
                                        row + lane < rows ? columns - i : 0);
#pragma GCC unroll 16
      LLMOS_EXCHANGE(square, 8)
#pragma GCC unroll 16
      LLMOS_EXCHANGE(square, 4)
#pragma GCC unroll 16
      LLMOS_EXCHANGE(square, 2)
#pragma GCC unroll 16
      LLMOS_EXCHANGE(square, 1)
      const int64_t n = count_of(columns - i, per);
      for (int64_t lane = 0; lane < kLanes && lane < n; ++lane)
        __builtin_memcpy(
            out + row / kPanel * kPanel * depth + (i / per + lane) * kPanel + row % kPanel,
            &square[lane], 64);
    }
}
