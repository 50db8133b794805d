// hidden = dropout(activation(gate) * up), and its gradients, in one pass each.

// A row. Factors of dropout and up may be null; in and out of type float are not rounded.
template <Activation activation, typename G, typename V, typename T>
LLMOS_INLINE void activate_row(const G* gate, const V* up, const float* factors, int64_t columns,
                               T* hidden) {
  for (int64_t i = 0; i < columns; i += kLanes) {
    const int64_t n = columns - i;
    F derivative, value = activate<activation>(load(gate + i, n), &derivative);
    if (up) value *= load(up + i, n);
    if (factors) value *= load(factors + i);
    store(hidden + i, value, n);
  }
}

template <Activation activation, typename D, typename T>
LLMOS_INLINE void gradient_row(const T* gate, const T* up, const D* d_hidden, const float* factors,
                               int64_t columns, T* d_gate, T* d_up, T* hidden) {
  for (int64_t i = 0; i < columns; i += kLanes) {
    const int64_t n = columns - i;
    F derivative, value = activate<activation>(load(gate + i, n), &derivative);
    F gradient = load(d_hidden + i, n), product = value;
    const F factor = factors ? load(factors + i) : splat(1.0f);
    gradient *= factor;
    if (up) {
      const F other = load(up + i, n);
      store(d_up + i, gradient * value, n);
      gradient *= other;
      product *= other;
    }
    store(d_gate + i, gradient * derivative, n);
    store(hidden + i, product * factor, n);
  }
}

// Row `row` of a contiguous tensor that may be null.
template <typename T>
LLMOS_INLINE const T* row_of(const void* x, int64_t row, int64_t columns) {
  return x ? static_cast<const T*>(x) + row * columns : nullptr;
}
template <typename T>
LLMOS_INLINE T* row_of(void* x, int64_t row, int64_t columns) {
  return x ? static_cast<T*>(x) + row * columns : nullptr;
}

template <typename T, Activation activation>
static void activation_forward_rows(const ActivationForward& call) {
  const int64_t columns = call.columns;
#pragma omp parallel
  {
    float* factors = call.dropout.seed ? thread_scratch().floats(round_up(columns, 64)) : nullptr;
#pragma omp for schedule(static)
    for (int64_t row = 0; row < call.rows; ++row) {
      if (factors) dropout_factors(call.dropout, row, 0, columns, factors);
      activate_row<activation>(row_of<T>(call.gate, row, columns), row_of<T>(call.up, row, columns),
                               factors, columns, row_of<T>(call.hidden, row, columns));
    }
  }
}

template <typename T, Activation activation>
static void activation_backward_rows(const ActivationBackward& call) {
  const int64_t columns = call.columns;
#pragma omp parallel
  {
    float* factors = call.dropout.seed ? thread_scratch().floats(round_up(columns, 64)) : nullptr;
#pragma omp for schedule(static)
    for (int64_t row = 0; row < call.rows; ++row) {
      if (factors) dropout_factors(call.dropout, row, 0, columns, factors);
      gradient_row<activation>(row_of<T>(call.gate, row, columns), row_of<T>(call.up, row, columns),
                               row_of<T>(call.d_hidden, row, columns), factors, columns,
                               row_of<T>(call.d_gate, row, columns),
                               row_of<T>(call.d_up, row, columns),
                               row_of<T>(call.hidden, row, columns));
    }
  }
}

template <typename T>
static void activation_forward_of(const ActivationForward& call) {
  switch (call.activation) {
    case Activation::relu:
      return activation_forward_rows<T, Activation::relu>(call);
    case Activation::relu2:
      return activation_forward_rows<T, Activation::relu2>(call);
    case Activation::gelu:
      return activation_forward_rows<T, Activation::gelu>(call);
    case Activation::gelu_tanh:
      return activation_forward_rows<T, Activation::gelu_tanh>(call);
    case Activation::silu:
      return activation_forward_rows<T, Activation::silu>(call);
  }
}

template <typename T>
static void activation_backward_of(const ActivationBackward& call) {
  switch (call.activation) {
    case Activation::relu:
      return activation_backward_rows<T, Activation::relu>(call);
    case Activation::relu2:
      return activation_backward_rows<T, Activation::relu2>(call);
    case Activation::gelu:
      return activation_backward_rows<T, Activation::gelu>(call);
    case Activation::gelu_tanh:
      return activation_backward_rows<T, Activation::gelu_tanh>(call);
    case Activation::silu:
      return activation_backward_rows<T, Activation::silu>(call);
  }
}

static void activation_forward(const ActivationForward& call) {
  call.type == DType::bf16 ? activation_forward_of<bf16>(call) : activation_forward_of<float>(call);
}

static void activation_backward(const ActivationBackward& call) {
  call.type == DType::bf16 ? activation_backward_of<bf16>(call)
                           : activation_backward_of<float>(call);
}
