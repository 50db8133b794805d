// Attention over blocks of queries and of kBlockK keys with a running softmax (Dao et al. 2022). A
// strip of kStrip queries takes all its steps while its scores lie in the nearest cache, and leaves
// out the panels of keys that none of its rows sees. A unit of work is one head; a unit's result
// depends on nothing but its inputs, so neither does the thread count matter nor are atomics
// needed.

constexpr int64_t kStrip = 12, kBlockK = 256;
// one vector more than the keys: rows a power of two apart would share few lines of the cache
constexpr int64_t kScoreRow = kBlockK + kLanes;
constexpr float kLog2E = 1.44269504f;

// What one head of one sequence reads.
template <typename T>
struct Head {
  const Attention& call;
  const Sequence sequence;
  const int64_t head, head_kv;

  const T* rows(const void* x, const Strides4& strides, int64_t which, int64_t first) const {
    return static_cast<const T*>(x) + sequence.batch * strides.batch + which * strides.head +
           first * strides.row;
  }
  // Asks for rows [q, q + count) of x, of the keys or of the queries, as far as they exist: heads
  // of few rows wait for memory otherwise. Always inline: gcc takes a function that does nothing
  // but prefetch for one without effect, and leaves out its calls.
  template <bool to_write = false>
  inline __attribute__((always_inline)) void fetch(const void* x, const Strides4& strides,
                                                   bool of_keys, int64_t q, int64_t count,
                                                   int64_t columns) const {
    const int64_t first = of_keys ? sequence.first_k : sequence.first_q;
    const int64_t length = of_keys ? sequence.length_k : sequence.length_q;
    const T* from = rows(x, strides, of_keys ? head_kv : head, first + q);
    for (int64_t row = 0; row < count && q + row < length; ++row)
      for (int64_t i = 0; i < columns; i += 64 / sizeof(T))
        __builtin_prefetch(from + row * strides.row + i, to_write, 2);
  }
  // Row number of query q: in lse, in the bias and for dropout.
  int64_t row(int64_t q) const {
    return (sequence.batch * call.heads_q + head) * call.seq_q + sequence.first_q + q;
  }
  // Keys [first_key, last_key) may be attended to by query q, mask apart.
  int64_t first_key(int64_t q) const {
    const int64_t key = call.window_left < 0 ? 0 : q + sequence.shift - call.window_left;
    return key < 0 ? 0 : key;
  }
  int64_t last_key(int64_t q) const {
    int64_t key = sequence.length_k;
    const int64_t position = q + sequence.shift;
    if (call.causal && position + 1 < key) key = position + 1;
    if (call.window_right >= 0 && position + call.window_right + 1 < key)
      key = position + call.window_right + 1;
    return key < 0 ? 0 : key;
  }

  // Whether scores are products times a positive factor: it then waits for the exponential.
  bool plain() const {
    return call.scale > 0 && call.softcap == 0 && !call.bias && !call.alibi && !call.mask;
  }
  // What finish_scores leaves to be multiplied by.
  float missing_scale() const { return plain() ? call.scale : 1.0f; }

  // Turns the products of query q with keys [k0, k0 + n) into scores, up to the missing scale; -inf
  // where hidden, up to the next whole vector. `slope`, where given, receives d(score)/d(product)
  // of the softcap.
  void finish_scores(int64_t q, int64_t k0, int64_t n, float* scores, float* slope) const {
    if (!plain()) add_features(q, k0, n, scores, slope);
    const int64_t padded = round_up(n, kLanes);
    const int64_t first = first_key(q) - k0, last = last_key(q) - k0;
    for (int64_t i = 0; i < first && i < padded; ++i) scores[i] = -__builtin_inff();
    for (int64_t i = (last < 0 ? 0 : last) / kLanes * kLanes; i < padded; i += kLanes)
      store(scores + i, first_lanes(load(scores + i), last - i, -__builtin_inff()));
  }

  void add_features(int64_t q, int64_t k0, int64_t n, float* scores, float* slope) const {
    const int64_t padded = round_up(n, kLanes);
    for (int64_t i = 0; i < padded; i += kLanes) store(scores + i, load(scores + i) * call.scale);
    if (call.softcap > 0)
      for (int64_t i = 0; i < padded; i += kLanes) {
        const F t = tangent_hyperbolic(load(scores + i) / call.softcap);
        store(scores + i, call.softcap * t);
        if (slope) store(slope + i, 1.0f - t * t);
      }
    if (call.bias) {
      const Strides4& s = call.bias_strides;
      const float* bias =
          call.bias + sequence.batch * s.batch + head * s.head + q * s.row + k0 * s.column;
      if (s.column == 1)
        for (int64_t i = 0; i < n; i += kLanes)
          store(scores + i, load(scores + i) + load(bias + i, n - i));
      else
        for (int64_t i = 0; i < n; ++i) scores[i] += bias[i * s.column];
    }
    if (call.alibi) {
      const float alibi = call.alibi[sequence.batch * call.alibi_stride + head];
      const int64_t position = q + sequence.shift;
      for (int64_t i = 0; i < n; ++i)
        scores[i] -= alibi * __builtin_fabsf(float(k0 + i - position));
    }
    if (call.mask) {
      const Strides4& s = call.mask_strides;
      const uint8_t* mask =
          call.mask + sequence.batch * s.batch + head * s.head + q * s.row + k0 * s.column;
      for (int64_t i = 0; i < n; ++i)
        if (!mask[i * s.column]) scores[i] = -__builtin_inff();
    }
  }
};

