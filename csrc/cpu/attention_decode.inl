// Few queries, a long cache: memory is read once, by units of (sequence, key head, kUnitRows of its
// queries, kUnitKeys of its keys), whose partial softmaxes are merged in the order of the keys.
// What a unit is depends on shapes alone, so results do not depend on the number of threads.

constexpr int64_t kUnitKeys = 256, kUnitRows = 64;

// Products of a query with 16 keys; as many at a time as there are registers for addresses and
// sums.
template <typename C>
LLMOS_INLINE F query_times_keys(const float* query, const C* keys, int64_t stride, int64_t width) {
  constexpr int at_once = kTileVectors > 1 ? 8 : 4;
  F sums[kLanes];
#pragma GCC unroll 4
  for (int first = 0; first < kLanes; first += at_once) {
    F part[at_once] = {};
    for (int64_t j = 0; j < width; j += kLanes) {
      const F q = load(query + j);
#pragma GCC unroll 16
      for (int i = 0; i < at_once; ++i) part[i] += q * load(keys + (first + i) * stride + j);
    }
#pragma GCC unroll 16
    for (int i = 0; i < at_once; ++i) sums[first + i] = part[i];
  }
  return lane_sums(sums);
}

// out[q] += sum_k weights[q][k] values[k] over n rows of values, for a few queries at once.
template <int queries, typename C>
LLMOS_INLINE void add_weighted_rows(int64_t n, const float* weights, int64_t weights_stride,
                                    const C* values, int64_t stride, int64_t width, float* out,
                                    int64_t out_stride) {
  constexpr int vectors = 4;
  int64_t j = 0;
  for (; j + vectors * kLanes <= width; j += vectors * kLanes) {
    F sums[queries][vectors];
#pragma GCC unroll 8
    for (int i = 0; i < queries * vectors; ++i)
      sums[i / vectors][i % vectors] =
          load(out + i / vectors * out_stride + j + i % vectors * kLanes);
    for (int64_t k = 0; k < n; ++k)
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) {
        const F row = load(values + k * stride + j + v * kLanes);
#pragma GCC unroll 2
        for (int q = 0; q < queries; ++q) sums[q][v] += weights[q * weights_stride + k] * row;
      }
#pragma GCC unroll 8
    for (int i = 0; i < queries * vectors; ++i)
      store(out + i / vectors * out_stride + j + i % vectors * kLanes,
            sums[i / vectors][i % vectors]);
  }
  for (; j < width; j += kLanes)
    for (int q = 0; q < queries; ++q) {
      F sums = load(out + q * out_stride + j);
      for (int64_t k = 0; k < n; ++k)
        sums += weights[q * weights_stride + k] * load(values + k * stride + j);
      store(out + q * out_stride + j, sums);
    }
}

LLMOS_INLINE int64_t clamp(int64_t x, int64_t low, int64_t high) {
  return x < low ? low : x > high ? high : x;
}

// Asks for part `index` of `count` of the 16 rows that the next step reads: all at once they would
// stop the loads of this one.
template <typename C>
LLMOS_INLINE void prefetch_rows(const C* rows, int64_t stride, int64_t columns, int64_t index,
                                int64_t count) {
  for (int64_t i = index * kLanes / count; i < (index + 1) * kLanes / count; ++i)
    for (int64_t j = 0; j < columns; j += 64 / sizeof(C))
      __builtin_prefetch(rows + (kLanes + i) * stride + j);
}

// One unit; rows of a key head are its queries' heads, each with seq_q queries.
struct DecodeUnit {
  const AttentionDecode& call;
  const int64_t batch, head_kv, row_begin, row_end, length;

  int64_t head(int64_t row) const {
    return head_kv * (call.heads_q / call.heads_kv) + row / call.seq_q;
  }
  int64_t position(int64_t row) const { return length - call.seq_q + row % call.seq_q; }
  int64_t first_key(int64_t row) const {
    const int64_t key = position(row) - call.window_left;
    return call.window_left < 0 || key < 0 ? 0 : key;
  }
  int64_t last_key(int64_t row) const { return clamp(position(row) + 1, 0, length); }

