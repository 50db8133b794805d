// Attention over blocks of kBlockQ queries and kBlockK keys with a running softmax (Dao et al.
// 2022), which operands.inl lays out for multiply_block: keys and, for the gradients, values
// transposed. A unit of work is one head; a unit's result depends on nothing but its inputs, so
// neither does the thread count matter nor are atomics needed.

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

  // Turns the products of query q with keys [k0, k0 + n), which lack the factor `scale`, into
  // scores; -inf where hidden, up to the next whole vector. `slope`, where given, receives
  // d(score)/d(product) of the softcap.
  void finish_scores(int64_t q, int64_t k0, int64_t n, float scale, float* scores,
                     float* slope) const {
    const int64_t padded = round_up(n, kLanes);
    if (scale != 1.0f)
      for (int64_t i = 0; i < padded; i += kLanes) store(scores + i, load(scores + i) * scale);
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
    const int64_t first = first_key(q) - k0, last = last_key(q) - k0;
    for (int64_t i = 0; i < first && i < padded; ++i) scores[i] = -__builtin_inff();
    for (int64_t i = last < 0 ? 0 : last; i < padded; ++i) scores[i] = -__builtin_inff();
  }
};

template <typename T>
static void attention_forward_rows(const Head<T>& head, const AttentionForward& call,
                                   int64_t q_begin, int64_t q_end) {
  using E = typename OperandOf<T>::Type;
  static_assert(sizeof(E) == sizeof(float), "scratch memory counts floats");
  constexpr int64_t per = elements_in<E>, block_depth = kBlockK / per;
  const float missing_scale = per == 1 ? 1.0f : call.scale;
  const int64_t depth = count_of(call.head_dim, per), seq_k = head.sequence.length_k;
  const int64_t width = round_up(depth, kLanes), width_v = round_up(call.head_dim_v, kLanes);
  const int64_t blocks = (seq_k + kBlockK - 1) / kBlockK;
  float* memory =
      thread_scratch().floats(blocks * (kBlockK * depth + block_depth * width_v) +
                              kBlockQ * (width + width_v + kBlockK) + 2 * kBlockQ + kBlockK);
  E* keys = reinterpret_cast<E*>(memory);
  E* values = keys + blocks * kBlockK * depth;
  E* query = values + blocks * block_depth * width_v;
  float* out = reinterpret_cast<float*>(query + kBlockQ * width);
  float* scores = out + kBlockQ * width_v;
  float* factors = scores + kBlockQ * kBlockK;
  float *top = factors + kBlockK, *total = top + kBlockQ;

  const T* key_rows = head.rows(call.key, call.key_strides, head.head_kv, head.sequence.first_k);
  const T* value_rows =
      head.rows(call.value, call.value_strides, head.head_kv, head.sequence.first_k);
  const int64_t key_begin = head.first_key(q_begin), key_end = head.last_key(q_end - 1);
  for (int64_t k0 = key_begin / kBlockK * kBlockK; k0 < key_end; k0 += kBlockK) {
    const int64_t n = seq_k - k0 < kBlockK ? seq_k - k0 : kBlockK;
    gather_columns(key_rows + k0 * call.key_strides.row, call.key_strides.row, n, call.head_dim,
                   keys + k0 * depth, kBlockK);
    gather_factor(value_rows + k0 * call.value_strides.row, call.value_strides.row, n,
                  call.head_dim_v, values + k0 / per * width_v, width_v);
  }
  const T* query_rows = head.rows(call.query, call.query_strides, head.head, head.sequence.first_q);
  T* out_rows =
      const_cast<T*>(head.rows(call.out, call.out_strides, head.head, head.sequence.first_q));

  for (int64_t q0 = q_begin; q0 < q_end; q0 += kBlockQ) {
    const int64_t rows = q_end - q0 < kBlockQ ? q_end - q0 : kBlockQ;
    gather_rows(query_rows + q0 * call.query_strides.row, call.query_strides.row, rows,
                call.head_dim, call.scale, query, width);
    for (int64_t i = 0; i < rows * width_v; i += kLanes) store(out + i, F{});
    for (int64_t i = 0; i < rows; ++i) {
      top[i] = -__builtin_inff();
      total[i] = 0.0f;
    }
    const int64_t first = head.first_key(q0), last = head.last_key(q0 + rows - 1);
    for (int64_t k0 = first / kBlockK * kBlockK; k0 < last; k0 += kBlockK) {
      const int64_t n = last - k0 < kBlockK ? last - k0 : kBlockK;
      multiply_block(rows, n, depth, query, width, 1, keys + k0 * depth, kBlockK, scores, kBlockK,
                     false);
      for (int64_t i = 0; i < rows; ++i) {
        float* row = scores + i * kBlockK;
        head.finish_scores(q0 + i, k0, n, missing_scale, row, nullptr);
        F largest = splat(top[i]);
        for (int64_t j = 0; j < n; j += kLanes) largest = maximum(largest, load(row + j));
        const float new_top = maximum(largest);
        // a row without a key yet would give -inf - -inf = NaN
        const float base = new_top == -__builtin_inff() ? 0.0f : new_top;
        const float decay = exponential(splat(top[i] - base))[0];
        if (call.dropout.seed) dropout_factors(call.dropout, head.row(q0 + i), k0, n, factors);
        F sums = {};
        for (int64_t j = 0; j < n; j += kLanes) {
          F weight = exponential(load(row + j) - base);
          sums += weight;
          if (call.dropout.seed) weight *= load(factors + j);
          store(row + j, weight);
        }
        as_operands(row, n, reinterpret_cast<E*>(row));
        total[i] = total[i] * decay + sum(sums);
        top[i] = new_top;
        if (decay != 1.0f)
          for (int64_t j = 0; j < width_v; j += kLanes)
            store(out + i * width_v + j, load(out + i * width_v + j) * decay);
      }
      multiply_block(rows, call.head_dim_v, count_of(n, per), reinterpret_cast<const E*>(scores),
                     kBlockK, 1, values + k0 / per * width_v, width_v, out, width_v, true);
    }
    for (int64_t i = 0; i < rows; ++i) {
      const bool empty = total[i] == 0.0f;
      float denominator = empty ? 1.0f : total[i];
      call.lse[head.row(q0 + i)] = empty ? -__builtin_inff() : top[i] + __builtin_logf(denominator);
      float shrink = 1.0f;
      if (call.sinks && !empty) {
        // the sink may lie above every score: keep both exponents at or below 0
        const float sink = call.sinks[head.head], base = sink > top[i] ? sink : top[i];
        shrink = exponential(splat(top[i] - base))[0];
        denominator = denominator * shrink + exponential(splat(sink - base))[0];
      }
      for (int64_t j = 0; j < call.head_dim_v; j += kLanes)
        store(out_rows + (q0 + i) * call.out_strides.row + j,
              load(out + i * width_v + j) * (shrink / denominator), call.head_dim_v - j);
    }
  }
}

