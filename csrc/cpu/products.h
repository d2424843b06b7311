// Products of packed rows: what they multiply, what they add up in, and the block of sums that stays in registers.
//
// A panel holds kPanel rows transposed, [depth][kPanel]: one step of the depth multiplies kRows values of one panel,
// each spread over all lanes, with the two vectors of the other.
#pragma once

#include "cpu/elements.h"
#include "cpu/simd.h"
#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

namespace hsv::HSV_ISA {

// Two bfloat16 values that one product takes at once; the first is in the low half.
struct Pair {
  uint32_t bits;
};

// An element of a panel: `Sum` is what products of it add up in, and the type of everything that is not a product.
template <class E>
struct ElementTraits {
  using Sum = E;
  static constexpr int values = 1;
};
template <>
struct ElementTraits<Pair> {
  using Sum = float;
  static constexpr int values = 2;
};
template <class E>
using Sum = typename ElementTraits<E>::Sum;
template <class E>
inline constexpr int kValues = ElementTraits<E>::values;

#if defined(__AVX512BF16__)
inline constexpr bool kHasPairs = true;
#else
inline constexpr bool kHasPairs = false;
#endif

// f(E{}) with the elements that products of rows of `dtype` take.
template <class F>
auto with_elements(DType dtype, bool bfloat16, const F& f) {
  if (dtype == DType::kFloat64) return f(double{});
  if constexpr (kHasPairs) {
    if (bfloat16) return f(Pair{});
  }
  return f(float{});
}

// Rows of a panel.
template <class E>
inline constexpr int kPanel = 2 * kLanes<Sum<E>>;

template <class E>
HSV_INLINE int64_t padded(int64_t n) {
  return (n + kPanel<E> - 1) / kPanel<E> * kPanel<E>;
}

// Elements that hold n values, in the direction that products sum over.
template <class E>
HSV_INLINE int64_t depth_of(int64_t n) {
  return (n + kValues<E> - 1) / kValues<E>;
}

// Rows of the block of sums: with two vectors of columns they fill the registers, less what a step loads.
#if defined(__AVX512F__)
inline constexpr int kRows = 8;
#elif defined(__AVX2__)
inline constexpr int kRows = 6;
#else
inline constexpr int kRows = 4;
#endif

template <int First, int Count>
struct RowBlock {
  static constexpr int first = First, rows = Count;
};

// f(RowBlock) for blocks that cover one panel's P rows.
template <int P, int First = 0, class F>
HSV_INLINE void for_row_blocks(const F& f) {
  constexpr int most = P % kRows && P < 2 * kRows ? 4 : kRows, left = P - First;
  if constexpr (left > 0) {
    constexpr int rows = left < most ? left : most;
    f(RowBlock<First, rows>{});
    for_row_blocks<P, First + rows>(f);
  }
}

HSV_INLINE Vec spread(const float* p) {
  return splat(*p);
}
HSV_INLINE Vector<double> spread(const double* p) {
  return splat(*p);
}
template <class T>
HSV_INLINE void add_product(Vector<T>& c, Vector<T> a, Vector<T> b, const T*) {
  c += a * b;
}

#if defined(__AVX512BF16__)
HSV_INLINE Vec spread(const Pair* p) {
  return (Vec)(static_cast<int32_t>(p->bits) + IVec{});
}
HSV_INLINE Vec load(const Pair* p) {
  return load(reinterpret_cast<const float*>(p));
}
HSV_INLINE void add_product(Vec& c, Vec a, Vec b, const Pair*) {
  c = (Vec)_mm512_dpbf16_ps((__m512)c, (__m512bh)a, (__m512bh)b);
}
#endif

// c[r] = Σ_k a[r·row + k·step] · b[k], b [depth][kPanel].
template <class E, int R>
HSV_INLINE void multiply(const E* a, int64_t row, int64_t step, const E* b, int64_t depth, Vector<Sum<E>> (&c)[R][2]) {
  HSV_UNROLL
  for (int r = 0; r < R; r++) c[r][0] = c[r][1] = Vector<Sum<E>>{};
  for (int64_t k = 0; k < depth; k++) {
    const Vector<Sum<E>> b0 = load(b + k * kPanel<E>), b1 = load(b + k * kPanel<E> + kLanes<Sum<E>>);
    HSV_UNROLL
    for (int r = 0; r < R; r++) {
      const Vector<Sum<E>> x = spread(a + r * row + k * step);
      add_product(c[r][0], x, b0, b);
      add_product(c[r][1], x, b1, b);
    }
  }
}

}  // namespace hsv::HSV_ISA
