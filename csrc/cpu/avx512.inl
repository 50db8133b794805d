// The kernels for 32 registers of 512 bits; inside a target region and a namespace.

// 24 sums, 2 vectors of b and the broadcast element in 32 registers.
constexpr int kTileRows = 12, kTileVectors = 2, kRegisterLanes = 16;

#include "cpu/vector.inl"

LLMOS_INLINE L multiply_even(U a, U b) { return (L)_mm512_mul_epu32((__m512i)a, (__m512i)b); }

LLMOS_INLINE I sign_extend(B x) { return (I)_mm512_cvtepi8_epi32((__m128i)x); }

#include "cpu/kernels.inl"