template <typename T>
static void attention_forward_of(const AttentionForward& call) {
  // Few heads are cut along the queries, at block borders, until there is work for every thread.
  const int64_t heads = call.count * call.heads_q, wanted = 4 * omp_get_max_threads();
  const int64_t cuts = heads >= wanted || heads == 0 ? 1 : (wanted + heads - 1) / heads;
#pragma omp parallel for schedule(dynamic)
  for (int64_t unit = 0; unit < heads * cuts; ++unit) {
    const int64_t cut = unit % cuts, index = unit / cuts;
    const Sequence& sequence = call.sequences[index / call.heads_q];
    const int64_t head = index % call.heads_q;
    const int64_t blocks = (sequence.length_q + kBlockQ - 1) / kBlockQ;
    const int64_t begin = blocks * cut / cuts * kBlockQ;
    int64_t end = blocks * (cut + 1) / cuts * kBlockQ;
    if (end > sequence.length_q) end = sequence.length_q;
    if (begin < end)
      attention_forward_rows<T>({call, sequence, head, head / (call.heads_q / call.heads_kv)}, call,
                                begin, end);
  }
}

// Gradients of one key head: its queries' heads in turn, their query blocks in turn.
template <typename T>
static void attention_backward_head(const AttentionBackward& call, const Sequence& sequence,
                                    int64_t head_kv) {
  using E = typename OperandOf<T>::Type;
  constexpr int64_t per = elements_in<E>;
  const float missing_scale = per == 1 ? 1.0f : call.scale;
  const int64_t head_dim = call.head_dim, head_dim_v = call.head_dim_v, seq_k = sequence.length_k;
  const int64_t width = round_up(head_dim, kLanes), width_v = round_up(head_dim_v, kLanes);
  const int64_t depth = count_of(head_dim, per), depth_v = count_of(head_dim_v, per);
  const int64_t padded_k = round_up(seq_k, kBlockK);
  float* memory =
      thread_scratch().floats(padded_k * (2 * width + width_v + depth + depth_v) +
                              kBlockQ * (3 * width + 2 * width_v + 2 * kBlockK) + 2 * kBlockK);
  E* keys = reinterpret_cast<E*>(memory);
  E* keys_transposed = keys + padded_k * width;
  E* values_transposed = keys_transposed + padded_k * depth;
  // query and d_out are first factors by rows, and second ones whose k the rows are
  E* query = values_transposed + padded_k * depth_v;
  E* query_factor = per == 1 ? query : query + kBlockQ * width;
  E* d_out = query + 2 * kBlockQ * width;
  E* d_out_factor = per == 1 ? d_out : d_out + kBlockQ * width_v;
  float* d_key = reinterpret_cast<float*>(d_out + 2 * kBlockQ * width_v);
  float* d_value = d_key + padded_k * width;
  float* d_query = d_value + padded_k * width_v;
  float* scores = d_query + kBlockQ * width;
  float* d_scores = scores + kBlockQ * kBlockK;
  float *factors = d_scores + kBlockQ * kBlockK, *slope = factors + kBlockK;

  const int64_t group = call.heads_q / call.heads_kv;
  const Head<T> any{call, sequence, head_kv * group, head_kv};
  const T* key_rows = any.rows(call.key, call.key_strides, head_kv, sequence.first_k);
  const T* value_rows = any.rows(call.value, call.value_strides, head_kv, sequence.first_k);
  gather_factor(key_rows, call.key_strides.row, seq_k, head_dim, keys, width);
  for (int64_t k0 = 0; k0 < seq_k; k0 += kBlockK) {
    const int64_t n = seq_k - k0 < kBlockK ? seq_k - k0 : kBlockK;
    gather_columns(key_rows + k0 * call.key_strides.row, call.key_strides.row, n, head_dim,
                   keys_transposed + k0 * depth, kBlockK);
    gather_columns(value_rows + k0 * call.value_strides.row, call.value_strides.row, n, head_dim_v,
                   values_transposed + k0 * depth_v, kBlockK);
  }
  for (int64_t i = 0; i < padded_k * (width + width_v); i += kLanes) store(d_key + i, F{});

  for (int64_t head_q = head_kv * group; head_q < (head_kv + 1) * group; ++head_q) {
    const Head<T> head{call, sequence, head_q, head_kv};
    const T* query_rows = head.rows(call.query, call.query_strides, head_q, sequence.first_q);
    const T* d_out_rows = head.rows(call.d_out, call.d_out_strides, head_q, sequence.first_q);
    T* d_query_rows =
        const_cast<T*>(head.rows(call.d_query, call.d_query_strides, head_q, sequence.first_q));
    for (int64_t q0 = 0; q0 < sequence.length_q; q0 += kBlockQ) {
      const int64_t rows = sequence.length_q - q0 < kBlockQ ? sequence.length_q - q0 : kBlockQ;
      gather_rows(query_rows + q0 * call.query_strides.row, call.query_strides.row, rows, head_dim,
                  call.scale, query, width);
      gather_rows(d_out_rows + q0 * call.d_out_strides.row, call.d_out_strides.row, rows,
                  head_dim_v, 1.0f, d_out, width_v);
      if constexpr (per > 1) {
        gather_factor(query_rows + q0 * call.query_strides.row, call.query_strides.row, rows,
                      head_dim, query_factor, width);
        gather_factor(d_out_rows + q0 * call.d_out_strides.row, call.d_out_strides.row, rows,
                      head_dim_v, d_out_factor, width_v);
      }
      for (int64_t i = 0; i < rows * width; i += kLanes) store(d_query + i, F{});
      const int64_t first = head.first_key(q0), last = head.last_key(q0 + rows - 1);
      for (int64_t k0 = first / kBlockK * kBlockK; k0 < last; k0 += kBlockK) {
        const int64_t n = last - k0 < kBlockK ? last - k0 : kBlockK;
        multiply_block(rows, n, depth, query, width, 1, keys_transposed + k0 * depth, kBlockK,
                       scores, kBlockK, false);
        multiply_block(rows, n, depth_v, d_out, width_v, 1, values_transposed + k0 * depth_v,
                       kBlockK, d_scores, kBlockK, false);
        for (int64_t i = 0; i < rows; ++i) {
          float *row = scores + i * kBlockK, *d_row = d_scores + i * kBlockK;
          const int64_t number = head.row(q0 + i);
          const float lse = call.row_lse[number], delta = call.delta[number];
          const bool empty = lse == -__builtin_inff();
          head.finish_scores(q0 + i, k0, n, missing_scale, row, slope);
          if (call.dropout.seed) dropout_factors(call.dropout, number, k0, n, factors);
          for (int64_t j = 0; j < n; j += kLanes) {
            const F weight = empty ? F{} : exponential(load(row + j) - lse);
            const F factor = call.dropout.seed ? load(factors + j) : splat(1.0f);
            // padding lanes of d_row are uninitialised: weight = 0 would not stop their NaN
            F gradient =
                select(weight > splat(0.0f), weight * (factor * load(d_row + j) - delta), F{});
            store(row + j, weight * factor);
            if (call.d_bias) {
              float* d_bias = call.d_bias + number * call.d_bias_columns + k0 + j;
              store(d_bias, gradient, n - j);
            }
            if (call.softcap > 0)
              gradient = select(weight > splat(0.0f), gradient * load(slope + j), F{});
            store(d_row + j, gradient);
          }
        }
        // pairs of rows need half of the memory of scores: the other half is for d_scores
        const int64_t row_pairs = count_of(rows, per);
        const E* weights = rows_as_operands(scores, rows, n, reinterpret_cast<E*>(scores));
        const E* gradients = rows_as_operands(d_scores, rows, n,
                                              reinterpret_cast<E*>(scores) + kBlockQ / 2 * kBlockK);
        for (int64_t i = 0; i < rows; ++i)
          as_operands(d_scores + i * kBlockK, n, reinterpret_cast<E*>(d_scores + i * kBlockK));
        multiply_block(n, head_dim_v, row_pairs, weights, 1, kBlockK, d_out_factor, width_v,
                       d_value + k0 * width_v, width_v, true);
        multiply_block(n, head_dim, row_pairs, gradients, 1, kBlockK, query_factor, width,
                       d_key + k0 * width, width, true);
        multiply_block(rows, head_dim, count_of(n, per), reinterpret_cast<const E*>(d_scores),
                       kBlockK, 1, keys + k0 / per * width, width, d_query, width, true);
      }
      for (int64_t i = 0; i < rows; ++i)
        for (int64_t j = 0; j < head_dim; j += kLanes)
          store(d_query_rows + (q0 + i) * call.d_query_strides.row + j,
                load(d_query + i * width + j) * call.scale, head_dim - j);
    }
  }
  T* d_key_rows =
      const_cast<T*>(any.rows(call.d_key, call.d_key_strides, head_kv, sequence.first_k));
  T* d_value_rows =
      const_cast<T*>(any.rows(call.d_value, call.d_value_strides, head_kv, sequence.first_k));
  for (int64_t k = 0; k < seq_k; ++k) {
    for (int64_t j = 0; j < head_dim; j += kLanes)
      store(d_key_rows + k * call.d_key_strides.row + j,
            load(d_key + k * width + j) * missing_scale, head_dim - j);
    for (int64_t j = 0; j < head_dim_v; j += kLanes)
      store(d_value_rows + k * call.d_value_strides.row + j, load(d_value + k * width_v + j),
            head_dim_v - j);
  }
}

template <typename T>
static void attention_backward_of(const AttentionBackward& call) {
#pragma omp parallel for schedule(dynamic)
  for (int64_t unit = 0; unit < call.count * call.heads_kv; ++unit)
    attention_backward_head<T>(call, call.sequences[unit / call.heads_kv], unit % call.heads_kv);
}

static void attention_forward(const AttentionForward& call) {
  call.type == DType::bf16 ? attention_forward_of<bf16>(call) : attention_forward_of<float>(call);
}

static void attention_backward(const AttentionBackward& call) {
  call.type == DType::bf16 ? attention_backward_of<bf16>(call) : attention_backward_of<float>(call);
}
