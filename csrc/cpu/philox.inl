// The dropout bits of llmos_fast/dropout.py: Philox-4x32, 7 rounds, sixteen counters at a time.
// multiply_even(a, b), 32 x 32 -> 64 bits of the even lanes, comes from the file that includes
// this: the compiler finds the instruction only by name, and its 64-bit product is four times as
// slow.

// Bits of the 64 columns from `column`, a multiple of 4, in row `row`.
LLMOS_INLINE void random_bits(uint64_t seed, uint64_t row, uint32_t column, U* words) {
  for (int half = 0; half < 2; ++half) {
    // each word is the lower half of 64 bits: a product reads no more, so the rest may be anything
    const L counters = {0, 4, 1, 5, 2, 6, 3, 7};  // as the shuffles below need them
    L c0 = counters + ((column >> 2) + 8 * half), c1 = L{} + row, c2 = L{} + (row >> 32), c3 = {};
    uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
    for (int round = 0; round < 7; ++round) {
      const L product0 = multiply_even((U)c0, U{} + 0xD2511F53u);
      const L product1 = multiply_even((U)c2, U{} + 0xCD9E8D57u);
      c0 = (product1 >> 32) ^ c1 ^ uint64_t(k0);
      c1 = product1;
      c2 = (product0 >> 32) ^ c3 ^ uint64_t(k1);
      c3 = product0;
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
    // word w of counter i belongs to column 4 i + w: a 16 x 4 transposition
    const U even = {0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30};
    const L low = (L)__builtin_shuffle((U)c0, (U)c1, even);
    const L high = (L)__builtin_shuffle((U)c2, (U)c3, even);
    words[2 * half] = (U)__builtin_shuffle(low, high, L{0, 8, 2, 10, 4, 12, 6, 14});
    words[2 * half + 1] = (U)__builtin_shuffle(low, high, L{1, 9, 3, 11, 5, 13, 7, 15});
  }
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
