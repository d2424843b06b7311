// Rows of any type and stride, packed for the products of tiles.
#pragma once

#include "cpu/contrast.h"
#include "cpu/parallel.h"
#include "cpu/simd.h"

namespace hsv::HSV_ISA {

// Rows of a panel and columns of a slab. Row counts are padded to whole panels with rows of zeros.
template <class T>
inline constexpr int kPanel = 2 * kLanes<T>;

template <class T>
HSV_INLINE int64_t padded(int64_t n) {
  return (n + kPanel<T> - 1) / kPanel<T> * kPanel<T>;
}

template <class T>
struct Packed {
  T* panels;     // [panel][dim][kPanel]: a panel of rows, transposed
  T* slabs;      // [slab][row][kPanel]: a slab of columns; null if only similarities are wanted
  int64_t rows;  // of all views, padded
  int64_t dim;
  int64_t columns;  // dim, padded

  T* panel(int64_t row) const { return panels + row * dim; }
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

// out[0 … n) = row `row` of all views, from column `begin`.
inline void read_row(const ContrastProblem& p, int64_t row, int64_t begin, int64_t n, double* out) {
  const int view = row >= p.rows;
  read_elements<double>(p.view[view], row - view * p.rows, begin, n, out);
}
inline void read_row(const ContrastProblem& p, int64_t row, int64_t begin, int64_t n, float* out) {
  const int view = row >= p.rows;
  row -= view * p.rows;
  switch (p.dtype) {
    case DType::kBFloat16:
      return read_elements<BFloat16>(p.view[view], row, begin, n, out);
    case DType::kFloat16:
      return read_elements<Float16>(p.view[view], row, begin, n, out);
    default:
      return read_elements<float>(p.view[view], row, begin, n, out);
  }
}

// ⟨a, b⟩ of rows as given, in double: neither overflows nor underflows for float rows.
template <class T>
double dot_rows(const ContrastProblem& p, int64_t a, int64_t b) {
  constexpr int64_t kChunk = 64, kSums = 8;
  T x[kChunk], y[kChunk];
  double sums[kSums] = {};
  for (int64_t begin = 0; begin < p.dim; begin += kChunk) {
    const int64_t n = p.dim - begin < kChunk ? p.dim - begin : kChunk;
    for (int64_t k = n; k < kChunk; k++) x[k] = y[k] = 0;
    read_row(p, a, begin, n, x);
    read_row(p, b, begin, n, y);
    for (int64_t k = 0; k < kChunk; k += kSums) {
      for (int64_t s = 0; s < kSums; s++) sums[s] += static_cast<double>(x[k + s]) * static_cast<double>(y[k + s]);
    }
  }
  return ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7]));
}

// 1 / max(‖x‖, 1e-12), NaN for NaN.
template <class T>
double inverse_norm(const ContrastProblem& p, int64_t row) {
  const double norm = __builtin_sqrt(dot_rows<T>(p, row, row));
  return 1.0 / (norm < 1e-12 ? 1e-12 : norm);
}

// One panel of rows, normalised with two views, into panels and slabs; inv_norm [rows] is written unless null.
//
// The factor stays in double: rounded to float it would move all similarities of a row in the same direction.
template <class T>
void pack_panel(const ContrastProblem& p, int64_t first, T* inv_norm, const Packed<T>& out) {
  constexpr int64_t P = kPanel<T>;
  const int64_t rows = p.rows * p.views, used = rows - first < P ? rows - first : P;
  double factor[P];
  for (int64_t r = 0; r < used; r++) {
    factor[r] = p.views == 2 ? inverse_norm<T>(p, first + r) : 1;
    if (inv_norm) inv_norm[first + r] = static_cast<T>(factor[r]);
  }

  T block[P][P] = {};  // [row][column]
  for (int64_t begin = 0; begin < p.dim; begin += P) {
    const int64_t n = p.dim - begin < P ? p.dim - begin : P;
    for (int64_t r = 0; r < used; r++) {
      read_row(p, first + r, begin, n, block[r]);
      for (int64_t k = 0; k < n; k++) block[r][k] = static_cast<T>(block[r][k] * factor[r]);
      for (int64_t k = n; k < P; k++) block[r][k] = 0;
    }
    T* panel = out.panel(first) + begin * P;
    for (int64_t k = 0; k < n; k++) {
      for (int64_t r = 0; r < P; r++) panel[k * P + r] = block[r][k];
    }
    if (out.slabs) memcpy(out.slabs + begin * out.rows + first * P, block, sizeof block);
  }
}

// All rows.
template <class T>
void pack(const ContrastProblem& p, T* inv_norm, const Packed<T>& out) {
  parallel_for(out.rows / kPanel<T>, p.threads, [&](int64_t begin, int64_t end) {
    for (int64_t panel = begin; panel < end; panel++) pack_panel(p, panel * kPanel<T>, inv_norm, out);
  });
}

}  // namespace hsv::HSV_ISA
