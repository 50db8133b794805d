// What follows the sums: scales, bias, activation, gate, residual. Include it inside a target region.
#pragma once

namespace llmos {
namespace {
namespace lanes {

#include "cpu/vector.inl"
// in this order: it builds on vectors
#include "cpu/activate.inl"

}  // namespace lanes

// Sums of one row of x by `count` weight rows from `first` on, and what is still to be multiplied.
struct Sums {
  const float* y;
  int64_t first, count;
  bool integers;            // y holds int32
  const float* row_scales;  // of all weight rows, or null
  float x_scale;
};

// Panel `panel` of the sums, scaled, with bias; lanes of columns that do not exist hold anything.
inline lanes::F scale_panel(const QuantMatmul& call, const Sums& sums, int64_t panel) {
  const float* y = sums.y + panel * kPanel;
  const int64_t column = sums.first + panel * kPanel, left = call.weight.n - column;
  lanes::F values = lanes::load(y);
  if (sums.integers) values = __builtin_convertvector((lanes::I)values, lanes::F);
  if (sums.row_scales != nullptr) values *= lanes::load(sums.row_scales + column, left);
  values *= sums.x_scale;
  if (call.bias != nullptr) values += lanes::load(call.bias + column, left);
  return values;
}

template <typename T, typename Activate>
void finish_row(const QuantMatmul& call, const Sums& sums, int64_t row, Activate activate) {
  const int step = call.gated ? 2 : 1;  // panels that give one panel of results
  const int64_t columns = call.weight.n / step;
  for (int64_t panel = 0; panel * kPanel < sums.count; panel += step) {
    lanes::F values = activate(scale_panel(call, sums, panel));
    if (call.gated) values *= scale_panel(call, sums, panel + 1);
    const int64_t column = (sums.first + panel * kPanel) / step, left = columns - column;
    const int64_t target = row * columns + column;
    if (call.residual != nullptr)
      values += lanes::load(static_cast<const T*>(call.residual) + target, left);
    lanes::store(static_cast<T*>(call.out) + target, values, left);
  }
}

template <Activation A, typename T>
void finish_row(const QuantMatmul& call, const Sums& sums, int64_t row) {
  finish_row<T>(call, sums, row, [](lanes::F x) {
    lanes::F derivative;
    return lanes::activate<A>(x, &derivative);
  });
}

template <typename T>
void finish_row(const QuantMatmul& call, const Sums& sums, int64_t row) {
  if (!call.activates) return finish_row<T>(call, sums, row, [](lanes::F x) { return x; });
  switch (call.activation) {
    case Activation::relu:
      return finish_row<Activation::relu, T>(call, sums, row);
    case Activation::relu2:
      return finish_row<Activation::relu2, T>(call, sums, row);
    case Activation::gelu:
      return finish_row<Activation::gelu, T>(call, sums, row);
    case Activation::gelu_tanh:
      return finish_row<Activation::gelu_tanh, T>(call, sums, row);
    case Activation::silu:
      return finish_row<Activation::silu, T>(call, sums, row);
  }
}

}  // namespace
}  // namespace llmos