// The keys of the block from k0 on that queries [q, q + rows) see: n of them from the panel `begin`
// on, none where n <= 0.
struct Span {
  int64_t begin, n;
  template <typename T>
  Span(const Head<T>& head, int64_t q, int64_t rows, int64_t k0) {
    const int64_t first = head.first_key(q), last = head.last_key(q + rows - 1);
    begin = first > k0 ? first / kPanel * kPanel : k0;
    n = (last < k0 + kBlockK ? last : k0 + kBlockK) - begin;
  }
};

// Turns the products of queries [q, q + rows) with keys [k, k + n) into weights exp(score - top) as
// the next product reads them, in their own place, and carries top and total of each row, one per
// lane, on; returns what its former sums are to be multiplied by.
template <typename T>
LLMOS_INLINE F weigh(const Head<T>& head, int64_t q, int64_t rows, int64_t k, int64_t n,
                     float* scores, F& top, F& total) {
  using E = typename OperandOf<T>::Type;
  const Dropout& dropout = head.call.dropout;
  float factors[kBlockK];
  F of_rows[kLanes];
  for (int64_t i = 0; i < kLanes; ++i) of_rows[i] = splat(-__builtin_inff());
  for (int64_t i = 0; i < rows; ++i) {
    float* row = scores + i * kScoreRow;
    head.finish_scores(q + i, k, n, row, nullptr);
    F largest = load(row);
    for (int64_t j = kLanes; j < n; j += kLanes) largest = maximum(largest, load(row + j));
    of_rows[i] = largest;
  }
  const float factor = head.missing_scale() * kLog2E;
  const F new_top = maximum(top, lane_maxima(of_rows));
  // a row without a key yet would give -inf - -inf = NaN
  const F base = select(new_top == splat(-__builtin_inff()), F{}, new_top * factor);
  const F decay = power_of_2(top * factor - base);
  for (int64_t i = 0; i < rows; ++i) {
    float* row = scores + i * kScoreRow;
    if (dropout.seed) dropout_factors(dropout, head.row(q + i), k, n, factors);
    const F base_of_row = splat(base[i]);
    F sums = {};
    for (int64_t j = 0; j < n; j += kLanes) {
      F weight = power_of_2(load(row + j) * factor - base_of_row);
      sums += weight;
      if (dropout.seed) weight *= load(factors + j);
      store_operands(reinterpret_cast<E*>(row), j, weight);
    }
    of_rows[i] = sums;
  }
  top = new_top;
  total = total * decay + lane_sums(of_rows);
  return decay;
}

// What the sums of values are to be multiplied by, and lse, of rows with one lane each.
template <typename T>
LLMOS_INLINE F finish_rows(const Head<T>& head, F top, F total, F& lse) {
  const I empty = total == F{};
  F denominator = select(empty, splat(1.0f), total);
  top *= head.missing_scale();
  lse = select(empty, splat(-__builtin_inff()), top + logarithm(denominator));
  if (!head.call.sinks) return 1.0f / denominator;
  // the sink may lie above every score: keep both exponents at or below 0
  const F sink = splat(head.call.sinks[head.head]), base = maximum(sink, top);
  const F shrink = exponential(top - base);
  // without a key, too: -inf - -inf is NaN
  return select(empty, F{}, shrink / (denominator * shrink + exponential(sink - base)));
}

