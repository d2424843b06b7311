// What this machine's arithmetic and memory can give at most, measured: the denominators of the benchmarks.
#pragma once

#include <stdint.h>

namespace hsv {

// Each runs for about `seconds` on `threads` threads, at most 1,024, and returns a rate of all of them together.
struct LimitKernels {
  double (*fma)(double seconds, int threads);           // float32 flops / s, a multiply-add being two
  double (*dot_bf16)(double seconds, int threads);      // the same of bfloat16 products summed in float32; 0: no such
  double (*exponentials)(double seconds, int threads);  // 2^x / s, on vectors in registers
  // Bytes read plus written / s, copying `bytes` from one array to another; these should exceed every cache.
  double (*copy)(void* to, const void* from, int64_t bytes, double seconds, int threads);
};

#ifdef HSV_ISA
namespace HSV_ISA {
LimitKernels limit_kernels();
}
#endif

}  // namespace hsv
