// Gradients of attention.inl, over the same strips of queries and blocks of keys.

// From the products of queries [q, q + rows) with keys [k, k + n), and of their gradients with the
// values: weights, with dropout, and gradients of the products, in rows of kScoreRow for
// elements_in<E> queries each; the latter also in place of d_scores, as the next product reads
// them.
template <typename T, typename E>
LLMOS_INLINE void differentiate(const Head<T>& head, const AttentionBackward& call, int64_t q,
                                int64_t rows, int64_t k, int64_t n, const float* deltas,
                                float* scores, float* d_scores, E* weights, E* gradients) {
  constexpr int64_t per = elements_in<E>;
  const float factor = head.missing_scale() * kLog2E;
  float factors[per][kBlockK], slopes[per][kBlockK];
  for (int64_t i = 0; i < rows; i += per) {
    float *row = scores + i * kScoreRow, *d_row = d_scores + i * kScoreRow;
    float base[per], delta[per];
    for (int64_t r = 0; r < per; ++r) {
      if (i + r < rows) {
        const int64_t number = head.row(q + i + r);
        const float lse = call.row_lse[number];
        base[r] = lse == -__builtin_inff() ? __builtin_inff() : lse * kLog2E;
        delta[r] = deltas[i + r];
        head.finish_scores(q + i + r, k, n, row + r * kScoreRow, slopes[r]);
        if (call.dropout.seed) dropout_factors(call.dropout, number, k, n, factors[r]);
      } else {  // the second row of a pair that is not there
        base[r] = delta[r] = 0.0f;
        for (int64_t j = 0; j < n; j += kLanes) {
          store(row + r * kScoreRow + j, splat(-__builtin_inff()));
          store(d_row + r * kScoreRow + j, F{});
          store(slopes[r] + j, F{});
          store(factors[r] + j, F{});
        }
      }
    }
    for (int64_t j = 0; j < n; j += kLanes) {
      F weight[per], gradient[per];
      for (int64_t r = 0; r < per; ++r) {
        weight[r] = power_of_2(load(row + r * kScoreRow + j) * factor - base[r]);
        const F seen = weight[r];
        F d_weight = load(d_row + r * kScoreRow + j);
        if (call.dropout.seed) {
          const F keep = load(factors[r] + j);
          d_weight *= keep;
          weight[r] *= keep;
        }
        gradient[r] = seen * (d_weight - delta[r]);
        if (call.d_bias && i + r < rows)
          store(call.d_bias + head.row(q + i + r) * call.d_bias_columns + k + j, gradient[r],
                n - j);
        if (call.softcap > 0) gradient[r] *= load(slopes[r] + j);
        if (per > 1) store_operands(reinterpret_cast<E*>(d_row + r * kScoreRow), j, gradient[r]);
      }
      store_rows(weights + i / per * kScoreRow + j, weight);
      store_rows(gradients + i / per * kScoreRow + j, gradient);
    }
  }
}

// Zeros beside the first n numbers of rows of scores: after them and, where asked, before them.
template <typename E>
LLMOS_INLINE void clear_beside(E* x, int64_t rows, int64_t n, bool before) {
  for (int64_t i = 0; i < rows; ++i, x += kScoreRow) {
    __builtin_memset(x + round_up(n, kLanes), 0, kLanes * sizeof(E));
    if (before) __builtin_memset(x - kLanes, 0, kLanes * sizeof(E));
  }
}

