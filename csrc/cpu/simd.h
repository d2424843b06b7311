// Vectors of the instruction set that a source is compiled for (HSV_ISA), over the compiler's vector extension.
//
// Sources that include this file live in namespace hsv::HSV_ISA and use no inline std:: templates: the linker keeps one
// copy of those for all instruction sets, which may be the one that the machine cannot run.
#pragma once

#include <stdint.h>
#include <string.h>
#if defined(__SSE2__)
#include <immintrin.h>
#endif

#define HSV_STRING_(x) #x
#define HSV_STRING(x) HSV_STRING_(x)
#define HSV_ISA_NAME HSV_STRING(HSV_ISA)
#define HSV_INLINE inline __attribute__((always_inline))
#define HSV_INLINE_LAMBDA __attribute__((always_inline))
#ifdef __clang__
#define HSV_UNROLL _Pragma("unroll")
#else
#define HSV_UNROLL _Pragma("GCC unroll 16")
#endif

namespace hsv::HSV_ISA {

#if defined(__AVX512F__)
inline constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
inline constexpr int kVectorBytes = 32;
#else
inline constexpr int kVectorBytes = 16;
#endif

inline constexpr double kLn2 = 0.69314718055994530942;

template <class T>
struct VectorTypes;
template <>
struct VectorTypes<float> {
  typedef float Values __attribute__((vector_size(kVectorBytes)));
  typedef int32_t Bits __attribute__((vector_size(kVectorBytes)));
};
template <>
struct VectorTypes<double> {
  typedef double Values __attribute__((vector_size(kVectorBytes)));
  typedef int64_t Bits __attribute__((vector_size(kVectorBytes)));
};

template <class T>
using Vector = typename VectorTypes<T>::Values;
template <class T>
inline constexpr int kLanes = kVectorBytes / sizeof(T);

using Vec = Vector<float>;
using IVec = VectorTypes<float>::Bits;
inline constexpr int kWidth = kLanes<float>;

template <class T>
HSV_INLINE Vector<T> splat(T x) {
  return x - Vector<T>{};  // folds to a broadcast, which a sum with 0 would not: -0 + 0 is 0
}
template <class T>
HSV_INLINE Vector<T> load(const T* p) {
  Vector<T> v;
  memcpy(&v, p, sizeof v);
  return v;
}
template <class T>
HSV_INLINE void store(T* p, Vector<T> v) {
  memcpy(p, &v, sizeof v);
}

// Stores past the caches, to an address that is a multiple of kVectorBytes: for what nobody reads while a cache would
// keep it. Another thread sees it after a fence.
template <class T>
HSV_INLINE void stream(T* p, Vector<T> v) {
#if defined(__AVX512F__)
  _mm512_stream_si512(reinterpret_cast<__m512i*>(p), (__m512i)v);
#elif defined(__AVX2__)
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), (__m256i)v);
#elif defined(__SSE2__)
  _mm_stream_si128(reinterpret_cast<__m128i*>(p), (__m128i)v);
#else
  store(p, v);
#endif
}
HSV_INLINE void fence_streams() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

// The greater of a and b in each lane; b where either is NaN.
template <class V>
HSV_INLINE V max(V a, V b) {
  return a > b ? a : b;
}

template <class T, int N>
struct FewerLanes {
  typedef T Values __attribute__((vector_size(N * sizeof(T))));
};

// Folds the upper half of the lanes on the lower, down to one: the order is fixed.
template <class T, int N = kLanes<T>, class V, class F>
HSV_INLINE T fold(V v, const F& f) {
  if constexpr (N == 2) {
    return f(v[0], v[1]);
  } else {
    typename FewerLanes<T, N / 2>::Values low, high;
    memcpy(&low, &v, sizeof low);
    memcpy(&high, reinterpret_cast<const char*>(&v) + sizeof low, sizeof high);
    return fold<T, N / 2>(f(low, high), f);
  }
}
HSV_INLINE float sum(Vector<float> v) {
  return fold<float>(v, [](auto a, auto b) HSV_INLINE_LAMBDA { return a + b; });
}
HSV_INLINE double sum(Vector<double> v) {
  return fold<double>(v, [](auto a, auto b) HSV_INLINE_LAMBDA { return a + b; });
}
HSV_INLINE float max_lane(Vector<float> v) {
  return fold<float>(v, [](auto a, auto b) HSV_INLINE_LAMBDA { return a > b ? a : b; });
}
HSV_INLINE double max_lane(Vector<double> v) {
  return fold<double>(v, [](auto a, auto b) HSV_INLINE_LAMBDA { return a > b ? a : b; });
}