  int64_t page(int64_t key) const {
    if (!call.block_table.data) return batch;
    const int64_t index = batch * call.pages_per_sequence + key / call.page_size;
    return clamp(call.block_table[index], 0, call.pages - 1);
  }
  template <typename C>
  const C* rows(const void* cache, const Strides4& strides, int64_t key) const {
    return static_cast<const C*>(cache) + page(key) * strides.batch + head_kv * strides.head +
           key % call.page_size * strides.row;
  }
  // Of 16 keys from `key` on, `n` exist.
  F row_scales(const RowScale& scale, int64_t key, int64_t n) const {
    const float* first = scale.data + page(key) * scale.strides.batch +
                         head_kv * scale.strides.head + key % call.page_size * scale.strides.row;
    if (scale.strides.row == 1) return load(first, n);
    float lanes[kLanes] = {};
    for (int64_t i = 0; i < n; ++i) lanes[i] = first[i * scale.strides.row];
    return load(lanes);
  }
};

// Scores of one row for 16 keys from products; -inf where hidden.
LLMOS_INLINE F decode_scores(const DecodeUnit& unit, int64_t row, int64_t key, F products) {
  const AttentionDecode& call = unit.call;
  const F index = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  F scores = products;
  if (call.softcap > 0) scores = call.softcap * tangent_hyperbolic(scores / call.softcap);
  if (call.alibi) {
    const float slope = call.alibi[unit.batch * call.alibi_stride + unit.head(row)];
    scores -= slope * absolute(index + float(key - unit.position(row)));
  }
  const F hidden = splat(-__builtin_inff());
  const int64_t first = unit.first_key(row) - key, last = unit.last_key(row) - key;
  if (first > 0) scores = select(index < splat(float(first < 16 ? first : 16)), hidden, scores);
  if (last < 16) scores = select(index < splat(float(last < 0 ? 0 : last)), scores, hidden);
  return scores;
}

// The 16 rows from `rows` on, of which n exist, as fp32 padded with zeros to `width`.
template <typename C>
LLMOS_INLINE const float* widen_rows(const C* rows, int64_t stride, int64_t n, int64_t columns,
                                     int64_t width, float* out) {
  gather_rows(rows, stride, n, columns, 1.0f, out, width);
  for (int64_t i = n * width; i < kLanes * width; i += kLanes) store(out + i, F{});
  return out;
}

template <typename C>
constexpr bool is_fp32 = false;
template <>
constexpr bool is_fp32<float> = true;

