#include <pthread.h>

#include <cstdlib>
#include <stdexcept>
#include <string>

#include "cpu/kernels.h"
#include "cpu/parallel.h"

namespace hsv {
namespace {

bool forked = false;
const int registered = pthread_atfork(nullptr, nullptr, [] { forked = true; });

bool has_avx512() {
#ifdef HSV_HAS_AVX512
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512cd");
#else
  return false;
#endif
}

bool has_avx2() {
#ifdef HSV_HAS_AVX2
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#else
  return false;
#endif
}

const Kernels& choose() {
  const char* named = std::getenv("HSV_CPU_ISA");
  const std::string wanted = named ? named : "";
#ifdef HSV_HAS_AVX512
  if (has_avx512() && (wanted.empty() || wanted == "avx512")) return avx512::kernels;
#endif
#ifdef HSV_HAS_AVX2
  if (has_avx2() && (wanted.empty() || wanted == "avx2")) return avx2::kernels;
#endif
  if (wanted.empty() || wanted == "portable") return portable::kernels;
  std::string allowed = "portable";
  if (has_avx2()) allowed += ", avx2";
  if (has_avx512()) allowed += ", avx512";
  throw std::runtime_error("HSV_CPU_ISA=" + wanted + " cannot be used on this machine; allowed: " + allowed);
}

}  // namespace

bool in_forked_child() {
  return registered == 0 && forked;
}

const Kernels& active_kernels() {
  static const Kernels& kernels = choose();
  return kernels;
}

}  // namespace hsv
