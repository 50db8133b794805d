// Few queries, a long cache: memory is read once, by units of (sequence, key head, kUnitRows of its
// queries, kUnitKeys of its keys), whose partial softmaxes are merged in the order of the keys.
// What a unit is depends on shapes alone, so results do not depend on the number of threads. While
// a unit reads keys it asks for its values, and meanwhile for the keys of the next unit.

constexpr int64_t kUnitRows = 64;

LLMOS_INLINE int64_t clamp(int64_t x, int64_t low, int64_t high) {
  return x < low ? low : x > high ? high : x;
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
  template <typename C>
  Ahead ahead(const void* cache, const Strides4& strides, int64_t key) const {
    return {reinterpret_cast<const char*>(rows<C>(cache, strides, key)),
            strides.row * int64_t(sizeof(C))};
  }
  // Of 16 keys from `key` on; `n` keys exist there, perhaps more than 16.
  F row_scales(const RowScale& scale, int64_t key, int64_t n) const {
    const float* first = scale.data + page(key) * scale.strides.batch +
                         head_kv * scale.strides.head + key % call.page_size * scale.strides.row;
    if (scale.strides.row == 1) return load(first, n);
    float lanes[kLanes] = {};
    for (int64_t i = 0; i < n && i < kLanes; ++i) lanes[i] = first[i * scale.strides.row];
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

// The 16 rows from x on, of which n exist, as operands padded with zeros to `width`.
template <typename E, typename C>
LLMOS_INLINE void widen_rows(const C* x, int64_t stride, int64_t n, int64_t columns, int64_t width,
                             Ahead ahead, E* out) {
  for (int64_t row = 0; row < n; ++row, x += stride, out += width)
    for (int64_t i = 0; i < elements_in<E> * width; i += kLanes) {
      store_operands(out, i, i < columns ? load(x + i, columns - i) : F{});
      ahead.fetch(row, i * sizeof(C));
    }
  __builtin_memset(out, 0, (kLanes - n) * width * sizeof(E));
}

// Calls act(queries, r) for row r and those after it that share a tile.
template <typename Act>
LLMOS_INLINE void for_tiles(int64_t rows, Act act) {
  int64_t r = 0;
  for (; r + kQueries <= rows; r += kQueries) act(std::integral_constant<int, kQueries>{}, r);
  if (kQueries > 2 && r + 2 <= rows) {
    act(std::integral_constant<int, 2>{}, r);
    r += 2;
  }
  if (r < rows) act(std::integral_constant<int, 1>{}, r);
}

// Scores of one row from its products with keys [key_begin, key_end), then their weights as the
// next product reads them, in their place; the row's largest score and the sum of its weights.
template <typename E>
LLMOS_INLINE void weigh_keys(const DecodeUnit& unit, int64_t row, int64_t key_begin,
                             int64_t key_end, float* scores, float* result) {
  const AttentionDecode& call = unit.call;
  const int64_t count = key_end - key_begin;
  F largest = splat(-__builtin_inff());
  for (int64_t k = 0; k < count; k += kLanes) {
    F products = load(scores + k) * call.scale;
    if (call.key_scale.data) products *= unit.row_scales(call.key_scale, key_begin + k, count - k);
    const F score = decode_scores(unit, row, key_begin + k, products);
    largest = maximum(largest, score);
    store(scores + k, score);
  }
  const float top = maximum(largest), base = top == -__builtin_inff() ? 0.0f : top;
  F total = {};
  for (int64_t k = 0; k < count; k += kLanes) {
    F weight = exponential(load(scores + k) - base);
    total += weight;
    if (call.value_scale.data)
      weight *= unit.row_scales(call.value_scale, key_begin + k, count - k);
    store_operands(reinterpret_cast<E*>(scores), k, weight);
  }
  result[0] = top;
  result[1] = sum(total);
}

// Rows of operands as they are stored: pairs of bf16 are two numbers.
template <typename E>
using WideOf = std::conditional_t<elements_in<E> == 2, bf16, float>;

// Whether tiles of so many queries read the cache itself: more than one share its widening.
template <typename E, typename C>
constexpr bool reads_stored(int64_t queries) {
  return std::is_same_v<C, WideOf<E>> || (queries == 1 && elements_in<E> == 1);
}

// Products of all rows with 16 keys, of which n exist.
template <typename E, typename C>
static void multiply_step(int64_t rows, int64_t n, const E* query, const C* keys, int64_t stride,
                          int64_t columns, Ahead ahead, E* buffer, float* scores) {
  constexpr int64_t per = elements_in<E>;
  const int64_t width = round_up(count_of(columns, per), kLanes);
  const bool whole = reads_stored<E, C>(rows) && per * width == columns && n == kLanes;
  if (!whole) widen_rows(keys, stride, n, columns, width, ahead, buffer);
  const Ahead nothing{reinterpret_cast<char*>(buffer), 0};
  for_tiles(rows, [&](auto queries, int64_t r) __attribute__((always_inline)) {
    for (int64_t i = 0; i < kLanes; i += kLanes / queries) {
      const E* of_rows = query + r * width;
      float* products = scores + r * kUnitKeys + i;
      if constexpr (reads_stored<E, C>(queries))
        if (whole) {
          multiply_keys<queries>(of_rows, width, keys + i * stride, stride, ahead.from(i, 0),
                                 products);
          continue;
        }
      multiply_keys<queries>(of_rows, width, reinterpret_cast<WideOf<E>*>(buffer + i * width),
                             per * width, nothing, products);
    }
  });
}

// Adds 16 values, of which n exist, by the weights of all rows.
template <typename E, typename C>
static void add_weighted_step(int64_t rows, int64_t n, const E* weights, const C* values,
                              int64_t stride, int64_t columns, Ahead ahead, E* buffer, float* out,
                              int64_t out_stride) {
  const int64_t width = round_up(columns, kLanes), padded = count_of(width, elements_in<E>);
  const bool whole = reads_stored<E, C>(rows) && width == columns;
  if (!whole) widen_rows(values, stride, n, columns, padded, ahead, buffer);
  const Ahead nothing{reinterpret_cast<char*>(buffer), 0};
  for_tiles(rows, [&](auto queries, int64_t r) __attribute__((always_inline)) {
    const E* of_rows = weights + r * kUnitKeys;
    float* sums = out + r * out_stride;
    if constexpr (reads_stored<E, C>(queries))
      if (whole)
        return add_weighted_rows<queries>(n, of_rows, values, stride, width, ahead, sums,
                                          out_stride);
    add_weighted_rows<queries>(n, of_rows, reinterpret_cast<WideOf<E>*>(buffer),
                               elements_in<E> * padded, width, nothing, sums, out_stride);
  });
}

// Partial softmax over keys [key_begin, key_end): for each row the largest score, the sum of the
// weights and, at partial + kLanes, their mixture of the values; rows are partial_stride apart.
// T is the type of the queries, C that of the cache.
template <typename T, typename C>
static void decode_unit(const DecodeUnit& unit, int64_t key_begin, int64_t key_end, float* partial,
                        int64_t partial_stride) {
  using E = typename OperandOf<T>::Type;
  constexpr int64_t per = elements_in<E>;
  const AttentionDecode& call = unit.call;
  const int64_t head_dim = call.head_dim, head_dim_v = call.head_dim_v;
  const int64_t width = round_up(count_of(head_dim, per), kLanes);
  const int64_t width_v = round_up(head_dim_v, kLanes), rows = unit.row_end - unit.row_begin;
  int64_t first = key_end, last = key_begin;
  for (int64_t r = unit.row_begin; r < unit.row_end; ++r) {
    first = first < unit.first_key(r) ? first : unit.first_key(r);
    last = last > unit.last_key(r) ? last : unit.last_key(r);
  }
  key_begin = first > key_begin ? first / kLanes * kLanes : key_begin;
  key_end = last < key_end ? last : key_end;

  float* scores = thread_scratch().floats(rows * (width + kUnitKeys) + kLanes * (width + width_v));
  E* query = reinterpret_cast<E*>(scores + rows * kUnitKeys);
  E* buffer = query + rows * width;
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t row = unit.row_begin + r;
    const T* x = static_cast<const T*>(call.query) + unit.batch * call.query_strides.batch +
                 unit.head(row) * call.query_strides.head +
                 row % call.seq_q * call.query_strides.row;
    gather_rows(x, 0, 1, head_dim, 1.0f, query + r * width, width);
  }
  for (int64_t key = key_begin; key < key_end; key += kLanes) {
    const int64_t n = key_end - key < kLanes ? key_end - key : kLanes;
    const Ahead ahead = unit.ahead<C>(call.values, call.value_strides, key);
    multiply_step(rows, n, query, unit.rows<C>(call.keys, call.key_strides, key),
                  call.key_strides.row, head_dim, ahead, buffer, scores + key - key_begin);
  }
  for (int64_t r = 0; r < rows; ++r) {
    float* result = partial + r * partial_stride;
    weigh_keys<E>(unit, unit.row_begin + r, key_begin, key_end, scores + r * kUnitKeys, result);
    for (int64_t j = 0; j < width_v; j += kLanes) store(result + kLanes + j, F{});
  }
  for (int64_t key = key_begin; key < key_end; key += kLanes) {
    const int64_t n = key_end - key < kLanes ? key_end - key : kLanes;
    const int64_t next = key + kUnitKeys < unit.length ? key + kUnitKeys : key;
    add_weighted_step(rows, n, reinterpret_cast<const E*>(scores) + (key - key_begin) / per,
                      unit.rows<C>(call.values, call.value_strides, key), call.value_strides.row,
                      head_dim_v, unit.ahead<C>(call.keys, call.key_strides, next), buffer,
                      partial + kLanes, partial_stride);
  }
}

// Joins the partial softmaxes of one row, which are `stride` apart, and the sink's.
template <typename T>
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
    store(static_cast<T*>(call.out) + offset + j, mixture, call.head_dim_v - j);
  }
}

