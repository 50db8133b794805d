// Products of few queries with rows of a cache, read where they lie: the tiles of
// attention_decode.inl.

constexpr int64_t kUnitKeys = 256;  // and floats from a row of scores to the next
// Queries of a tile, and its sums, which with what they are computed from fill the registers.
constexpr int kQueries = kRegisters == 1 ? 4 : 2, kSums = kRegisters == 1 ? 16 : 8 / kRegisters;

constexpr int smaller(int a, int b) { return a < b ? a : b; }

// Rows of memory that are wanted later: each step asks for the lines that lie where it reads now,
// so that requests come as evenly as the arithmetic.
struct Ahead {
  const char* rows;
  int64_t stride;
  void fetch(int64_t row, int64_t byte) const {
    if (byte % 64 == 0) __builtin_prefetch(rows + row * stride + byte, 0, 2);
  }
  Ahead from(int64_t row, int64_t byte) const { return {rows + row * stride + byte, stride}; }
};

// sum += a b, where gcc keeps sums in registers.
LLMOS_INLINE void add_product(R (&sum)[kRegisters], F a, F b) {
  R x[kRegisters], y[kRegisters];
  __builtin_memcpy(x, &a, sizeof a);
  __builtin_memcpy(y, &b, sizeof b);
#pragma GCC unroll 4
  for (int i = 0; i < kRegisters; ++i) multiply_add(sum[i], x[i], y[i]);
}
#if defined(LLMOS_BF16_DOT)
LLMOS_INLINE void add_product(R (&sum)[kRegisters], U a, U b) { multiply_add(sum[0], a, b); }
#endif
LLMOS_INLINE F as_vector(const R (&sum)[kRegisters]) {
  F x;
  __builtin_memcpy(&x, sum, sizeof x);
  return x;
}

// Products of `queries` rows, `width` operands each, with 16 / queries keys: rows of `scores`.
template <int queries, typename E, typename C>
LLMOS_INLINE void multiply_keys(const E* query, int64_t width, const C* keys, int64_t stride,
                                Ahead ahead, float* scores) {
  // more than 8 rows of keys have no registers for their addresses
  constexpr int count = kLanes / queries, at_once = smaller(kSums / queries, 8);
  F sums[kLanes];
#pragma GCC unroll 16
  for (int first = 0; first < count; first += at_once) {
    R part[queries * at_once][kRegisters] = {};
    for (int64_t j = 0; j < width; j += kLanes) {
      decltype(load_operands<E>(query, kLanes)) of_query[queries];
#pragma GCC unroll 4
      for (int q = 0; q < queries; ++q) __builtin_memcpy(&of_query[q], query + q * width + j, 64);
#pragma GCC unroll 8
      for (int i = 0; i < at_once; ++i) {
        const auto key = load_operands<E>(keys + (first + i) * stride + j * elements_in<E>, 64);
        ahead.fetch(first + i, j * elements_in<E> * sizeof(C));
#pragma GCC unroll 4
        for (int q = 0; q < queries; ++q) add_product(part[q * at_once + i], of_query[q], key);
      }
    }
#pragma GCC unroll 4
    for (int q = 0; q < queries; ++q)
#pragma GCC unroll 8
      for (int i = 0; i < at_once; ++i)
        sums[q * count + first + i] = as_vector(part[q * at_once + i]);
  }
  const F products = lane_sums(sums);
#pragma GCC unroll 4
  for (int q = 0; q < queries; ++q)
    __builtin_memcpy(scores + q * kUnitKeys, reinterpret_cast<const float*>(&products) + q * count,
                     count * sizeof(float));
}

// out[q] += sum_k weights[q][k] values[k] over n rows of values; rows of weights are kUnitKeys
// floats apart.
template <int queries, int vectors, typename E, typename C>
LLMOS_INLINE void add_weighted_columns(int64_t n, const E* weights, const C* values, int64_t stride,
                                       Ahead ahead, float* out, int64_t out_stride) {
  R sums[queries * vectors][kRegisters];
#pragma GCC unroll 16
  for (int i = 0; i < queries * vectors; ++i)
    __builtin_memcpy(sums[i], out + i / vectors * out_stride + i % vectors * kLanes, 64);
  const auto add = [&](int64_t k, int64_t rows) __attribute__((always_inline)) {
    decltype(load_operands<E>(values, kLanes)) row[vectors];
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) {
      row[v] = load_factor<E>(values + k * stride + v * kLanes, stride, rows, kLanes);
      for (int i = 0; i < elements_in<E>; ++i) ahead.fetch(k + i, v * kLanes * sizeof(C));
    }
#pragma GCC unroll 4
    for (int q = 0; q < queries; ++q) {
      const auto weight = weights[q * kUnitKeys + k / elements_in<E>] - decltype(row[0] - row[0]){};
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) add_product(sums[q * vectors + v], weight, row[v]);
    }
  };
  int64_t k = 0;
  for (; k + elements_in<E> <= n; k += elements_in<E>) add(k, elements_in<E>);
  if (k < n) add(k, n - k);
#pragma GCC unroll 16
  for (int i = 0; i < queries * vectors; ++i)
    __builtin_memcpy(out + i / vectors * out_stride + i % vectors * kLanes, sums[i], 64);
}

template <int queries, typename E, typename C>
LLMOS_INLINE void add_weighted_rows(int64_t n, const E* weights, const C* values, int64_t stride,
                                    int64_t width, Ahead ahead, float* out, int64_t out_stride) {
  constexpr int vectors = smaller(kSums / queries, 4);
  int64_t j = 0;
  for (; j + vectors * kLanes <= width; j += vectors * kLanes)
    add_weighted_columns<queries, vectors>(n, weights, values + j, stride,
                                           ahead.from(0, j * sizeof(C)), out + j, out_stride);
  for (; j < width; j += kLanes)
    add_weighted_columns<queries, 1>(n, weights, values + j, stride, ahead.from(0, j * sizeof(C)),
                                     out + j, out_stride);
}
