// Rows of a table, with positions and dropout; and the gradients of table and positions.

template <typename T>
static void embed(const EmbeddingForward& call) {
  const EmbeddingRows& r = call.of;
#pragma omp parallel for schedule(static) if (r.count * r.width > kWorthThreads)
  for (int64_t i = 0; i < r.count; ++i) {
    float* factors = r.dropout.seed ? thread_scratch<1>().floats(round_up(r.width, 64)) : nullptr;
    if (factors) dropout_factors(r.dropout, i, 0, r.width, factors);
    const T* row = row_of<T>(call.table, r.ids[i], call.stride);
    const T* position = row_of<T>(call.positions, r.position(i), r.width);
    T* out = row_of<T>(call.out, i, r.width);
    for (int64_t c = 0; c < r.width; c += kLanes) {
      const int64_t n = r.width - c;
      F x = load(row + c, n) * r.scale;
      if (position) x += load(position + c, n);
      if (factors) x *= load(factors + c);
      store(out + c, x, n);
    }
  }
}

static void embedding_forward(const EmbeddingForward& call) {
  for (int64_t i = 0; i < call.of.count; ++i)
    refuse_outside(call.of.ids[i], call.of.rows, "embedding: ids", "the rows of weight");
  if (call.of.width == 0) return;  // nothing may be added to null, nor may it be filled
  call.of.type == DType::bf16 ? embed<bf16>(call) : embed<float>(call);
}

// sum += scale * row i of d_out, as dropout left it.
template <typename T>
LLMOS_INLINE void add_gradient(const EmbeddingBackward& call, int64_t i, float scale, float* sum) {
  const EmbeddingRows& r = call.of;
  const T* d_out = row_of<T>(call.d_out, i, r.width);
  float* factors = r.dropout.seed ? thread_scratch<1>().floats(round_up(r.width, 64)) : nullptr;
  if (factors) dropout_factors(r.dropout, i, 0, r.width, factors);
  for (int64_t c = 0; c < r.width; c += kLanes) {
    const int64_t n = r.width - c;
    F x = load(d_out + c, n) * scale;
    if (factors) x *= load(factors + c);
    store(sum + c, load(sum + c, n) + x, n);
  }
}

// A row's sum is one thread's, in the order of the ids. Neighbours, which are as frequent in most
// vocabularies, go to different units.
template <typename T>
static void embed_backward(const EmbeddingBackward& call) {
  const EmbeddingRows& r = call.of;
  const int64_t units = 4 * omp_get_max_threads();
#pragma omp parallel if (r.rows * r.width > kWorthThreads)
  {
#pragma omp for schedule(static)
    for (int64_t row = 0; row < r.rows; ++row)
      __builtin_memset(call.d_table + row * r.width, 0, r.width * sizeof(float));
#pragma omp for schedule(dynamic)
    for (int64_t unit = 0; unit < units; ++unit)
      for (int64_t i = 0; i < r.count; ++i)
        if (r.ids[i] % units == unit)
          add_gradient<T>(call, i, r.scale, call.d_table + r.ids[i] * r.width);
    if (call.d_positions) {
#pragma omp for schedule(static)
      for (int64_t position = 0; position < r.seq; ++position) {
        float* sum = call.d_positions + position * r.width;
        __builtin_memset(sum, 0, r.width * sizeof(float));
        for (int64_t i = position * r.inner; i < r.count; i += r.seq * r.inner)
          for (int64_t k = 0; k < r.inner; ++k) add_gradient<T>(call, i + k, 1.0f, sum);
      }
    }
  }
}

static void embedding_backward(const EmbeddingBackward& call) {
  if (call.of.width == 0) return;
  call.of.type == DType::bf16 ? embed_backward<bf16>(call) : embed_backward<float>(call);
}