template <typename T>
static void attention_forward_rows(const Head<T>& head, const Head<T>& next,
                                   const AttentionForward& call, int64_t q_begin, int64_t q_end) {
  using E = typename OperandOf<T>::Type;
  static_assert(sizeof(E) == sizeof(float), "scratch memory counts floats");
  constexpr int64_t per = elements_in<E>;
  const int64_t depth = count_of(call.head_dim, per), head_dim_v = call.head_dim_v;
  const int64_t width = round_up(depth, kLanes), width_v = round_up(head_dim_v, kPanel);
  const int64_t padded_k = round_up(head.sequence.length_k, kPanel),
                panel_v = padded_k / per * kPanel;
  float* memory = thread_scratch().floats(padded_k * (depth + width_v) +
                                          kStrip * (width + width_v + kScoreRow));
  E* keys = reinterpret_cast<E*>(memory);
  E* values = keys + padded_k * depth;
  E* query = values + padded_k * width_v;
  float* out = reinterpret_cast<float*>(query + kStrip * width);
  float* scores = out + kStrip * width_v;

  const int64_t key_begin = head.first_key(q_begin) / kPanel * kPanel;
  const int64_t key_count = head.last_key(q_end - 1) - key_begin;
  gather_columns(
      head.rows(call.key, call.key_strides, head.head_kv, head.sequence.first_k + key_begin),
      call.key_strides.row, key_count, call.head_dim, keys + key_begin * depth);
  gather_factor(
      head.rows(call.value, call.value_strides, head.head_kv, head.sequence.first_k + key_begin),
      call.value_strides.row, key_count, head_dim_v, values + key_begin / per * kPanel, panel_v);
  const int64_t query_row = call.query_strides.row, out_row = call.out_strides.row;
  const T* query_rows = head.rows(call.query, call.query_strides, head.head, head.sequence.first_q);
  T* out_rows =
      const_cast<T*>(head.rows(call.out, call.out_strides, head.head, head.sequence.first_q));

  for (int64_t q = q_begin; q < q_end; q += kStrip) {
    const int64_t rows = q_end - q < kStrip ? q_end - q : kStrip;
    const int64_t begin = head.first_key(q) / kPanel * kPanel, end = head.last_key(q + rows - 1);
    F top = splat(-__builtin_inff()), total = {};
    gather_rows(query_rows + q * query_row, query_row, rows, call.head_dim, 1.0f, query, width);
    head.template fetch<true>(call.out, call.out_strides, false, q, rows, head_dim_v);
    if (begin >= end)
      for (int64_t i = 0; i < rows * width_v; i += kLanes) store(out + i, F{});
    for (int64_t k = begin; k < end; k += kBlockK) {
      const int64_t n = end - k < kBlockK ? end - k : kBlockK;
      const int64_t ahead = &next != &head && k == begin ? rows : 0;
      next.fetch(call.key, call.key_strides, true, q, ahead, call.head_dim);
      multiply(rows, n, depth, query, width, 1, keys + k * depth, kPanel * depth, scores, kScoreRow,
               false);
      next.fetch(call.value, call.value_strides, true, q, ahead, head_dim_v);
      const F had = total, decay = weigh(head, q, rows, k, n, scores, top, total);
      next.fetch(call.query, call.query_strides, false, q, ahead, call.head_dim);
      for (int64_t i = 0; i < rows; ++i)
        if (had[i] > 0.0f && decay[i] != 1.0f)
          for (int64_t j = 0; j < width_v; j += kLanes)
            store(out + i * width_v + j, load(out + i * width_v + j) * decay[i]);
      multiply(rows, head_dim_v, count_of(n, per), reinterpret_cast<const E*>(scores), kScoreRow, 1,
               values + k / per * kPanel, panel_v, out, width_v, k > begin);
    }
    F lse;
    const F factors = finish_rows(head, top, total, lse);
    for (int64_t i = 0; i < rows; ++i) {
      call.lse[head.row(q + i)] = lse[i];
      const F factor = splat(factors[i]);
      for (int64_t j = 0; j < head_dim_v; j += kLanes)
        store(out_rows + (q + i) * out_row + j, load(out + i * width_v + j) * factor,
              head_dim_v - j);
    }
  }
}

// Units that a thread takes in one go, so that it can fetch ahead: a quarter of its share.
static int64_t units_in_a_row(int64_t units) {
  const int64_t share = units / (4 * omp_get_max_threads());
  return share > 1 ? share : 1;
}

template <typename T>
static void attention_forward_of(const AttentionForward& call) {
  // Few heads are cut along the queries, at borders of strips, until there is work for every
  // thread.
  const int64_t heads = call.count * call.heads_q, wanted = 4 * omp_get_max_threads();
  const int64_t cuts = heads >= wanted || heads == 0 ? 1 : (wanted + heads - 1) / heads;
  const int64_t group = call.heads_q / call.heads_kv, in_a_row = units_in_a_row(heads * cuts);
  const auto head_of = [&](int64_t index) {
    const int64_t head = index % call.heads_q;
    return Head<T>{call, call.sequences[index / call.heads_q], head, head / group};
  };
#pragma omp parallel for schedule(dynamic, in_a_row)
  for (int64_t unit = 0; unit < heads * cuts; ++unit) {
    const int64_t cut = unit % cuts;
    const bool more = cuts == 1 && (unit + 1) % in_a_row > 0 && unit + 1 < heads;
    const Head<T> head = head_of(unit / cuts), next = head_of(more ? unit + 1 : unit / cuts);
    const int64_t strips = (head.sequence.length_q + kStrip - 1) / kStrip;
    const int64_t begin = strips * cut / cuts * kStrip;
    int64_t end = strips * (cut + 1) / cuts * kStrip;
    if (end > head.sequence.length_q) end = head.sequence.length_q;
    if (begin < end) attention_forward_rows(head, more ? next : head, call, begin, end);
  }
}

static void attention_forward(const AttentionForward& call) {
  call.type == DType::bf16 ? attention_forward_of<bf16>(call) : attention_forward_of<float>(call);
}
