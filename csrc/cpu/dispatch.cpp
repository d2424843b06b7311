#include "cpu/dispatch.h"

#include <pthread.h>

#include <cstdlib>
#include <stdexcept>
#include <string>

#include "cpu/parallel.h"
#ifdef HSV_HAS_AVX2
#include <cpuid.h>
#endif

namespace hsv {
namespace {

bool forked = false;
const int registered = pthread_atfork(nullptr, nullptr, [] { forked = true; });

#ifdef HSV_HAS_AVX2
// What FLAGS_avx2 of CMakeLists.txt let the compiler use. Not every compiler's __builtin_cpu_supports knows f16c.
bool has_avx2() {
  unsigned eax, ebx, ecx, edx;
  const bool f16c = __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx & bit_F16C);
  return f16c && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}
#endif

#ifdef HSV_HAS_AVX512
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512cd");
}
#endif

const Kernels& choose() {
  const std::vector<const Kernels*> usable = usable_kernels();
  const char* named = std::getenv("HSV_CPU_ISA");
  const std::string wanted = named ? named : "";
  if (wanted.empty()) return *usable.front();
  std::string allowed;
  for (const Kernels* kernels : usable) {
    if (wanted == kernels->isa) return *kernels;
    allowed += (allowed.empty() ? "" : ", ") + std::string(kernels->isa);
  }
  throw std::runtime_error("HSV_CPU_ISA=" + wanted + " cannot be used on this machine; allowed: " + allowed);
}

}  // namespace

bool in_forked_child() {
  return registered == 0 && forked;
}

std::vector<const Kernels*> usable_kernels() {
  std::vector<const Kernels*> usable;
#ifdef HSV_HAS_AVX512BF16
  if (has_avx512() && __builtin_cpu_supports("avx512bf16")) usable.push_back(&avx512bf16::kernels);
#endif
#ifdef HSV_HAS_AVX512
  if (has_avx512()) usable.push_back(&avx512::kernels);
#endif
#ifdef HSV_HAS_AVX2
  if (has_avx2()) usable.push_back(&avx2::kernels);
#endif
  usable.push_back(&portable::kernels);
  return usable;
}

const Kernels& active_kernels() {
  static const Kernels& kernels = choose();
  return kernels;
}

}  // namespace hsv