// Partial softmax over keys [key_begin, key_end): for each row the largest score, the sum of the
// weights and, at partial + kLanes, their mixture of the values; rows are partial_stride apart.
template <typename C>
static void decode_unit(const DecodeUnit& unit, int64_t key_begin, int64_t key_end, float* partial,
                        int64_t partial_stride) {
  const AttentionDecode& call = unit.call;
  const int64_t head_dim = call.head_dim, head_dim_v = call.head_dim_v;
  const int64_t width = round_up(head_dim, kLanes), width_v = round_up(head_dim_v, kLanes);
  const int64_t rows = unit.row_end - unit.row_begin;
  int64_t first = key_end, last = key_begin;
  for (int64_t r = unit.row_begin; r < unit.row_end; ++r) {
    first = first < unit.first_key(r) ? first : unit.first_key(r);
    last = last > unit.last_key(r) ? last : unit.last_key(r);
  }
  key_begin = first > key_begin ? first / kLanes * kLanes : key_begin;
  key_end = last < key_end ? last : key_end;

  float* query = thread_scratch().floats(rows * (width + kUnitKeys) + kLanes * (width + width_v));
  float* scores = query + rows * width;
  float* buffer = scores + rows * kUnitKeys;
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t row = unit.row_begin + r;
    const int64_t offset = unit.batch * call.query_strides.batch +
                           unit.head(row) * call.query_strides.head +
                           row % call.seq_q * call.query_strides.row;
    float* out = query + r * width;
    if (call.type == DType::bf16)
      gather_rows(static_cast<const bf16*>(call.query) + offset, 0, 1, head_dim, call.scale, out,
                  width);
    else
      gather_rows(static_cast<const float*>(call.query) + offset, 0, 1, head_dim, call.scale, out,
                  width);
  }
  // one row reads narrow keys as they are; more rows share their widening
  const bool as_stored = rows == 1 || is_fp32<C>;
  for (int64_t key = key_begin; key < key_end; key += kLanes) {
    const int64_t n = key_end - key < kLanes ? key_end - key : kLanes;
    const int64_t stride = call.key_strides.row;
    const C* keys = unit.rows<C>(call.keys, call.key_strides, key);
    const F scale = call.key_scale.data ? unit.row_scales(call.key_scale, key, n) : splat(1.0f);
    const bool whole = as_stored && width == head_dim && n == kLanes;
    if (!whole) widen_rows(keys, stride, n, head_dim, width, buffer);
    for (int64_t r = 0; r < rows; ++r) {
      prefetch_rows(keys, stride, head_dim, r, rows);
      const F products = whole ? query_times_keys(query + r * width, keys, stride, width)
                               : query_times_keys(query + r * width, buffer, width, width);
      store(scores + r * kUnitKeys + key - key_begin,
            decode_scores(unit, unit.row_begin + r, key, products * scale));
    }
  }
  for (int64_t r = 0; r < rows; ++r) {
    float *row = scores + r * kUnitKeys, *result = partial + r * partial_stride;
    F largest = splat(-__builtin_inff());
    for (int64_t k = 0; k < key_end - key_begin; k += kLanes)
      largest = maximum(largest, load(row + k));
    const float top = maximum(largest), base = top == -__builtin_inff() ? 0.0f : top;
    F total = {};
    for (int64_t k = 0; k < key_end - key_begin; k += kLanes) {
      const F weight = exponential(load(row + k) - base);
      total += weight;
      store(row + k, weight);
    }
    result[0] = top;
    result[1] = sum(total);
    for (int64_t j = 0; j < width_v; j += kLanes) store(result + kLanes + j, F{});
  }
  for (int64_t key = key_begin; key < key_end; key += kLanes) {
    const int64_t n = key_end - key < kLanes ? key_end - key : kLanes;
    const int64_t stride = call.value_strides.row;
    const C* values = unit.rows<C>(call.values, call.value_strides, key);
    float* weights = scores + key - key_begin;
    if (call.value_scale.data) {
      const F scale = unit.row_scales(call.value_scale, key, n);
      for (int64_t r = 0; r < rows; ++r)
        store(weights + r * kUnitKeys, load(weights + r * kUnitKeys) * scale);
    }
    const bool whole = as_stored && width_v == head_dim_v;
    if (!whole) widen_rows(values, stride, n, head_dim_v, width_v, buffer);
    const auto add = [&](auto queries, int64_t r) {
      prefetch_rows(values, stride, head_dim_v, r / queries, (rows + queries - 1) / queries);
      float *mixture = partial + r * partial_stride + kLanes, *weight = weights + r * kUnitKeys;
      whole ? add_weighted_rows<queries>(n, weight, kUnitKeys, values, stride, width_v, mixture,
                                         partial_stride)
            : add_weighted_rows<queries>(n, weight, kUnitKeys, buffer, width_v, width_v, mixture,
                                         partial_stride);
    };
    int64_t r = 0;
    for (; r + 2 <= rows; r += 2) add(std::integral_constant<int, 2>{}, r);
    if (r < rows) add(std::integral_constant<int, 1>{}, r);
  }
}

