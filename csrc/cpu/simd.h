// Vectors of the instruction set that a source is compiled for (HSV_ISA), over the compiler's vector extension.
//
// Sources that include this file live in namespace hsv::HSV_ISA and use no inline std:: templates: the linker keeps one
// copy of those for all instruction sets, which may be the one that the machine cannot run.
#pragma once

#include <stdint.h>
#include <string.h>

#define HSV_STRING_(x) #x
#define HSV_STRING(x) HSV_STRING_(x)
#define HSV_ISA_NAME HSV_STRING(HSV_ISA)
#define HSV_INLINE inline __attribute__((always_inline))

namespace hsv::HSV_ISA {

#if defined(__AVX512F__)
inline constexpr int kWidth = 16;
#elif defined(__AVX2__)
inline constexpr int kWidth = 8;
#else
inline constexpr int kWidth = 4;
#endif

typedef float Vec __attribute__((vector_size(kWidth * sizeof(float))));
typedef int32_t IVec __attribute__((vector_size(kWidth * sizeof(float))));

HSV_INLINE Vec splat(float x) {
  return Vec{} + x;
}
HSV_INLINE Vec load(const float* p) {
  Vec v;
  memcpy(&v, p, sizeof v);
  return v;
}
HSV_INLINE void store(float* p, Vec v) {
  memcpy(p, &v, sizeof v);
}
HSV_INLINE Vec max(Vec a, Vec b) {
  return a > b ? a : b;
}

HSV_INLINE float sum(Vec v) {
  float s = 0;
  for (int i = 0; i < kWidth; i++) s += v[i];
  return s;
}

// 2^x for x in [-126, 127]: x = n + f with n the nearest integer, a polynomial for 2^f, n added to the exponent.
// Relative error below 2e-7. Values below -126 give 2^-126 or less, never a NaN or a negative number.
HSV_INLINE Vec exp2(Vec x) {
  const float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to the nearest integer in the low mantissa bits
  x = max(x, splat(-126.0f));
  const Vec shifted = x + kRound;
  const Vec f = x - (shifted - kRound);
  Vec p = splat(1.5403530e-4f);
  p = p * f + 1.3333558e-3f;
  p = p * f + 9.6181291e-3f;
  p = p * f + 5.5504109e-2f;
  p = p * f + 2.4022651e-1f;
  p = p * f + 6.9314718e-1f;
  p = p * f + 1.0f;
  return (Vec)((IVec)p + ((IVec)shifted << 23));
}

}  // namespace hsv::HSV_ISA
