#include "cpu/dispatch.h"

#include <cstdlib>
#include <cstring>
#include <stdexcept>

#if defined(__aarch64__)
#include <sys/auxv.h>
#endif

namespace llmos {

namespace {

struct Set {
  const char* name;
  bool (*runs_here)();
};

bool always() { return true; }

// Best first.
constexpr Set kSets[] = {
#if defined(__x86_64__)
    {"avx512_bf16", cpu_has_avx512_bf16},
    {"avx512", cpu_has_avx512},
    {"avx2", cpu_has_avx2},
#elif defined(__aarch64__)
    {"neon_i8mm", cpu_has_neon_i8mm},
    {"neon_dotprod", cpu_has_neon_dotprod},
#endif
    {"generic", always},
};

std::string checked(const std::string& name) {
  if (name.empty()) return name;
  std::string names;
  for (const Set& set : kSets) {
    if (name == set.name) return name;
    names += std::string(set.name) + " ";
  }
  throw std::invalid_argument("LLMOS_FAST_CPU=" + name + " is not one of: " + names +
                              "(or empty for the best)");
}

std::string& forced_name() {
  static std::string name = [] {
    const char* value = std::getenv("LLMOS_FAST_CPU");
    return checked(value ? value : "");
  }();
  return name;
}

}  // namespace

const std::string& forced_cpu() { return forced_name(); }

void force_cpu(const std::string& name) { forced_name() = checked(name); }

bool cpu_allows(const char* name) {
  bool reached = forced_name().empty();
  for (const Set& set : kSets) {
    reached = reached || forced_name() == set.name;
    if (std::strcmp(set.name, name) == 0) return reached;
  }
  return false;
}

#if defined(__x86_64__)
bool cpu_has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

bool cpu_has_avx512() {
  return cpu_has_avx2() && __builtin_cpu_supports("avx512f") &&
         __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vl");
}

bool cpu_has_avx512_bf16() {
  return cpu_has_avx512_vnni() && __builtin_cpu_supports("avx512bf16");
}

bool cpu_has_avx512_vnni() { return cpu_has_avx512() && __builtin_cpu_supports("avx512vnni"); }
#elif defined(__aarch64__)
bool cpu_has_neon_dotprod() { return getauxval(AT_HWCAP) & HWCAP_ASIMDDP; }

bool cpu_has_neon_i8mm() {
  return cpu_has_neon_dotprod() && (getauxval(AT_HWCAP2) & HWCAP2_I8MM);
}
#endif

std::vector<std::string> cpu_sets() {
  std::vector<std::string> sets;
  for (const Set& set : kSets)
    if (set.runs_here()) sets.push_back(set.name);
  return sets;
}

}  // namespace llmos