// Joins the partial softmaxes of one row, which are `stride` apart, and the sink's.
static void decode_merge(const AttentionDecode& call, int64_t batch, int64_t head, int64_t q,
                         const float* partial, int64_t count, int64_t stride) {
  float top = -__builtin_inff();
  for (int64_t i = 0; i < count; ++i) {
    const float other = partial[i * stride];
    top = other > top || other != other ? other : top;
  }
  const bool empty = top == -__builtin_inff();
  const bool sink = call.sinks && !empty;
  // a sink may lie above every score: no exponent may be above 0
  if (sink && call.sinks[head] > top) top = call.sinks[head];
  float denominator = sink ? exponential(splat(call.sinks[head] - top))[0] : empty ? 1.0f : 0.0f;
  float* factors = thread_scratch().floats(count);
  for (int64_t i = 0; i < count; ++i) {
    factors[i] = empty ? 0.0f : exponential(splat(partial[i * stride] - top))[0];
    denominator += factors[i] * partial[i * stride + 1];
  }
  const int64_t offset =
      batch * call.out_strides.batch + head * call.out_strides.head + q * call.out_strides.row;
  for (int64_t j = 0; j < call.head_dim_v; j += kLanes) {
    F mixture = {};
    for (int64_t i = 0; i < count; ++i)
      if (factors[i] > 0) mixture += factors[i] * load(partial + i * stride + kLanes + j);
    mixture /= denominator;
    const int64_t n = call.head_dim_v - j;
    if (call.type == DType::bf16)
      store(static_cast<bf16*>(call.out) + offset + j, mixture, n);
    else
      store(static_cast<float*>(call.out) + offset + j, mixture, n);
  }
}

template <typename C>
static void attention_decode_of(const AttentionDecode& call) {
  const int64_t capacity = call.page_size * call.pages_per_sequence;
  const auto length_of = [&](int64_t b) { return clamp(call.lengths[b], 0, capacity); };
  int64_t longest = 0;
  for (int64_t b = 0; b < call.batch; ++b)
    longest = longest > length_of(b) ? longest : length_of(b);
  const int64_t chunks = (longest + kUnitKeys - 1) / kUnitKeys;
  const int64_t rows = call.heads_kv ? call.heads_q / call.heads_kv * call.seq_q : 0;
  const int64_t row_blocks = (rows + kUnitRows - 1) / kUnitRows;
  const int64_t heads = call.batch * call.heads_kv, units = heads * row_blocks * chunks;
  const int64_t stride = kLanes + round_up(call.head_dim_v, kLanes);
  float* partials = thread_scratch<1>().floats(heads * rows * chunks * stride);
#pragma omp parallel if (units > 1)
  {
#pragma omp for schedule(dynamic)
    for (int64_t index = 0; index < units; ++index) {
      const int64_t chunk = index % chunks, block = index / chunks % row_blocks;
      const int64_t head = index / chunks / row_blocks, batch = head / call.heads_kv;
      const int64_t row = block * kUnitRows, key = chunk * kUnitKeys, length = length_of(batch);
      const int64_t row_end = row + kUnitRows < rows ? row + kUnitRows : rows;
      const int64_t key_end = key + kUnitKeys < length ? key + kUnitKeys : length;
      decode_unit<C>({call, batch, head % call.heads_kv, row, row_end, length}, key, key_end,
                     partials + ((head * rows + row) * chunks + chunk) * stride, chunks * stride);
    }
#pragma omp for schedule(static)
    for (int64_t row = 0; row < heads * rows; ++row) {
      const int64_t batch = row / rows / call.heads_kv, head_kv = row / rows % call.heads_kv;
      const int64_t head = head_kv * (rows / call.seq_q) + row % rows / call.seq_q;
      decode_merge(call, batch, head, row % call.seq_q, partials + row * chunks * stride, chunks,
                   stride);
    }
  }
}

static void attention_decode(const AttentionDecode& call) {
  switch (call.cache_type) {
    case CacheType::f32:
      return attention_decode_of<float>(call);
    case CacheType::bf16:
      return attention_decode_of<bf16>(call);
    case CacheType::int8:
      return attention_decode_of<int8>(call);
    case CacheType::fp8:
      return attention_decode_of<fp8>(call);
  }
}
