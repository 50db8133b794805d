// The dropout bits of llmos_fast/dropout.py: Philox-4x32, 7 rounds, sixteen counters at a time.
// multiply_even(a, b), 32 x 32 -> 64 bits of the even lanes, comes from the file that includes
// this: the compiler finds the instruction only by name, and its 64-bit product is four times as
// slow.

LLMOS_INLINE void multiply_wide(U x, uint32_t by, U* high, U* low) {
  const L even = multiply_even(x, U{} + by), odd = multiply_even((U)((L)x >> 32), U{} + by);
  *low = (U)((even & 0xffffffffull) | (odd << 32));
  *high = (U)((even >> 32) | (odd & ~0xffffffffull));
}

// Bits of the 64 columns from `column`, a multiple of 4, in row `row`.
LLMOS_INLINE void random_bits(uint64_t seed, uint64_t row, uint32_t column, U* words) {
  const U index = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  U c0 = index + (column >> 2), c1 = U{} + uint32_t(row), c2 = U{} + uint32_t(row >> 32), c3 = U{};
  uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
  for (int round = 0; round < 7; ++round) {
    U high0, low0, high1, low1;
    multiply_wide(c0, 0xD2511F53u, &high0, &low0);
    multiply_wide(c2, 0xCD9E8D57u, &high1, &low1);
    c0 = high1 ^ c1 ^ k0;
    c1 = low1;
    c2 = high0 ^ c3 ^ k1;
    c3 = low0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  // word w of counter i belongs to column 4 i + w: a 16 x 4 transposition
  const U low_pairs = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23};
  const U high_pairs = low_pairs + 8u;
  const U low_quads = {0, 1, 16, 17, 2, 3, 18, 19, 4, 5, 20, 21, 6, 7, 22, 23};
  const U high_quads = low_quads + 8u;
  const U a = __builtin_shuffle(c0, c1, low_pairs), b = __builtin_shuffle(c2, c3, low_pairs);
  const U c = __builtin_shuffle(c0, c1, high_pairs), d = __builtin_shuffle(c2, c3, high_pairs);
  words[0] = __builtin_shuffle(a, b, low_quads);
  words[1] = __builtin_shuffle(a, b, high_quads);
  words[2] = __builtin_shuffle(c, d, low_quads);
  words[3] = __builtin_shuffle(c, d, high_quads);
}

// Factors of `count` columns from `column`, a multiple of 4: 0 or dropout.scale. The buffer has
// room for `count` rounded up to 64.
LLMOS_INLINE void dropout_factors(const Dropout& dropout, int64_t row, int64_t column,
                                  int64_t count, float* factors) {
  const uint64_t seed = uint64_t(*dropout.seed);
  const uint32_t last_dropped = uint32_t(dropout.threshold - 1);  // threshold >= 1 where p > 0
  for (int64_t start = 0; start < count; start += 64) {
    U words[4];
    random_bits(seed, uint64_t(row), uint32_t(column + start), words);
    for (int i = 0; i < 4; ++i)
      store(factors + start + i * kLanes,
            select(words[i] > last_dropped, splat(dropout.scale), F{}));
  }
}

LLMOS_INLINE int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