// 2^f for |f| ≤ ½: for float the polynomial of least greatest error, for double Taylor's.
HSV_INLINE Vector<float> exp2_of_fraction(Vector<float> f) {
  Vector<float> p = splat(1.5345812e-4f);
  p = p * f + 1.3399931e-3f;
  p = p * f + 9.6184891e-3f;
  p = p * f + 5.5503286e-2f;
  p = p * f + 2.4022646e-1f;
  p = p * f + 6.9314718e-1f;
  return p * f + 1.0f;
}
HSV_INLINE Vector<double> exp2_of_fraction(Vector<double> f) {
  constexpr double kTaylor[] = {1.36915488853904124e-12, 2.56784359934882042e-11,
                                4.44553827187081007e-10, 7.05491162080112288e-09,
                                1.01780860092396960e-07, 1.32154867901443053e-06,
                                1.52527338040598377e-05, 1.54035303933816061e-04,
                                1.33335581464284411e-03, 9.61812910762847687e-03,
                                5.55041086648215762e-02, 2.40226506959100694e-01,
                                6.93147180559945286e-01, 1.0};
  Vector<double> p = {};
  HSV_UNROLL
  for (double coefficient : kTaylor) p = p * f + coefficient;
  return p;
}

// 2^x for −126 ≤ x ≤ 127 (−1022 to 1023): x = n + f with n the nearest integer, 2^f times 2^n. Relative error below
// 1e-7 for float; NaN, of any payload, for NaN.
#if defined(__AVX512F__)
// The zero-masked forms, all lanes on: g++ 12 warns of an uninitialised value inside the plain ones.
HSV_INLINE Vector<float> exp2_in_range(Vector<float> x) {
  const __m512 n = _mm512_maskz_roundscale_ps(0xffff, (__m512)x, _MM_FROUND_TO_NEAREST_INT);
  return (Vector<float>)_mm512_maskz_scalef_ps(0xffff, (__m512)exp2_of_fraction(x - (Vector<float>)n), n);
}
HSV_INLINE Vector<double> exp2_in_range(Vector<double> x) {
  const __m512d n = _mm512_maskz_roundscale_pd(0xff, (__m512d)x, _MM_FROUND_TO_NEAREST_INT);
  return (Vector<double>)_mm512_maskz_scalef_pd(0xff, (__m512d)exp2_of_fraction(x - (Vector<double>)n), n);
}
#else
// Adding kRound, 1.5 · 2^23 (2^52) + bias, leaves n + bias in the low mantissa bits.
HSV_INLINE Vector<float> exp2_in_range(Vector<float> x) {
  const float kRound = 12582912.0f + 127.0f;
  const Vector<float> shifted = x + kRound;
  return exp2_of_fraction(x - (shifted - kRound)) * (Vector<float>)((IVec)shifted << 23);
}
HSV_INLINE Vector<double> exp2_in_range(Vector<double> x) {
  const double kRound = 6755399441055744.0 + 1023.0;
  const Vector<double> shifted = x + kRound;
  return exp2_of_fraction(x - (shifted - kRound)) * (Vector<double>)((VectorTypes<double>::Bits)shifted << 52);
}
#endif

// 2^x for x ≤ 127 (1023), exactly 0 below −126 (−1022), −inf included.
HSV_INLINE Vector<float> exp2(Vector<float> x) {
  return x < -126.0f ? Vector<float>{} : exp2_in_range(x);
}
HSV_INLINE Vector<double> exp2(Vector<double> x) {
  return x < -1022.0 ? Vector<double>{} : exp2_in_range(x);
}

}  // namespace hsv::HSV_ISA
