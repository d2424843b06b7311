// HSV_HOST_DEVICE: functions that the kernels of csrc/cuda share with the host, inlined on both.
#pragma once

#ifdef __CUDACC__
#define HSV_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define HSV_HOST_DEVICE inline __attribute__((always_inline))
#endif
