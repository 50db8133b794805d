// Run-time choice among the instruction sets that an op was compiled for.
#pragma once

#include <string>
#include <vector>

namespace llmos {

// The name that LLMOS_FAST_CPU asks for, or empty; force_cpu() replaces it.
const std::string& forced_cpu();
void force_cpu(const std::string& name);

// Names of the instruction sets of this project that the CPU has, best first, "generic" last.
std::vector<std::string> cpu_sets();

#if defined(__x86_64__)
bool cpu_has_avx2();
bool cpu_has_avx512();       // F, BW, DQ, VL
bool cpu_has_avx512_vnni();  // and VNNI
bool cpu_has_avx512_bf16();  // and BF16
#elif defined(__aarch64__)
bool cpu_has_neon_dotprod();
bool cpu_has_neon_i8mm();  // and dotprod
#endif

// Whether the set of that name may be chosen: it is the forced one, or below it.
bool cpu_allows(const char* name);

// A table of kernels has `const char* name` and `bool (*runs_here)()`. Tables come in order of
// preference and end with the generic one, which runs everywhere. A forced set that an op was not
// compiled for, or that the CPU lacks, gives the best one below it.
template <typename Table, size_t n>
const Table& choose(const Table* const (&tables)[n]) {
  for (const Table* table : tables)
    if (cpu_allows(table->name) && table->runs_here()) return *table;
  return *tables[n - 1];
}

}  // namespace llmos
