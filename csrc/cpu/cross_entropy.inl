// Loss and, in place, gradient of rows of logits. exp() is taken once per element.

template <typename T>
static void cross_entropy_rows(const CrossEntropy& call) {
  const int64_t classes = call.classes;
  const float smoothing = call.label_smoothing;
#pragma omp parallel
  {
    float* values = thread_scratch().floats(round_up(classes, kLanes));
#pragma omp for schedule(static)
    for (int64_t row = 0; row < call.rows; ++row) {
      T* logits = static_cast<T*>(call.logits) + row * classes;
      const int64_t target = call.target[row];
      if (target == call.ignore_index) {
        call.loss[row] = 0.0f;
        if (call.gradient)
          for (int64_t i = 0; i < classes; i += kLanes) store(logits + i, F{}, classes - i);
        continue;
      }
      F largest = splat(-__builtin_inff()), sums = {};
      for (int64_t i = 0; i < classes; i += kLanes) {
        F value = load(logits + i, classes - i);
        if (call.softcap > 0) value = call.softcap * tangent_hyperbolic(value / call.softcap);
        sums += first_lanes(value, classes - i, 0.0f);
        value = first_lanes(value, classes - i, -__builtin_inff());
        largest = maximum(largest, value);
        store(values + i, value);
      }
      const float top = maximum(largest), chosen = values[target], mean = sum(sums) / classes;
      F totals = {};
      for (int64_t i = 0; i < classes; i += kLanes) {
        const F weight = exponential(load(values + i) - top);
        totals += weight;
        // with a softcap the gradient needs the value again; log() of the weight would lose it
        if (call.gradient && !(call.softcap > 0)) store(values + i, weight);
      }
      const float total = sum(totals), lse = top + __builtin_logf(total);
      // in this order nothing cancels but what must
      call.loss[row] = (lse - chosen) + smoothing * (chosen - mean) + call.z_loss * lse * lse;
      if (!call.gradient) continue;
      const float scale = call.row_scale[row];
      const float by_probability = scale * (1.0f + 2.0f * call.z_loss * lse) / total;
      const float uniform = scale * smoothing / classes, by_target = scale * (1.0f - smoothing);
      for (int64_t i = 0; i < classes; i += kLanes) {
        const F value = load(values + i);
        const F weight = call.softcap > 0 ? exponential(value - top) : value;
        F gradient = weight * by_probability - uniform;
        if (target - i >= 0 && target - i < kLanes) gradient[target - i] -= by_target;
        if (call.softcap > 0) {
          const F capped = value / call.softcap;
          gradient *= 1.0f - capped * capped;
        }
        store(logits + i, gradient, classes - i);
      }
    }
  }
}

static void cross_entropy(const CrossEntropy& call) {
  call.type == DType::bf16 ? cross_entropy_rows<bf16>(call) : cross_entropy_rows<float>(call);
}
