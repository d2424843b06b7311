// Rows of any type and stride, packed for the products of tiles.
#pragma once

#include "cpu/contrast.h"
#include "cpu/element_vectors.h"
#include "cpu/products.h"

namespace hsv::HSV_ISA {

// Row counts are padded to whole panels with rows of zeros.
template <class E>
struct Packed {
  E* panels;     // [panel][depth][kPanel]: a panel of rows, transposed, times `root`
  E* slabs;      // [slab][rows / kValues][kPanel]: a slab of kPanel columns; null if only similarities are wanted
  int64_t rows;  // of all views, padded
  int64_t depth;
  int64_t columns;    // dim, padded
  double root;        // √(scale / ln 2) where it does not cost the rows digits, and 1
  Sum<E> head, tail;  // what similarities take besides: head + tail is 1, or scale / ln 2

  const E* panel(int64_t row) const { return panels + row * depth; }  // row a multiple of kPanel
  const E* slab(int64_t column, int64_t row) const { return slabs + (column * rows + row * kPanel<E>) / kValues<E>; }
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

// Elements of n values of the types that products take, the last filled up with 0.
inline void to_elements(const float* x, int64_t n, float* out) {
  memcpy(out, x, n * sizeof(float));
}
inline void to_elements(const double* x, int64_t n, double* out) {
  memcpy(out, x, n * sizeof(double));
}
inline void to_elements(const float* x, int64_t n, Pair* out) {
  BFloat16* halves = reinterpret_cast<BFloat16*>(out);
  for (int64_t k = 0; k < n; k++) narrow(x[k], halves + k);
  if (n % 2) halves[n] = BFloat16{0};
}

// The rows of one block, [kPanel][kPanel], as they lie in a slab.
template <class T>
void to_slab(const T (&block)[kPanel<T>][kPanel<T>], T* out) {
  memcpy(out, block, sizeof block);
}
inline void to_slab(const float (&block)[kPanel<float>][kPanel<float>], Pair* out) {
  BFloat16* halves = reinterpret_cast<BFloat16*>(out);
  for (int r = 0; r < kPanel<float>; r++) {
    for (int k = 0; k < kPanel<float>; k++) narrow(block[r][k], halves + (r / 2 * kPanel<float> + k) * 2 + r % 2);
  }
}

// One panel of rows from `first`, row r times factor[r], into panels and slabs.
//
// Factors stay in double and every value is rounded once: a factor rounded to float would move all similarities of a
// row, and a rounded scale those of all rows, in the same direction.
template <class E>
void pack_panel(const ContrastProblem& p, int64_t first, const double* factor, const Packed<E>& out) {
  using T = Sum<E>;
  constexpr int64_t P = kPanel<E>;
  const int64_t used = p.rows * p.views - first < P ? p.rows * p.views - first : P;
  T block[P][P] = {}, scaled[P] = {};  // [row][column]
  E elements[P][P / kValues<E>] = {};
  for (int64_t begin = 0; begin < p.dim; begin += P) {
    const int64_t n = p.dim - begin < P ? p.dim - begin : P;
    for (int64_t r = 0; r < used; r++) {
      const T* values = row_values(p, first + r, begin, n, block[r]);
      for (int64_t k = 0; k < P; k++) {
        const double x = values[k] * factor[r];
        block[r][k] = static_cast<T>(x);
        scaled[k] = static_cast<T>(x * out.root);
      }
      to_elements(scaled, P, elements[r]);
    }
    E* panel = out.panels + first * out.depth + begin / kValues<E> * P;
    for (int64_t k = 0; k < depth_of<E>(n); k++) {
      HSV_UNROLL
      for (int64_t r = 0; r < P; r++) panel[k * P + r] = elements[r][k];
    }
    if (out.slabs) to_slab(block, const_cast<E*>(out.slab(begin, first)));
  }
}

}  // namespace hsv::HSV_ISA
