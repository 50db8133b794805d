// out = x weight^T + bias for few rows of x, at the speed of memory: a few rows of weight are read
// once, and meet all rows of x while they lie in cache.

// A tile: 4 rows of weight by as many of x as leave registers for both.
constexpr int kTileWeights = 4, kTileInputs = kRegisterLanes == kLanes ? 4 : 2;
#define LLMOS_MODULO(l, n) ((l) % (n))

LLMOS_INLINE R load_register(const bf16* x) {
  uint16_t __attribute__((vector_size(2 * kRegisterLanes))) lanes;
  __builtin_memcpy(&lanes, x, sizeof lanes);
  using Wide = uint32_t __attribute__((vector_size(4 * kRegisterLanes)));
  return (R)(__builtin_convertvector(lanes, Wide) << 16);
}

// A register of features from x on, of which n exist; the others are 0.
template <typename E, typename T>
LLMOS_INLINE auto load_features(const T* x, int64_t n) {
  if constexpr (elements_in<E> > 1) {
    return load_operands<E>(x, n);
  } else {
    if (n >= kRegisterLanes) return load_register(x);
    T lanes[kRegisterLanes] = {};
    __builtin_memcpy(lanes, x, n * sizeof(T));
    return load_register(lanes);
  }
}

// Adds the products of the n features from k on, at most a register of them, and asks for those of
// the next tile: a row of 3 KB ends before the CPU foresees it (8 rows: 22 GB/s, else 17).
template <int rows, typename E, typename T>
LLMOS_INLINE void add_products(const T* x, int64_t x_stride, const T* const* weight, int64_t ahead,
                               int64_t k, int64_t n, R (&sums)[rows][kTileWeights]) {
  decltype(load_features<E>(x, n)) columns[kTileWeights];
#pragma GCC unroll 4
  for (int c = 0; c < kTileWeights; ++c) {
    __builtin_prefetch(weight[c] + ahead + k);
    columns[c] = load_features<E>(weight[c] + k, n);
  }
#pragma GCC unroll 4
  for (int m = 0; m < rows; ++m) {
    const auto row = load_features<E>(x + m * x_stride, n);
#pragma GCC unroll 4
    for (int c = 0; c < kTileWeights; ++c) multiply_add(sums[m][c], row, columns[c]);
  }
}

// Lane m * kTileWeights + c: row m of x times weight[c]; the lanes of rows from `rows` on are 0.
template <int tile, typename T>
LLMOS_INLINE F linear_tile(int64_t rows, const T* x, int64_t x_stride, const T* const* weight,
                           int64_t ahead, int64_t features) {
  if constexpr (tile > 1)
    if (rows < tile) return linear_tile<tile - 1>(rows, x, x_stride, weight, ahead, features);
  using E = typename OperandOf<T>::Type;
  constexpr int64_t step = kRegisterLanes * elements_in<E>;
  R sums[tile][kTileWeights] = {};
  int64_t k = 0;
  for (; k + step <= features; k += step)
    add_products<tile, E>(x + k, x_stride, weight, ahead, k, step, sums);
  if (k < features) add_products<tile, E>(x + k, x_stride, weight, ahead, k, features - k, sums);
  F all[kLanes] = {};
#pragma GCC unroll 16
  for (int i = 0; i < tile * kTileWeights; ++i)
    __builtin_memcpy(&all[i], &sums[i / kTileWeights][i % kTileWeights], sizeof(R));
  return lane_sums(all);
}

// The rows of a tile stand a quarter of the weight apart: each thread then reads four streams that
// go on from tile to tile, where four rows that follow one another are one (bf16, rows of 1.5 KB:
// 35 instead of 23 GB/s).
template <typename T>
static void linear_rows_of(const LinearRows& call) {
  const T* bias = static_cast<const T*>(call.bias);
  const int64_t tiles = (call.columns + kTileWeights - 1) / kTileWeights;
#pragma omp parallel for schedule(static) if (call.columns * call.features > kWorthThreads)
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const T* weight[kTileWeights];
    float offsets[kLanes] = {};
    for (int c = 0; c < kTileWeights; ++c) {
      const int64_t column = tile + c * tiles;  // a short tile repeats a row
      weight[c] = static_cast<const T*>(call.weight) +
                  (column < call.columns ? column : tile) * call.weight_stride;
      if (bias && column < call.columns) offsets[c] = load(bias + column, 1)[0];
    }
    F offset = load(offsets, kLanes);
    offset = __builtin_shufflevector(offset, offset, LLMOS_LANES(LLMOS_MODULO, kTileWeights));
    for (int64_t row = 0; row < call.rows; row += kTileInputs) {
      const T* x = static_cast<const T*>(call.x) + row * call.x_stride;
      T* out = static_cast<T*>(call.out) + row * call.columns + tile;
      T sums[kLanes];
      store(sums, offset + linear_tile<kTileInputs>(call.rows - row, x, call.x_stride, weight,
                                                    call.weight_stride, call.features));
      for (int64_t m = 0; m < kTileInputs && m < call.rows - row; ++m)
        for (int64_t c = 0; c < kTileWeights && tile + c * tiles < call.columns; ++c)
          out[m * call.columns + c * tiles] = sums[m * kTileWeights + c];
    }
  }
}

static void linear_rows(const LinearRows& call) {
  call.type == DType::bf16 ? linear_rows_of<bf16>(call) : linear_rows_of<float>(call);
}
