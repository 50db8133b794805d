// total = residual + dropout(x); norm = normalised total. One pass over memory: a row stays in L1.

// n elements of x from the i-th on.
LLMOS_INLINE F load(const void* x, DType type, int64_t i, int64_t n) {
  return type == DType::bf16 ? load(static_cast<const bf16*>(x) + i, n)
                             : load(static_cast<const float*>(x) + i, n);
}

template <typename X, typename T>
static void add_norm_forward_rows(const AddNormForward& call) {
  const int64_t columns = call.columns;
#pragma omp parallel if (call.rows * columns > kWorthThreads)
  {
    float* row_buffer = thread_scratch().floats(2 * round_up(columns, 64));
    float* factors = row_buffer + round_up(columns, 64);
#pragma omp for schedule(static)
    for (int64_t row = 0; row < call.rows; ++row) {
      const int64_t position = row % call.seq, head = row / call.seq % call.heads;
      const int64_t batch = row / call.seq / call.heads;
      const X* x = static_cast<const X*>(call.x) + batch * call.stride_batch +
                   head * call.stride_head + position * call.stride_seq;
      const T* residual =
          call.residual ? static_cast<const T*>(call.residual) + row * columns : nullptr;
      T* total = static_cast<T*>(call.total) + row * columns;
      if (call.dropout.seed) dropout_factors(call.dropout, row, 0, columns, factors);
      F sums = {};
      for (int64_t i = 0; i < columns; i += kLanes) {
        const int64_t n = columns - i;
        F value = load(x + i, n);
        if (call.dropout.seed) value *= load(factors + i, n);
        if (residual) value += load(residual + i, n);
        value = rounded<T>(value);
        store(total + i, value, n);
        store(row_buffer + i, value);
        sums += first_lanes(value, n, 0.0f);
      }
      if (!call.norm) continue;
      const float mean = call.rms ? 0.0f : sum(sums) / columns;
      F squares = {};
      for (int64_t i = 0; i < columns; i += kLanes) {
        const F centred = first_lanes(load(row_buffer + i) - mean, columns - i, 0.0f);
        squares += centred * centred;
      }
      const float rstd = 1.0f / __builtin_sqrtf(sum(squares) / columns + call.eps);
      if (!call.rms) call.mean[row] = mean;
      call.rstd[row] = rstd;
      T* norm = static_cast<T*>(call.norm) + row * columns;
      for (int64_t i = 0; i < columns; i += kLanes) {
        const int64_t n = columns - i;
        F value = (load(row_buffer + i) - mean) * rstd;
        if (call.weight) value *= load(call.weight, call.weight_type, i, n);
        if (call.bias) value += load(call.bias, call.bias_type, i, n);
        store(norm + i, value, n);
      }
    }
  }
}

constexpr int64_t kSumParts = 64;

template <typename X, typename T>
static void add_norm_backward_rows(const AddNormBackward& call) {
  const int64_t columns = call.columns, padded = round_up(columns, 64);
  // fixed blocks of rows, so that the sums do not depend on the number of threads
  const int64_t parts = call.rows < kSumParts ? call.rows : kSumParts;
  float* sums = thread_scratch<1>().floats(2 * parts * padded);
#pragma omp parallel if (call.rows * columns > kWorthThreads)
  {
    float* factors = thread_scratch().floats(padded);
#pragma omp for schedule(static)
    for (int64_t part = 0; part < parts; ++part) {
      float* sum_weight = sums + 2 * part * padded;
      float* sum_bias = sum_weight + padded;
      for (int64_t i = 0; i < 2 * padded; i += kLanes) store(sum_weight + i, F{});
      const int64_t begin = call.rows * part / parts;
      const int64_t end = call.rows * (part + 1) / parts;
      for (int64_t row = begin; row < end; ++row) {
        const T* d_norm =
            call.d_norm ? static_cast<const T*>(call.d_norm) + row * columns : nullptr;
        const T* d_in =
            call.d_total_in ? static_cast<const T*>(call.d_total_in) + row * columns : nullptr;
        const T* total = static_cast<const T*>(call.total) + row * columns;
        const float mean = d_norm && !call.rms ? call.mean[row] : 0.0f;
        const float rstd = d_norm ? call.rstd[row] : 0.0f;
        F sum_gradient = {}, sum_product = {};
        for (int64_t i = 0; d_norm && i < columns; i += kLanes) {
          const int64_t n = columns - i;
          const F normal = first_lanes((load(total + i, n) - mean) * rstd, n, 0.0f);
          F gradient = load(d_norm + i, n);
          store(sum_weight + i, load(sum_weight + i) + gradient * normal);
          store(sum_bias + i, load(sum_bias + i) + gradient);
          if (call.weight) gradient *= load(call.weight + i, n);
          sum_gradient += gradient;
          sum_product += gradient * normal;
        }
        const float mean_gradient = call.rms ? 0.0f : sum(sum_gradient) / columns;
        const float mean_product = sum(sum_product) / columns;
        if (call.dropout.seed) dropout_factors(call.dropout, row, 0, columns, factors);
        for (int64_t i = 0; i < columns; i += kLanes) {
          const int64_t n = columns - i;
          F d_total = d_in ? load(d_in + i, n) : F{};
          if (d_norm) {
            const F normal = (load(total + i, n) - mean) * rstd;
            F gradient = load(d_norm + i, n);
            if (call.weight) gradient *= load(call.weight + i, n);
            d_total += (gradient - mean_gradient - normal * mean_product) * rstd;
          }
          if (call.d_residual)
            store(static_cast<T*>(call.d_residual) + row * columns + i, d_total, n);
          if (!call.d_x) continue;
          if (call.dropout.seed) d_total *= load(factors + i, n);
          store(static_cast<X*>(call.d_x) + row * columns + i, d_total, n);
        }
      }
    }
#pragma omp for schedule(static)
    for (int64_t i = 0; i < columns; i += kLanes) {
      F sum_weight = {}, sum_bias = {};
      for (int64_t part = 0; part < parts; ++part) {
        sum_weight += load(sums + 2 * part * padded + i);
        sum_bias += load(sums + (2 * part + 1) * padded + i);
      }
      store(call.d_weight + i, sum_weight, columns - i);
      store(call.d_bias + i, sum_bias, columns - i);
    }
  }
}

static void add_norm_forward(const AddNormForward& call) {
  if (call.type == DType::bf16) return add_norm_forward_rows<bf16, bf16>(call);
  if (call.x_type == DType::bf16) return add_norm_forward_rows<bf16, float>(call);
  add_norm_forward_rows<float, float>(call);
}

static void add_norm_backward(const AddNormBackward& call) {
  if (call.type == DType::bf16) return add_norm_backward_rows<bf16, bf16>(call);
  if (call.x_type == DType::bf16) return add_norm_backward_rows<bf16, float>(call);
  add_norm_backward_rows<float, float>(call);
}
