// What the vector units reach at best, for benchmarks to compare with.
#pragma once

namespace llmos {

// Multiplications and additions per second of all threads together, int8 into int32, in registers:
// vpdpbusd where the CPU has it; 0 where it has not.
double int8_peak();

}  // namespace llmos
