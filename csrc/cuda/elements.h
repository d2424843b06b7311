// Conversion of elements to and from float, on the device and, for tests, on the host.
#pragma once

#include "cpu/elements.h"
#include "host_device.h"

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace hsv::cuda {

HSV_HOST_DEVICE float widen(float x) {
  return x;
}

#ifdef __CUDACC__
HSV_HOST_DEVICE float widen(BFloat16 x) {
  return __bfloat162float(__nv_bfloat16(__nv_bfloat16_raw{x.bits}));
}
HSV_HOST_DEVICE float widen(Float16 x) {
  return __half2float(__half(__half_raw{x.bits}));
}

// Rounds to the nearest, ties to even.
HSV_HOST_DEVICE void narrow(float x, float* out) {
  *out = x;
}
HSV_HOST_DEVICE void narrow(float x, BFloat16* out) {
  out->bits = static_cast<__nv_bfloat16_raw>(__float2bfloat16_rn(x)).x;
}
HSV_HOST_DEVICE void narrow(float x, Float16* out) {
  out->bits = static_cast<__half_raw>(__float2half_rn(x)).x;
}
#else
inline float widen(BFloat16 x) {
  return HSV_ISA::widen(x);
}
inline float widen(Float16 x) {
  return HSV_ISA::widen(x);
}
template <class T>
void narrow(float x, T* out) {
  HSV_ISA::narrow(x, out);
}
#endif

}  // namespace hsv::cuda