// Gradients of the key head that `lead` is the first head of: its heads in turn, their blocks of
// queries in turn. `next` leads the key head that this thread takes next.
template <typename T>
static void attention_backward_head(const AttentionBackward& call, const Head<T>& lead,
                                    const Head<T>& next) {
  using E = typename OperandOf<T>::Type;
  constexpr int64_t per = elements_in<E>, kBlockQ = 22 * kStrip;
  const Sequence& sequence = lead.sequence;
  const int64_t head_dim = call.head_dim, head_dim_v = call.head_dim_v, seq_k = sequence.length_k;
  const int64_t width = round_up(head_dim, kPanel), width_v = round_up(head_dim_v, kPanel);
  const int64_t depth = count_of(head_dim, per), depth_v = count_of(head_dim_v, per);
  const int64_t padded_k = round_up(seq_k, kPanel);
  const int64_t panel_k = padded_k / per * kPanel, panel_q = kBlockQ / per * kPanel;
  float* memory = thread_scratch().floats(padded_k * (2 * width + width_v + depth + depth_v) +
                                          kBlockQ * (3 * width + 2 * width_v + 2 * kScoreRow) +
                                          2 * kStrip * kScoreRow);
  E* keys = reinterpret_cast<E*>(memory);
  E* keys_transposed = keys + padded_k * width;
  E* values_transposed = keys_transposed + padded_k * depth;
  // query and d_out are first factors by rows, and second ones whose k the rows are
  E* query = values_transposed + padded_k * depth_v;
  E* query_factor = query + kBlockQ * width;
  E* d_out = query_factor + kBlockQ * width;
  E* d_out_factor = d_out + kBlockQ * width_v;
  float* d_key = reinterpret_cast<float*>(d_out_factor + kBlockQ * width_v);
  float* d_value = d_key + padded_k * width;
  float* d_query = d_value + padded_k * width_v;
  E* weights = reinterpret_cast<E*>(d_query + kBlockQ * width);
  E* gradients = weights + kBlockQ * kScoreRow;
  float* strips = reinterpret_cast<float*>(gradients + kBlockQ * kScoreRow);

  const int64_t head_kv = lead.head_kv, group = call.heads_q / call.heads_kv;
  const T* key_rows = lead.rows(call.key, call.key_strides, head_kv, sequence.first_k);
  const T* value_rows = lead.rows(call.value, call.value_strides, head_kv, sequence.first_k);
  gather_factor(key_rows, call.key_strides.row, seq_k, head_dim, keys, panel_k);
  gather_columns(key_rows, call.key_strides.row, seq_k, head_dim, keys_transposed);
  gather_columns(value_rows, call.value_strides.row, seq_k, head_dim_v, values_transposed);
  for (int64_t i = 0; i < padded_k * (width + width_v); i += kLanes) store(d_key + i, F{});

  for (int64_t head_q = lead.head; head_q < lead.head + group; ++head_q) {
    const Head<T> head{call, sequence, head_q, head_kv};
    const T* query_rows = head.rows(call.query, call.query_strides, head_q, sequence.first_q);
    const T* out_rows = head.rows(call.out, call.out_strides, head_q, sequence.first_q);
    const T* d_out_rows = head.rows(call.d_out, call.d_out_strides, head_q, sequence.first_q);
    T* d_query_rows =
        const_cast<T*>(head.rows(call.d_query, call.d_query_strides, head_q, sequence.first_q));
    for (int64_t q0 = 0; q0 < sequence.length_q; q0 += kBlockQ) {
      const int64_t rows = sequence.length_q - q0 < kBlockQ ? sequence.length_q - q0 : kBlockQ;
      const T* query_block = query_rows + q0 * call.query_strides.row;
      const T* d_out_block = d_out_rows + q0 * call.d_out_strides.row;
      gather_rows(query_block, call.query_strides.row, rows, head_dim, 1.0f, query, width);
      gather_rows(d_out_block, call.d_out_strides.row, rows, head_dim_v, 1.0f, d_out, width_v);
      gather_factor(query_block, call.query_strides.row, rows, head_dim, query_factor, panel_q);
      gather_factor(d_out_block, call.d_out_strides.row, rows, head_dim_v, d_out_factor, panel_q);
      float delta[kBlockQ];
      for (int64_t i = 0; i < rows; ++i) {
        F sums = {};
        for (int64_t j = 0; j < head_dim_v; j += kLanes)
          sums += load(d_out_block + i * call.d_out_strides.row + j, head_dim_v - j) *
                  load(out_rows + (q0 + i) * call.out_strides.row + j, head_dim_v - j);
        delta[i] = sum(sums) - (call.d_lse ? call.d_lse[head.row(q0 + i)] : 0.0f);
      }
      for (int64_t i = 0; i < rows * width; i += kLanes) store(d_query + i, F{});
      head.template fetch<true>(call.d_query, call.d_query_strides, false, q0, rows, head_dim);
      head.template fetch<true>(call.d_key, call.d_key_strides, true, q0, rows, head_dim);
      head.template fetch<true>(call.d_value, call.d_value_strides, true, q0, rows, head_dim_v);
      const int64_t first = head.first_key(q0) / kBlockK * kBlockK;
      const int64_t last = head.last_key(q0 + rows - 1);
      for (int64_t k0 = first; k0 < last; k0 += kBlockK) {
        const bool fetches = &next != &lead && head_q == lead.head && k0 == first;
        for (int64_t m = 0; m < rows; m += kStrip) {
          const int64_t count = rows - m < kStrip ? rows - m : kStrip;
          const int64_t ahead = fetches ? count : 0;
          const Span span(head, q0 + m, count, k0);
          if (span.n <= 0) continue;
          E* weights_of_strip = weights + m / per * kScoreRow + span.begin - k0;
          E* gradients_of_strip = gradients + m / per * kScoreRow + span.begin - k0;
          // fp32 stays where it is
          float* scores = per == 1 ? reinterpret_cast<float*>(weights_of_strip) : strips;
          float* d_scores =
              per == 1 ? reinterpret_cast<float*>(gradients_of_strip) : strips + kStrip * kScoreRow;
          next.fetch(call.key, call.key_strides, true, q0 + m, ahead, head_dim);
          multiply(count, span.n, depth, query + m * width, width, 1,
                   keys_transposed + span.begin * depth, kPanel * depth, scores, kScoreRow, false);
          next.fetch(call.value, call.value_strides, true, q0 + m, ahead, head_dim_v);
          multiply(count, span.n, depth_v, d_out + m * width_v, width_v, 1,
                   values_transposed + span.begin * depth_v, kPanel * depth_v, d_scores, kScoreRow,
                   false);
          next.fetch(call.query, call.query_strides, false, q0 + m, ahead, head_dim);
          differentiate(head, call, q0 + m, count, span.begin, span.n, delta + m, scores, d_scores,
                        weights_of_strip, gradients_of_strip);
          next.fetch(call.out, call.out_strides, false, q0 + m, ahead, head_dim_v);
          // a strip of keys may reach beyond the panels that these queries see
          clear_beside(weights_of_strip, count_of(count, per), span.n, span.begin > k0);
          clear_beside(gradients_of_strip, count_of(count, per), span.n, span.begin > k0);
          multiply(count, head_dim, count_of(span.n, per), reinterpret_cast<const E*>(d_scores),
                   kScoreRow, 1, keys + span.begin / per * kPanel, panel_k, d_query + m * width,
                   width, true);
        }
        next.fetch(call.d_out, call.d_out_strides, false, q0, fetches ? rows : 0, head_dim_v);
        const int64_t end = last < k0 + kBlockK ? last : k0 + kBlockK;
        for (int64_t k = k0; k < end; k += kStrip) {
          const int64_t count = end - k < kStrip ? end - k : kStrip;
          int64_t m_begin = rows, m_end = 0;  // strips that see these keys follow one another
          for (int64_t m = 0; m < rows; m += kStrip) {
            const int64_t m_next = rows - m < kStrip ? rows : m + kStrip;
            const Span span(head, q0 + m, m_next - m, k0);
            if (span.n <= 0 || span.begin >= k + count || span.begin + span.n <= k) continue;
            m_begin = m < m_begin ? m : m_begin;
            m_end = m_next;
          }
          if (m_begin >= m_end) continue;
          const int64_t begin = m_begin / per, seen = count_of(m_end - m_begin, per);
          multiply(count, head_dim_v, seen, weights + begin * kScoreRow + k - k0, 1, kScoreRow,
                   d_out_factor + begin * kPanel, panel_q, d_value + k * width_v, width_v, true);
          multiply(count, head_dim, seen, gradients + begin * kScoreRow + k - k0, 1, kScoreRow,
                   query_factor + begin * kPanel, panel_q, d_key + k * width, width, true);
        }
      }
      for (int64_t i = 0; i < rows; ++i)
        for (int64_t j = 0; j < head_dim; j += kLanes)
          store(d_query_rows + (q0 + i) * call.d_query_strides.row + j,
                load(d_query + i * width + j) * call.scale, head_dim - j);
    }
  }
  T* d_key_rows =
      const_cast<T*>(lead.rows(call.d_key, call.d_key_strides, head_kv, sequence.first_k));
  T* d_value_rows =
      const_cast<T*>(lead.rows(call.d_value, call.d_value_strides, head_kv, sequence.first_k));
  for (int64_t k = 0; k < seq_k; ++k) {
    for (int64_t j = 0; j < head_dim; j += kLanes)
      store(d_key_rows + k * call.d_key_strides.row + j, load(d_key + k * width + j) * call.scale,
            head_dim - j);
    for (int64_t j = 0; j < head_dim_v; j += kLanes)
      store(d_value_rows + k * call.d_value_strides.row + j, load(d_value + k * width_v + j),
            head_dim_v - j);
  }
}

template <typename T>
static void attention_backward_of(const AttentionBackward& call) {
  const int64_t units = call.count * call.heads_kv, in_a_row = units_in_a_row(units);
  const auto lead_of = [&](int64_t unit) {
    const int64_t head_kv = unit % call.heads_kv;
    return Head<T>{call, call.sequences[unit / call.heads_kv],
                   head_kv * (call.heads_q / call.heads_kv), head_kv};
  };
#pragma omp parallel for schedule(dynamic, in_a_row)
  for (int64_t unit = 0; unit < units; ++unit) {
    const bool more = (unit + 1) % in_a_row > 0 && unit + 1 < units;
    const Head<T> lead = lead_of(unit), next = lead_of(more ? unit + 1 : unit);
    attention_backward_head(call, lead, more ? next : lead);
  }
}

static void attention_backward(const AttentionBackward& call) {
  call.type == DType::bf16 ? attention_backward_of<bf16>(call) : attention_backward_of<float>(call);
}