template <typename T, typename C>
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
  const int64_t in_a_row = units_in_a_row(units);
  const int64_t stride = kLanes + round_up(call.head_dim_v, kLanes);
  float* partials = thread_scratch<1>().floats(heads * rows * chunks * stride);
#pragma omp parallel if (units > 1)
  {
#pragma omp for schedule(dynamic, in_a_row)
    for (int64_t index = 0; index < units; ++index) {
      const int64_t chunk = index % chunks, block = index / chunks % row_blocks;
      const int64_t head = index / chunks / row_blocks, batch = head / call.heads_kv;
      const int64_t row = block * kUnitRows, key = chunk * kUnitKeys, length = length_of(batch);
      const int64_t row_end = row + kUnitRows < rows ? row + kUnitRows : rows;
      const int64_t key_end = key + kUnitKeys < length ? key + kUnitKeys : length;
      decode_unit<T, C>({call, batch, head % call.heads_kv, row, row_end, length}, key, key_end,
                        partials + ((head * rows + row) * chunks + chunk) * stride,
                        chunks * stride);
    }
#pragma omp for schedule(static)
    for (int64_t row = 0; row < heads * rows; ++row) {
      const int64_t batch = row / rows / call.heads_kv, head_kv = row / rows % call.heads_kv;
      const int64_t head = head_kv * (rows / call.seq_q) + row % rows / call.seq_q;
      decode_merge<T>(call, batch, head, row % call.seq_q, partials + row * chunks * stride, chunks,
                      stride);
    }
  }
}

template <typename T>
static void attention_decode_for(const AttentionDecode& call) {
  switch (call.cache_type) {
    case CacheType::int8:
      return attention_decode_of<T, int8>(call);
    case CacheType::fp8:
      return attention_decode_of<T, fp8>(call);
    default:  // f32 and bf16 are the type of the queries
      return attention_decode_of<T, T>(call);
  }
}

static void attention_decode(const AttentionDecode& call) {
  call.type == DType::bf16 ? attention_decode_for<bf16>(call) : attention_decode_for<float>(call);
}
