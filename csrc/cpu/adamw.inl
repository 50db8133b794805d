// Every number of a model is read once for the norm of its gradient and read and written once for
// the step, 32 bytes in fp32, in blocks that are the same for any number of threads.

// body(tensors, block, begin, end) for the numbers [begin, end) of each block.
template <typename Body>
static void for_each_block(const OptimizerTensors* tensors, int64_t blocks, const Body& body) {
#pragma omp parallel if (blocks > 1)
  {
    const OptimizerTensors* x = tensors;
#pragma omp for schedule(static)
    for (int64_t block = 0; block < blocks; ++block) {
      while (block >= x->first_block + blocks_of(x->count)) ++x;
      const int64_t begin = (block - x->first_block) * kOptimizerBlock;
      const int64_t end = begin + kOptimizerBlock;
      body(*x, block, begin, end < x->count ? end : x->count);
    }
  }
}

LLMOS_INLINE F square_root(F x) {
  for (int i = 0; i < kLanes; ++i) x[i] = __builtin_sqrtf(x[i]);
  return x;
}

template <typename T>
static void adamw_block(const AdamW& call, const OptimizerTensors& x, int64_t begin, int64_t end) {
  T *parameter = static_cast<T*>(x.parameter), *exp_avg = static_cast<T*>(x.exp_avg);
  T* exp_avg_sq = static_cast<T*>(x.exp_avg_sq);
  const T* gradient = static_cast<const T*>(x.gradient);
  for (int64_t i = begin; i < end; i += kLanes) {
    const int64_t n = end - i;
    const F g = load(gradient + i, n) * call.gradient_factor;
    F m = load(exp_avg + i, n);
    m += (g - m) * call.exp_avg_share;
    const F v = load(exp_avg_sq + i, n) * call.beta2 + g * g * call.exp_avg_sq_share;
    const F p = load(parameter + i, n) * call.decay;
    store(exp_avg + i, m, n);
    store(exp_avg_sq + i, v, n);
    store(parameter + i, p - x.rate * (m / (square_root(v) * x.root_factor + call.eps)), n);
  }
}

template <typename T>
static float square_sum(const T* x, int64_t begin, int64_t end) {
  F sums = {};
  for (int64_t i = begin; i < end; i += kLanes) {
    const F value = load(x + i, end - i);
    sums += value * value;
  }
  return sum(sums);
}

static void adamw(const AdamW& call) {
  for_each_block(call.tensors, call.blocks,
                 [&](const OptimizerTensors& x, int64_t, int64_t begin, int64_t end) {
                   if (x.type == DType::bf16) return adamw_block<bf16>(call, x, begin, end);
                   adamw_block<float>(call, x, begin, end);
                 });
}

static void square_sums(const SquareSums& call) {
  for_each_block(call.tensors, call.blocks,
                 [&](const OptimizerTensors& x, int64_t block, int64_t begin, int64_t end) {
                   call.sums[block] =
                       x.type == DType::bf16
                           ? square_sum(static_cast<const bf16*>(x.gradient), begin, end)
                           : square_sum(static_cast<const float*>(x.gradient), begin, end);
                 });
}
