#include "common/cpu/isa.h"

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

namespace longrope {
namespace {

constexpr Isa kAll[] = {Isa::kScalar, Isa::kAvx2, Isa::kAvx512};

Isa parse(const char* name) {
  std::string supported;
  for (Isa isa : kAll) {
    if (isa > best_isa()) break;
    if (std::strcmp(name, isa_name(isa)) == 0) return isa;
    supported += supported.empty() ? "" : ", ";
    supported += isa_name(isa);
  }
  throw std::invalid_argument("isa: expected one of " + supported + " (this processor), got \"" +
                              name + "\"");
}

Isa initial() {
  const char* name = std::getenv("LONGROPE_ISA");
  return name && *name ? parse(name) : best_isa();
}

std::atomic<Isa>& current() {
  static std::atomic<Isa> isa{initial()};
  return isa;
}

}  // namespace

Isa best_isa() {
#if defined(__x86_64__)
  // The same features as the target pragmas of foreach_isa.h.
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("f16c")) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                   __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")
               ? Isa::kAvx512
               : Isa::kAvx2;
  }
#endif
  return Isa::kScalar;
}

Isa isa() { return current().load(std::memory_order_relaxed); }

void set_isa(const char* name) { current().store(parse(name), std::memory_order_relaxed); }

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::kAvx512:
      return "avx512";
    case Isa::kAvx2:
      return "avx2";
    default:
      return "scalar";
  }
}

}  // namespace longrope
