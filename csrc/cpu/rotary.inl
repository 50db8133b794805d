// Rotation of feature pairs by the angle of their position.

LLMOS_INLINE float scalar(const float* p) { return *p; }
LLMOS_INLINE float scalar(const bf16* p) {
  const uint32_t bits = uint32_t(p->bits) << 16;
  float x;
  __builtin_memcpy(&x, &bits, sizeof x);
  return x;
}
LLMOS_INLINE void set_scalar(float* p, float x) { *p = x; }
LLMOS_INLINE void set_scalar(bf16* p, float x) { store(p, splat(x), 1); }

template <typename T>
static void rotate_rows(const Rotary& call) {
  const int64_t half = call.half, rows = call.batch * call.heads * call.seq;
#pragma omp parallel for schedule(static) if (rows * call.head_dim > kWorthThreads)
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t position = row % call.seq, head = row / call.seq % call.heads;
    const int64_t batch = row / call.seq / call.heads;
    const T* x = static_cast<const T*>(call.x) + batch * call.stride_batch +
                 head * call.stride_head + position * call.stride_seq;
    const int64_t token = batch * call.angle_stride_batch + position;
    const int64_t angle = call.positions.data ? call.positions[token] : token;
    const float *cos = call.cos + angle * half, *sin = call.sin + angle * half;
    T* out = static_cast<T*>(call.out) + row * call.head_dim;
    if (call.interleaved) {
      for (int64_t i = 0; i < half; ++i) {
        const float a = scalar(x + 2 * i), b = scalar(x + 2 * i + 1), s = sin[i] * call.sin_sign;
        set_scalar(out + 2 * i, a * cos[i] - b * s);
        set_scalar(out + 2 * i + 1, b * cos[i] + a * s);
      }
    } else {
      for (int64_t i = 0; i < half; i += kLanes) {
        const int64_t n = half - i;
        const F a = load(x + i, n), b = load(x + half + i, n);
        const F c = load(cos + i, n), s = load(sin + i, n) * call.sin_sign;
        store(out + i, a * c - b * s, n);
        store(out + half + i, b * c + a * s, n);
      }
    }
    __builtin_memcpy(out + 2 * half, x + 2 * half, (call.head_dim - 2 * half) * sizeof(T));
  }
}

static void rotary(const Rotary& call) {
  const int64_t tokens = call.positions.data ? call.batch * call.seq : 0;
  for (int64_t i = 0; i < tokens; ++i) {
    const int64_t token = i / call.seq * call.angle_stride_batch + i % call.seq;
    refuse_outside(call.positions[token], call.table_rows, "rotary: positions", "the rows of cos");
  }
  call.type == DType::bf16 ? rotate_rows<bf16>(call) : rotate_rows<float>(call);
}
