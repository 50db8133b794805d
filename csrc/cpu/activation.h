// The element-wise functions that kernels know by number.
#pragma once

namespace llmos {

enum class Activation : int { relu = 0, relu2 = 1, gelu = 2, gelu_tanh = 3, silu = 4 };

}  // namespace llmos
