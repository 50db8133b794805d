// The element-wise functions of enum Activation. After vector.inl.

// Value and derivative.
template <Activation activation>
LLMOS_INLINE F activate(F x, F* derivative) {
  const F zero = {};
  if constexpr (activation == Activation::relu) {
    *derivative = select(x > zero, splat(1.0f), zero);
    return select(x < zero, zero, x);
  } else if constexpr (activation == Activation::relu2) {
    const F y = select(x < zero, zero, x);
    *derivative = y + y;
    return y * y;
  } else if constexpr (activation == Activation::gelu) {
    F density;
    const F cdf = normal_cdf(x, &density);
    *derivative = cdf + x * density;
    return x * cdf;
  } else if constexpr (activation == Activation::gelu_tanh) {
    // 0.5 (1 + tanh(y)) = sigmoid(2 y)
    constexpr float twice_root = 1.5957691216f, cubic = 0.044715f;  // 2 sqrt(2 / pi)
    F other;
    const F s = sigmoid(twice_root * (x + cubic * x * x * x), &other);
    *derivative = s + x * s * other * twice_root * (1.0f + 3.0f * cubic * x * x);
    return x * s;
  } else {
    F other;
    const F s = sigmoid(x, &other);
    *derivative = s + x * s * other;
    return x * s;
  }
}
