// Rows of any type and strides, packed block by block at the speed of loads and shuffles.
//
// A block is kPanel rows by kPanel columns. Panels need it column by column and slabs row by row; memory has it in one
// of the two orders, and the other comes from a transposition in registers.
#pragma once

#include <utility>

#include "cpu/contrast.h"
#include "cpu/element_vectors.h"
#include "cpu/products.h"

namespace hsv::HSV_ISA {

// A similarity that is left out of a sum over running maxima, and the maximum of none: 2^(kLeftOut − kNone) is 0.
template <class T>
inline constexpr T kLeftOut = sizeof(T) == 4 ? static_cast<T>(-__FLT_MAX__) : static_cast<T>(-__DBL_MAX__);
template <class T>
inline constexpr T kNone = kLeftOut<T> / 2;

template <class E>
struct PackedRows {
  E* panels;     // [panel][depth][kPanel]: a panel of rows, transposed
  E* slabs;      // [slab][rows / kValues][kPanel]: a slab of kPanel columns; null if only similarities are wanted
  int64_t rows;  // padded to whole panels with zeros
  int64_t depth;

  E* panel(int64_t row) const { return panels + row * depth; }  // row a multiple of kPanel
  E* slab(int64_t column, int64_t row) const { return slabs + (column * rows + row * kPanel<E>) / kValues<E>; }
};

template <class T>
using Lines = T[kPanel<T>][kPanel<T>];

template <class V, size_t... I>
HSV_INLINE V interleave_low(V a, V b, std::index_sequence<I...>) {
  return __builtin_shufflevector(a, b, (I / 2 + I % 2 * sizeof...(I))...);
}
template <class V, size_t... I>
HSV_INLINE V interleave_high(V a, V b, std::index_sequence<I...>) {
  return __builtin_shufflevector(a, b, (sizeof...(I) / 2 + I / 2 + I % 2 * sizeof...(I))...);
}

// Each of log2(lanes) rounds interleaves the halves of the list of vectors, which rotates the bits of all positions.
template <class T>
HSV_INLINE void transpose(Vector<T> (&v)[kLanes<T>]) {
  constexpr int L = kLanes<T>;
  constexpr std::make_index_sequence<L> lanes{};
  HSV_UNROLL
  for (int round = 1; round < L; round *= 2) {
    Vector<T> w[L];
    HSV_UNROLL
    for (int i = 0; i < L / 2; i++) {
      w[2 * i] = interleave_low(v[i], v[i + L / 2], lanes);
      w[2 * i + 1] = interleave_high(v[i], v[i + L / 2], lanes);
    }
    HSV_UNROLL
    for (int i = 0; i < L; i++) v[i] = w[i];
  }
}

template <class T>
void transpose(const Lines<T>& in, Lines<T>& out) {
  constexpr int L = kLanes<T>;
  for (int i = 0; i < kPanel<T>; i += L) {
    for (int j = 0; j < kPanel<T>; j += L) {
      Vector<T> v[L];
      HSV_UNROLL
      for (int r = 0; r < L; r++) v[r] = load(in[i + r] + j);
      transpose<T>(v);
      HSV_UNROLL
      for (int r = 0; r < L; r++) store(out[j + r] + i, v[r]);
    }
  }
}

// out[l][k] = p[l·line + k·step] for l < lines and k < n, zero elsewhere.
template <class S, class T>
void read_lines(const S* p, int64_t line, int64_t step, int64_t lines, int64_t n, Lines<T>& out) {
  constexpr int P = kPanel<T>, L = kLanes<T>;
  for (int64_t l = 0; l < P; l++) {
    const S* x = p + l * line;
    if (l < lines && step == 1 && n == P) {
      store(out[l], load(x));
      store(out[l] + L, load(x + L));
      continue;
    }
    memset(out[l], 0, sizeof out[l]);
    for (int64_t k = 0; l < lines && k < n; k++) out[l][k] = widen(x[k * step]);
  }
}

// `rows` rows from `row` by n columns from `column`; by_row only if slabs are wanted.
template <class S, class T>
void read_block(const Rows& x, int64_t row, int64_t rows, int64_t column, int64_t n, bool slabs, Lines<T>& by_row,
                Lines<T>& by_column) {
  const S* p = static_cast<const S*>(x.data) + row * x.row_stride + column * x.column_stride;
  if (x.row_stride == 1) {
    read_lines(p, x.column_stride, 1, n, rows, by_column);
    if (slabs) transpose<T>(by_column, by_row);
  } else {
    read_lines(p, x.row_stride, x.column_stride, rows, n, by_row);
    transpose<T>(by_row, by_column);
  }
}

// n lines as elements of a panel or slab: pairs take theirs from two lines.
template <class T>
HSV_INLINE void write_lines(const Lines<T>& lines, int64_t n, T* out) {
  memcpy(out, lines, n * sizeof lines[0]);
}
#if defined(__AVX512BF16__)
inline void write_lines(const Lines<float>& lines, int64_t n, Pair* out) {
  const __m512i interleave = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8,  //
                                              23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  for (int64_t k = 0; k < n; k += 2) {
    for (int h = 0; h < kPanel<Pair>; h += kWidth, out += kWidth) {
      const __m512 low = (__m512)load(lines[k] + h), high = (__m512)load(lines[k + 1] + h);
      _mm512_storeu_si512(out, _mm512_permutexvar_epi16(interleave, (__m512i)_mm512_cvtne2ps_pbh(high, low)));
    }
  }
}
#endif

// Packs the panel of rows from `row`, of x's `rows` rows, to place `to`: panels times `factor`, slabs as they are.
// Returns max ‖x‖² of them, NaN or infinite where it is not to be relied on.
//
// The factor stays in double and every product is rounded once: rounded to float it would move all similarities in the
// same direction.
template <class S, class E>
Sum<E> pack_panel(const Rows& x, int64_t rows, int64_t dim, int64_t row, double factor, const PackedRows<E>& out,
                  int64_t to) {
  using T = Sum<E>;
  constexpr int P = kPanel<E>, L = kLanes<T>;
  const int64_t used = rows - row < P ? rows - row : P;
  alignas(64) Lines<T> by_row, by_column;
  Vector<T> squares[2] = {};
  for (int64_t begin = 0; begin < dim; begin += P) {
    const int64_t n = dim - begin < P ? dim - begin : P;
    read_block<S>(x, row, used, begin, n, out.slabs, by_row, by_column);
    if (out.slabs) write_lines(by_row, P, out.slab(begin, to));
    for (int64_t k = 0; k < n; k++) {
      const Vector<T> a = load(by_column[k]), b = load(by_column[k] + L);
      squares[0] += a * a;
      squares[1] += b * b;
    }
    for (int64_t k = 0; factor != 1 && k < n; k++) {
      for (int r = 0; r < P; r++) by_column[k][r] = static_cast<T>(by_column[k][r] * factor);
    }
    write_lines(by_column, n, out.panel(to) + begin / kValues<E> * P);
  }
  T most[P], total = 0;
  store(most, squares[0]), store(most + L, squares[1]);
  for (int r = 0; r < P; r++) {
    if (!(most[r] <= total)) total = most[r];
  }
  return total;
}

// f(S{}) with the type of elements that are computed in T.
template <class T, class F>
auto with_element(DType dtype, const F& f) {
  if constexpr (sizeof(T) == 8) {
    return f(double{});
  } else if (dtype == DType::kBFloat16) {
    return f(BFloat16{});
  } else if (dtype == DType::kFloat16) {
    return f(Float16{});
  } else {
    return f(float{});
  }
}

template <class E>
Sum<E> pack_panel(DType dtype, const Rows& x, int64_t rows, int64_t dim, int64_t row, double factor,
                  const PackedRows<E>& out, int64_t to) {
  return with_element<Sum<E>>(
      dtype, [&](auto element) { return pack_panel<decltype(element)>(x, rows, dim, row, factor, out, to); });
}

}  // namespace hsv::HSV_ISA
