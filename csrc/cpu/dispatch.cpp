#include "cpu/dispatch.h"

#include <cstdlib>
#include <stdexcept>

namespace llmos {

namespace {

std::string checked(const std::string& name) {
  if (name.empty() || name == "avx512" || name == "avx2" || name == "generic") return name;
  throw std::invalid_argument("LLMOS_FAST_CPU=" + name +
                              " is not one of: avx512 avx2 generic (or empty for the best)");
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

#if defined(__x86_64__)
bool cpu_has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

bool cpu_has_avx512() {
  return cpu_has_avx2() && __builtin_cpu_supports("avx512f") &&
         __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vl");
}

bool cpu_has_avx512_vnni() { return cpu_has_avx512() && __builtin_cpu_supports("avx512vnni"); }
#else
bool cpu_has_avx2() { return false; }
bool cpu_has_avx512() { return false; }
bool cpu_has_avx512_vnni() { return false; }
#endif

std::vector<std::string> cpu_sets() {
  std::vector<std::string> sets;
  if (cpu_has_avx512()) sets.push_back("avx512");
  if (cpu_has_avx2()) sets.push_back("avx2");
  sets.push_back("generic");
  return sets;
}

}  // namespace llmos
