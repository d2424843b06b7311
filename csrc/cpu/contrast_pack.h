// Rows of any type and stride, packed for the products of tiles.
#pragma once

#include "cpu/contrast.h"
#include "cpu/contrast_block.h"

namespace hsv::HSV_ISA {

// Rows as the square forms take them: panels hold a share of the scale.
template <class E>
struct SquareRows : PackedRows<E> {
  int64_t columns;  // of rows, padded
  double root;  // what panels take besides: √(scale / ln 2), or a power of two where that would cost the rows digits
  Sum<E> head, tail;  // what similarities take besides: head + tail is scale / ln 2 / root²
};

template <class E, class T>
void read_elements(const Rows& x, int64_t row, int64_t begin, int64_t n, T* out) {
  const E* p = static_cast<const E*>(x.data) + row * x.row_stride + begin * x.column_stride;
  if (x.column_stride == 1) {
    for (int64_t k = 0; k < n; k++) out[k] = widen(p[k]);
  } else {
    for (int64_t k = 0; k < n; k++) out[k] = widen(p[k * x.column_stride]);
  }
}

// out[0 … n) = row `row` of x, from column `begin`.
inline void read_row(DType, const Rows& x, int64_t row, int64_t begin, int64_t n, double* out) {
  read_elements<double>(x, row, begin, n, out);
}
inline void read_row(DType dtype, const Rows& x, int64_t row, int64_t begin, int64_t n, float* out) {
  switch (dtype) {
    case DType::kBFloat16:
      return read_elements<BFloat16>(x, row, begin, n, out);
    case DType::kFloat16:
      return read_elements<Float16>(x, row, begin, n, out);
    default:
      return read_elements<float>(x, row, begin, n, out);
  }
}

// The same with the rows of all views counted through.
template <class T>
void read_row(const ContrastProblem& p, int64_t row, int64_t begin, int64_t n, T* out) {
  const int view = row >= p.rows;
  read_row(p.dtype, p.view[view], row - view * p.rows, begin, n, out);
}

// Values [begin, begin + n) of a row: where they lie, or in `buffer`, filled up with zeros to whole vectors, if they
// have another type or stride or do not fill the last vector.
template <class T>
const T* row_values(const ContrastProblem& p, int64_t row, int64_t begin, int64_t n, T* buffer) {
  const Rows& view = p.view[row >= p.rows];
  const bool direct = p.dtype == (sizeof(T) == 8 ? DType::kFloat64 : DType::kFloat32) && view.column_stride == 1;
  if (direct && n % kPanel<T> == 0) {
    return static_cast<const T*>(view.data) + (row >= p.rows ? row - p.rows : row) * view.row_stride + begin;
  }
  read_row(p, row, begin, n, buffer);
  for (int64_t k = n; k % kPanel<T>; k++) buffer[k] = 0;
  return buffer;
}

HSV_INLINE Vector<double> load_double(const double* p) {
  return load(p);
}
HSV_INLINE Vector<double> load_double(const float* p) {
  typedef float Half __attribute__((vector_size(kVectorBytes / 2)));
  Half half;
  memcpy(&half, p, sizeof half);
  return __builtin_convertvector(half, Vector<double>);
}

// ⟨a, b⟩ of rows as given, in double: neither overflows nor underflows for float rows.
template <class T>
double dot_rows(const ContrastProblem& p, int64_t a, int64_t b) {
  constexpr int64_t kChunk = 4 * kPanel<T>, half = kLanes<double>;
  T buffers[2][kChunk];
  Vector<double> sums[2] = {};
  for (int64_t begin = 0; begin < p.dim; begin += kChunk) {
    const int64_t n = p.dim - begin < kChunk ? p.dim - begin : kChunk;
    const T* x = row_values(p, a, begin, n, buffers[0]);
    const T* y = a == b ? x : row_values(p, b, begin, n, buffers[1]);
    for (int64_t k = 0; k < n; k += 2 * half) {
      sums[0] += load_double(x + k) * load_double(y + k);
      sums[1] += load_double(x + k + half) * load_double(y + k + half);
    }
  }
  return sum(sums[0] + sums[1]);
}

// One panel of rows from `first`, row r times factor[r], into panels and slabs.
//
// Factors stay in double and every value is rounded once: a factor rounded to float would move all similarities of a
// row, and a rounded scale those of all rows, in the same direction.
template <class E>
void pack_panel(const ContrastProblem& p, int64_t first, const double* factor, const SquareRows<E>& out) {
  using T = Sum<E>;
  constexpr int64_t P = kPanel<E>;
  const int64_t used = p.rows * p.views - first < P ? p.rows * p.views - first : P;
  alignas(64) Lines<T> by_row = {}, by_column;
  T buffer[P];
  for (int64_t begin = 0; begin < p.dim; begin += P) {
    const int64_t n = p.dim - begin < P ? p.dim - begin : P;
    for (int64_t r = 0; r < used; r++) {
      const T* values = row_values(p, first + r, begin, n, buffer);
      for (int64_t k = 0; k < P; k++) by_row[r][k] = static_cast<T>(values[k] * factor[r]);
    }
    if (out.slabs) write_lines(by_row, P, out.slab(begin, first));
    for (int64_t r = 0; out.root != 1 && r < used; r++) {
      const T* values = row_values(p, first + r, begin, n, buffer);
      for (int64_t k = 0; k < P; k++) by_row[r][k] = static_cast<T>(values[k] * (factor[r] * out.root));
    }
    transpose<T>(by_row, by_column);
    write_lines(by_column, n, out.panel(first) + begin / kValues<E> * P);
  }
}

}  // namespace hsv::HSV_ISA
