// The activation, gate and dropout that follow the sums of a product, while a block of them lies in
// cache.

struct Block {
  int64_t row, rows, column, columns;
};

// Adds the bias, and rounds to T as the activation would read the sums from memory.
template <typename T>
LLMOS_INLINE void finish_sums(const T* bias, int64_t columns, float* sums, T* kept) {
  for (int64_t i = 0; i < columns; i += kLanes) {
    const int64_t n = columns - i;
    F value = load(sums + i);
    if (bias) value += load(bias + i, n);
    store(sums + i, rounded<T>(value));
    if (kept) store(kept + i, value, n);
  }
}

template <typename T, Activation activation>
static void finish_activated(const Product& call, const Block& block, float* sums, int64_t width) {
  const int64_t columns = block.columns;
  float* factors = call.dropout.seed ? thread_scratch<1>().floats(round_up(columns, 64)) : nullptr;
  for (int64_t i = 0; i < block.rows; ++i, sums += width) {
    const int64_t row = block.row + i;
    const auto place = [&](auto* x) {
      return x ? row_of<T>(x, row, call.columns) + block.column : nullptr;
    };
    if (factors) dropout_factors(call.dropout, row, block.column, columns, factors);
    if (call.finish == Finish::activate)
      activate_row<activation>(sums, static_cast<const T*>(nullptr), factors, columns,
                               place(call.out));
    else if (call.finish == Finish::gate)
      activate_row<activation>(place(call.gate), sums, factors, columns, place(call.out));
    else
      gradient_row<activation>(place(call.gate), place(call.up), sums, factors, columns,
                               place(call.out), place(call.d_up), place(call.hidden));
  }
}

template <typename T>
static void finish_block(const Product& call, const Block& block, float* sums, int64_t width) {
  const T* bias = call.bias ? static_cast<const T*>(call.bias) + block.column : nullptr;
  if (call.finish != Finish::gradients)
    for (int64_t i = 0; i < block.rows; ++i) {
      T* kept = row_of<T>(call.kept, block.row + i, call.columns);
      finish_sums(bias, block.columns, sums + i * width, kept ? kept + block.column : nullptr);
    }
  switch (call.activation) {
    case Activation::relu:
      return finish_activated<T, Activation::relu>(call, block, sums, width);
    case Activation::relu2:
      return finish_activated<T, Activation::relu2>(call, block, sums, width);
    case Activation::gelu:
      return finish_activated<T, Activation::gelu>(call, block, sums, width);
    case Activation::gelu_tanh:
      return finish_activated<T, Activation::gelu_tanh>(call, block, sums, width);
    case Activation::silu:
      return finish_activated<T, Activation::silu>(call, block, sums, width);
  }
}
