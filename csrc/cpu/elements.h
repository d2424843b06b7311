// Element types of tensors and their conversion to and from the type that is computed in.
#pragma once

#include <stdint.h>
#include <string.h>

namespace hsv {

// The codes that Python passes.
enum class DType : int { kFloat32 = 0, kFloat64 = 1, kBFloat16 = 2, kFloat16 = 3 };

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

#ifdef HSV_ISA
namespace HSV_ISA {

inline float as_float(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}
inline uint32_t as_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}

inline float widen(float x) {
  return x;
}
inline double widen(double x) {
  return x;
}
inline float widen(BFloat16 x) {
  return as_float(static_cast<uint32_t>(x.bits) << 16);
}
inline float widen(Float16 x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000) << 16;
  const uint32_t exponent = x.bits & 0x7c00;
  uint32_t bits = static_cast<uint32_t>(x.bits & 0x7fff) << 13;
  if (exponent == 0x7c00) return as_float(sign | bits | 0x7f800000);
  bits += (127 - 15) << 23;
  if (exponent) return as_float(sign | bits);
  const float subnormal = as_float(bits + (1 << 23)) - as_float((127 - 14) << 23);
  return as_float(sign | as_bits(subnormal));
}

// Rounds to the nearest, ties to even; too large a magnitude becomes infinite.
inline void narrow(float x, float* out) {
  *out = x;
}
inline void narrow(double x, double* out) {
  *out = x;
}
inline void narrow(float x, BFloat16* out) {
  const uint32_t bits = as_bits(x);
  const bool nan = x != x;
  out->bits = static_cast<uint16_t>(nan ? (bits >> 16) | 0x40 : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
inline void narrow(float x, Float16* out) {
  const uint32_t sign = (as_bits(x) >> 16) & 0x8000;
  const uint32_t bits = as_bits(x) & 0x7fffffff;
  uint32_t half;
  if (bits > 0x7f800000) {
    half = 0x7e00;
  } else if (bits >= (127 + 16) << 23) {
    half = 0x7c00;
  } else if (bits < (127 - 14) << 23) {  // subnormal: adding 1/2 shifts the mantissa into place and rounds it
    half = as_bits(as_float(bits) + 0.5f) - as_bits(0.5f);
  } else {
    half = (bits - ((127 - 15) << 23) + 0xfff + ((bits >> 13) & 1)) >> 13;
  }
  out->bits = static_cast<uint16_t>(sign | half);
}

// The type that elements of type E are computed in.
template <class E>
struct ComputedType {
  typedef float type;
};
template <>
struct ComputedType<double> {
  typedef double type;
};
template <class E>
using Computed = typename ComputedType<E>::type;

// f(E{}) with the type of elements of `dtype`.
template <class F>
void with_type(DType dtype, const F& f) {
  switch (dtype) {
    case DType::kFloat32:
      return f(float{});
    case DType::kFloat64:
      return f(double{});
    case DType::kBFloat16:
      return f(BFloat16{});
    case DType::kFloat16:
      return f(Float16{});
  }
}

}  // namespace HSV_ISA
#endif

}  // namespace hsv
