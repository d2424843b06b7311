// Vectors of bfloat16 and float16 elements: loaded as float, stored rounded to the nearest, ties to even.
#pragma once

#include "cpu/elements.h"
#include "cpu/simd.h"
#if defined(__F16C__)
#include <immintrin.h>
#endif

namespace hsv::HSV_ISA {

typedef uint32_t UVec __attribute__((vector_size(kWidth * sizeof(uint32_t))));
typedef uint16_t HalfVec __attribute__((vector_size(kWidth * sizeof(uint16_t))));

// Half bits, zero-extended, to float: exact, subnormal numbers and infinities included.
HSV_INLINE UVec half_to_float_bits(UVec h) {
  const UVec shifted = (h & 0x7fff) << 13, exponent = shifted & (0x7c00u << 13);
  UVec bits = shifted + (112u << 23);
  bits = exponent == (0x7c00u << 13) ? bits + (112u << 23) : bits;
  const UVec smallest = (UVec{} + (113u << 23));
  const UVec subnormal = (UVec)((Vec)(bits + (1u << 23)) - (Vec)smallest);
  return (exponent == 0 ? subnormal : bits) | (h & 0x8000) << 16;
}

// Float bits to half, to nearest and ties to even; NaN stays NaN.
HSV_INLINE UVec float_to_half_bits(UVec f) {
  const UVec sign = f >> 16 & 0x8000;
  f &= 0x7fffffff;
  const UVec overflow = f > 0x7f800000u ? UVec{} + 0x7e00u : UVec{} + 0x7c00u;
  const UVec half = UVec{} + (126u << 23);
  const UVec subnormal = (UVec)((Vec)f + (Vec)half) - half;
  const UVec normal = (f + ((f >> 13 & 1) + 0xfff) - (112u << 23)) >> 13;
  const UVec small = f < (113u << 23) ? subnormal : normal;
  return (f >= (143u << 23) ? overflow : small) | sign;
}

// Float bits to bfloat16, to nearest and ties to even; NaN stays NaN.
HSV_INLINE UVec float_to_bfloat16_bits(UVec f) {
  const UVec rounded = (f + 0x7fff + (f >> 16 & 1)) >> 16;
  return (f & 0x7fffffff) > 0x7f800000u ? f >> 16 | 0x40 : rounded;
}

HSV_INLINE UVec load_bits(const void* p) {
  HalfVec v;
  memcpy(&v, p, sizeof v);
  return __builtin_convertvector(v, UVec);
}
HSV_INLINE void store_bits(void* p, UVec bits) {
  const HalfVec v = __builtin_convertvector(bits, HalfVec);
  memcpy(p, &v, sizeof v);
}

HSV_INLINE Vec load(const BFloat16* p) {
  return (Vec)(load_bits(p) << 16);
}
HSV_INLINE void store(BFloat16* p, Vec v) {
  store_bits(p, float_to_bfloat16_bits((UVec)v));
}

// The zero-masked forms, all lanes on: g++ 12 warns of an uninitialised value inside the plain ones.
#if defined(__AVX512F__)
HSV_INLINE Vec load(const Float16* p) {
  return (Vec)_mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256((const __m256i*)p));
}
HSV_INLINE void store(Float16* p, Vec v) {
  _mm256_storeu_si256((__m256i*)p, _mm512_maskz_cvtps_ph(0xffff, (__m512)v, _MM_FROUND_TO_NEAREST_INT));
}
#elif defined(__F16C__)
HSV_INLINE Vec load(const Float16* p) {
  return (Vec)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
}
HSV_INLINE void store(Float16* p, Vec v) {
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
}
#else
HSV_INLINE Vec load(const Float16* p) {
  return (Vec)half_to_float_bits(load_bits(p));
}
HSV_INLINE void store(Float16* p, Vec v) {
  store_bits(p, float_to_half_bits((UVec)v));
}
#endif

// A formula over arrays is written once, for a reader `at`, and runs over whole vectors and over what remains.
struct VectorAt {
  int64_t i;
  template <class E>
  HSV_INLINE auto operator()(const E* x) const {
    return load(x + i);
  }
};
struct ElementAt {
  int64_t i;
  template <class E>
  HSV_INLINE auto operator()(const E* x) const {
    return widen(x[i]);
  }
};

}  // namespace hsv::HSV_ISA
