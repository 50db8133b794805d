// hidden = dropout(activation(gate) * up), and its gradients, in one pass each.

template <typename T, Activation activation>
static void activation_forward_rows(const ActivationForward& call) {
  const int64_t columns = call.columns;
#pragma omp parallel
  {
    float* factors = thread_scratch().floats(round_up(columns, 64));
#pragma omp for schedule(static)
    for (int64_t row = 0; row < call.rows; ++row) {
      const T* gate = static_cast<const T*>(call.gate) + row * columns;
      const T* up = call.up ? static_cast<const T*>(call.up) + row * columns : nullptr;
      T* hidden = static_cast<T*>(call.hidden) + row * columns;
      if (call.dropout.seed) dropout_factors(call.dropout, row, 0, columns, factors);
      for (int64_t i = 0; i < columns; i += kLanes) {
        const int64_t n = columns - i;
        F derivative, value = activate<activation>(load(gate + i, n), &derivative);
        if (up) value *= load(up + i, n);
        if (call.dropout.seed) value *= load(factors + i, n);
        store(hidden + i, value, n);
      }
    }
  }
}

template <typename T, Activation activation>
static void activation_backward_rows(const ActivationBackward& call) {
  const int64_t columns = call.columns;
#pragma omp parallel
  {
    float* factors = thread_scratch().floats(round_up(columns, 64));
#pragma omp for schedule(static)
    for (int64_t row = 0; row < call.rows; ++row) {
      const T* gate = static_cast<const T*>(call.gate) + row * columns;
      const T* up = call.up ? static_cast<const T*>(call.up) + row * columns : nullptr;
      const T* d_hidden = static_cast<const T*>(call.d_hidden) + row * columns;
      T* d_gate = static_cast<T*>(call.d_gate) + row * columns;
      T* d_up = up ? static_cast<T*>(call.d_up) + row * columns : nullptr;
      T* hidden = static_cast<T*>(call.hidden) + row * columns;
      if (call.dropout.seed) dropout_factors(call.dropout, row, 0, columns, factors);
      for (int64_t i = 0; i < columns; i += kLanes) {
        const int64_t n = columns - i;
        F derivative, value = activate<activation>(load(gate + i, n), &derivative);
        F gradient = load(d_hidden + i, n), product = value;
        F factor = call.dropout.seed ? load(factors + i, n) : splat(1.0f);
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
