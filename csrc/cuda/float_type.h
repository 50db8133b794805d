// The floating-point types of activations and results, by number.
#pragma once

namespace llmos {

enum class FloatType : int { kFp32 = 0, kBf16 = 1, kFp16 = 2 };

}  // namespace llmos
