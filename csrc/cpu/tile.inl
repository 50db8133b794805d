// c[m, n] = (or +=) sum_k a[m, k] b[k, n] from operands that lie in cache. `a` has any strides: its
// elements are broadcast. b lies in panels of kPanel columns: b[n / kPanel][k][n % kPanel]. Columns
// of b and c are padded to whole vectors, rows of a and c to whole steps of kRowStep. kTileRows and
// kTileVectors come from the file that includes this: with one row of b they fill the registers.
// Elements are fp32 or, where the CPU multiplies these, pairs of bf16 that follow one another in k.

constexpr int64_t kPanel = kTileVectors * kLanes;
constexpr int kRowStep = kTileRows / 3 > 0 ? kTileRows / 3 : 1;

// One register: gcc 12 keeps sums of several in memory (avx2: an eighth of the speed).
using R = float __attribute__((vector_size(4 * kRegisterLanes)));
constexpr int kRegisters = kLanes / kRegisterLanes;  // of a vector

LLMOS_INLINE R load_register(const float* x) {
  R lanes;
  __builtin_memcpy(&lanes, x, sizeof lanes);
  return lanes;
}
LLMOS_INLINE void store_register(float* x, R lanes) { __builtin_memcpy(x, &lanes, sizeof lanes); }
LLMOS_INLINE R splat_register(float x) { return x - R{}; }
LLMOS_INLINE void multiply_add(R& sum, R a, R b) { sum += a * b; }

using Pair = uint32_t;
#if defined(LLMOS_BF16_DOT)
LLMOS_INLINE U splat_register(Pair x) { return x + U{}; }
LLMOS_INLINE U load_register(const Pair* p) {
  U x;
  __builtin_memcpy(&x, p, sizeof x);
  return x;
}
LLMOS_INLINE void multiply_add(F& sum, U a, U b) {
  // not the intrinsic: gcc 12 copies its sum, at half the speed
  asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(b), "v"(a));
}
#endif

// sums += a b of a tile.
template <int rows, int registers, typename E>
LLMOS_INLINE void add_tile(int64_t depth, const E* a, int64_t a_row, int64_t a_depth, const E* b,
                           R (&sums)[rows][registers]) {
  for (int64_t k = 0; k < depth; ++k) {
    decltype(load_register(b)) row[registers];
#pragma GCC unroll 4
    for (int r = 0; r < registers; ++r) row[r] = load_register(b + k * kPanel + r * kRegisterLanes);
#pragma GCC unroll 16
    for (int m = 0; m < rows; ++m) {
      const auto element = splat_register(a[m * a_row + k * a_depth]);
#pragma GCC unroll 4
      for (int r = 0; r < registers; ++r) multiply_add(sums[m][r], element, row[r]);
    }
  }
}

template <int rows, int registers>
LLMOS_INLINE void load_tile(const float* c, int64_t c_row, bool exists,
                            R (&sums)[rows][registers]) {
#pragma GCC unroll 16
  for (int m = 0; m < rows; ++m)
#pragma GCC unroll 4
    for (int r = 0; r < registers; ++r)
      sums[m][r] = exists ? load_register(c + m * c_row + r * kRegisterLanes) : R{};
}

template <int rows, int registers>
LLMOS_INLINE void store_tile(float* c, int64_t c_row, const R (&sums)[rows][registers]) {
#pragma GCC unroll 16
  for (int m = 0; m < rows; ++m)
#pragma GCC unroll 4
    for (int r = 0; r < registers; ++r)
      store_register(c + m * c_row + r * kRegisterLanes, sums[m][r]);
}

template <int rows, int vectors, typename E>
LLMOS_INLINE void multiply_tile(int64_t depth, const E* a, int64_t a_row, int64_t a_depth,
                                const E* b, float* c, int64_t c_row, bool accumulate) {
  R sums[rows][vectors * kRegisters];
  load_tile(c, c_row, accumulate, sums);
  add_tile(depth, a, a_row, a_depth, b, sums);
  store_tile(c, c_row, sums);
}

template <int rows, typename E>
LLMOS_INLINE void multiply_panels(int64_t columns, int64_t depth, const E* a, int64_t a_row,
                                  int64_t a_depth, const E* b, int64_t b_panel, float* c,
                                  int64_t c_row, bool accumulate) {
  int64_t n = 0;
  for (; n + kPanel <= round_up(columns, kLanes); n += kPanel, b += b_panel)
    multiply_tile<rows, kTileVectors>(depth, a, a_row, a_depth, b, c + n, c_row, accumulate);
  for (; n < columns; n += kLanes, b += kLanes)
    multiply_tile<rows, 1>(depth, a, a_row, a_depth, b, c + n, c_row, accumulate);
}

// b's panels begin b_panel apart.
template <typename E>
static void multiply(int64_t rows, int64_t columns, int64_t depth, const E* a, int64_t a_row,
                     int64_t a_depth, const E* b, int64_t b_panel, float* c, int64_t c_row,
                     bool accumulate) {
  int64_t m = 0;
  for (; rows - m > 2 * kRowStep; m += kTileRows)
    multiply_panels<kTileRows>(columns, depth, a + m * a_row, a_row, a_depth, b, b_panel,
                               c + m * c_row, c_row, accumulate);
  if (rows - m > kRowStep)
    multiply_panels<2 * kRowStep>(columns, depth, a + m * a_row, a_row, a_depth, b, b_panel,
                                  c + m * c_row, c_row, accumulate);
  else if (rows > m)
    multiply_panels<kRowStep>(columns, depth, a + m * a_row, a_row, a_depth, b, b_panel,
                              c + m * c_row, c_row, accumulate);
}
