// New keys and values into their rows of a cache.

// One row of n numbers into a row of the cache; an int8 row's scale into *scale.
template <typename T, typename C>
LLMOS_INLINE void write_row(const T* x, int64_t n, C* out, float*) {
  for (int64_t i = 0; i < n; i += kLanes) store(out + i, load(x + i, n - i), n - i);
}

template <typename T>
LLMOS_INLINE void write_row(const T* x, int64_t n, int8* out, float* scale) {
  F largest = {}, invalid = {};
  for (int64_t i = 0; i < n; i += kLanes) {
    const F lanes = load(x + i, n - i);
    largest = maximum(largest, absolute(lanes));
    invalid += lanes * 0.0f;  // NaN where x is not finite, and so is then the scale
  }
  *scale = maximum(largest) / 127.0f + sum(invalid);
  const float factor = *scale > 0.0f ? 127.0f / maximum(largest) : 0.0f;
  for (int64_t i = 0; i < n; i += kLanes) {
    const I integers = nearest_integers(factor > 0.0f ? load(x + i, n - i) * factor : F{});
    for (int64_t lane = 0; lane < kLanes && i + lane < n; ++lane)
      out[i + lane].value = int8_t(integers[lane]);
  }
}

template <typename T, typename C>
static void cache_write_of(const CacheWrite& call) {
  const int64_t rows = call.batch * call.heads * call.seq_new;
  const int64_t capacity = call.page_size * call.pages_per_sequence;
#pragma omp parallel for schedule(static) if (rows * call.head_dim > kWorthThreads)
  for (int64_t index = 0; index < rows; ++index) {
    const int64_t i = index % call.seq_new, head = index / call.seq_new % call.heads;
    const int64_t batch = index / call.seq_new / call.heads;
    const int64_t length = clamp(call.lengths[batch], 0, capacity + call.seq_new);
    const int64_t position = length - call.seq_new + i;
    if (position < 0 || position >= capacity) continue;
    int64_t page = batch;
    if (call.block_table.data) {
      page = call.block_table[batch * call.pages_per_sequence + position / call.page_size];
      if (page < 0 || page >= call.pages) continue;
    }
    const auto at = [&](const Strides4& s, int64_t b, int64_t row) {
      return b * s.batch + head * s.head + row * s.row;
    };
    const int64_t row = position % call.page_size;
    write_row(static_cast<const T*>(call.key) + at(call.key_strides, batch, i), call.head_dim,
              static_cast<C*>(call.keys) + at(call.keys_strides, page, row),
              call.key_scale + at(call.key_scale_strides, page, row));
    write_row(static_cast<const T*>(call.value) + at(call.value_strides, batch, i), call.head_dim_v,
              static_cast<C*>(call.values) + at(call.values_strides, page, row),
              call.value_scale + at(call.value_scale_strides, page, row));
  }
}

static void cache_write(const CacheWrite& call) {
  const bool narrow = call.type == DType::bf16;
  if (call.cache_type == CacheType::int8)
    return narrow ? cache_write_of<bf16, int8>(call) : cache_write_of<float, int8>(call);
  narrow ? cache_write_of<bf16, bf16>(call) : cache_write_of<float, float>(call);
}
