// Loads of 8-bit numbers as fp32; sign_extend comes from the file that includes this.

struct int8 {  // a type of this namespace, where templates look for its load
  int8_t value;
};

struct fp8 {  // e4m3fn
  uint8_t bits;
};

LLMOS_INLINE F load(const int8* p) {
  B x;
  __builtin_memcpy(&x, p, sizeof x);
  return __builtin_convertvector(sign_extend(x), F);
}

LLMOS_INLINE F load(const fp8* p) {
  B x;
  __builtin_memcpy(&x, p, sizeof x);
  const U bits = (U)sign_extend(x), magnitude = bits & 0x7fu;
  // exponent and mantissa where fp32 has them; exponent 0 has no leading 1: take it off again
  const U moved = magnitude << 20;
  const F normal = as_float(moved + (120u << 23));
  const F subnormal = as_float(moved + (121u << 23)) - 0.015625f;
  F result = select((I)(magnitude < 8u), subnormal, normal);
  result = select((I)(magnitude == 0x7fu), splat(__builtin_nanf("")), result);
  return as_float(as_bits(result) | (bits & 0x80000000u));
}
