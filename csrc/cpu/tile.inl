// c[m, n] = (or +=) sum_k a[m, k] b[k, n] from blocks that lie in cache. `a` has any strides: its
// elements are broadcast. Rows of b and c are padded to whole vectors. kTileRows and kTileVectors
// come from the file that includes this: together with one row of b they fill the register file.
// Elements are fp32 or, where the CPU multiplies these, pairs of bf16 that follow one another in k.

LLMOS_INLINE void multiply_add(F& sum, F a, F b) { sum += a * b; }

using Pair = uint32_t;
#if defined(LLMOS_BF16_DOT)
LLMOS_INLINE U splat(Pair x) { return x + U{}; }
LLMOS_INLINE U load(const Pair* p) {
  U x;
  __builtin_memcpy(&x, p, sizeof x);
  return x;
}
LLMOS_INLINE void multiply_add(F& sum, U a, U b) {
  // not the intrinsic: gcc 12 copies its sum, at half the speed
  asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(b), "v"(a));
}
#endif

template <int rows, int vectors, typename E>
LLMOS_INLINE void multiply_tile(int64_t depth, const E* a, int64_t a_row, int64_t a_depth,
                                const E* b, int64_t b_row, float* c, int64_t c_row,
                                bool accumulate) {
  F sums[rows][vectors];
#pragma GCC unroll 16
  for (int m = 0; m < rows; ++m)
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v)
      sums[m][v] = accumulate ? load(c + m * c_row + v * kLanes) : F{};
  for (int64_t k = 0; k < depth; ++k) {
    decltype(load(b)) row[vectors];
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) row[v] = load(b + k * b_row + v * kLanes);
#pragma GCC unroll 16
    for (int m = 0; m < rows; ++m) {
      const auto element = splat(a[m * a_row + k * a_depth]);
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) multiply_add(sums[m][v], element, row[v]);
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < rows; ++m)
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) store(c + m * c_row + v * kLanes, sums[m][v]);
}

template <int vectors, typename E>
LLMOS_INLINE void multiply_columns(int64_t rows, int64_t depth, const E* a, int64_t a_row,
                                   int64_t a_depth, const E* b, int64_t b_row, float* c,
                                   int64_t c_row, bool accumulate) {
  int64_t m = 0;
  for (; m + kTileRows <= rows; m += kTileRows)
    multiply_tile<kTileRows, vectors>(depth, a + m * a_row, a_row, a_depth, b, b_row, c + m * c_row,
                                      c_row, accumulate);
  for (; m + 4 <= rows; m += 4)
    multiply_tile<4, vectors>(depth, a + m * a_row, a_row, a_depth, b, b_row, c + m * c_row, c_row,
                              accumulate);
  for (; m < rows; ++m)
    multiply_tile<1, vectors>(depth, a + m * a_row, a_row, a_depth, b, b_row, c + m * c_row, c_row,
                              accumulate);
}

template <typename E>
static void multiply_block(int64_t rows, int64_t columns, int64_t depth, const E* a, int64_t a_row,
                           int64_t a_depth, const E* b, int64_t b_row, float* c, int64_t c_row,
                           bool accumulate) {
  constexpr int64_t wide = kTileVectors * kLanes;
  int64_t n = 0;
  for (; n + wide <= round_up(columns, kLanes); n += wide)
    multiply_columns<kTileVectors>(rows, depth, a, a_row, a_depth, b + n, b_row, c + n, c_row,
                                   accumulate);
  for (; n < columns; n += kLanes)
    multiply_columns<1>(rows, depth, a, a_row, a_depth, b + n, b_row, c + n, c_row, accumulate);
}
