// Tiles of the similarity matrix: which are visited by whom, their products, what is left out, their exponentials.
#pragma once

#include "cpu/contrast_pack.h"

namespace hsv::HSV_ISA {

#if defined(__AVX512F__)
inline constexpr int kRows = 8;  // rows of a product held in registers, beside two vectors of columns
#else
inline constexpr int kRows = 4;
#endif
inline constexpr int64_t kTile = 192;  // most rows and columns of a tile: a multiple of every panel

// Left out of a sum: its exponential is exactly 0, and no maximum is above it.
template <class T>
inline constexpr T kLeftOut = sizeof(T) == 4 ? static_cast<T>(-__FLT_MAX__) : static_cast<T>(-__DBL_MAX__);

// Rows [i, i + ni) against columns [j, j + nj), either with i + ni ≤ j or on the diagonal, i = j and ni = nj. A tile
// off the diagonal stands for its mirror image too.
struct Tile {
  int64_t i, ni, j, nj;
  bool diagonal() const { return i == j; }
};

// Covers the upper triangle of the tile [i, i + n)² by panels on the diagonal and the rest of their rows.
template <class T, class F>
void visit_diagonal(int64_t i, int64_t n, const F& f) {
  for (int64_t k = i; k < i + n; k += kPanel<T>) {
    f(Tile{k, kPanel<T>, k, kPanel<T>});
    const int64_t next = k + kPanel<T>;
    if (next < i + n) f(Tile{k, kPanel<T>, next, i + n - next});
  }
}

// f(tile, thread) for tiles that cover the upper triangle of rows × rows; rows and columns of a tile are the thread's
// own while f runs.
template <class T, class F>
void visit_tiles(int64_t rows, int threads, const F& f) {
  tournament(threads, [&](int a, int b, int parts, int thread) {
    const int64_t panels = rows / kPanel<T>;
    const auto start = [&](int part) { return panels * part / parts * kPanel<T>; };
    const auto size = [](int64_t begin, int64_t end) { return end - begin < kTile ? end - begin : kTile; };
    for (int64_t i = start(a); i < start(a + 1); i += kTile) {
      const int64_t ni = size(i, start(a + 1));
      if (a == b) visit_diagonal<T>(i, ni, [&](const Tile& tile) { f(tile, thread); });
      for (int64_t j = a == b ? i + kTile : start(b); j < start(b + 1); j += kTile) {
        f(Tile{i, ni, j, size(j, start(b + 1))}, thread);
      }
    }
  });
}

// c[r] = Σ_k a[r·row + k·step] · b[k], b [depth][kPanel].
template <class T>
HSV_INLINE void multiply(const T* a, int64_t row, int64_t step, const T* b, int64_t depth, Vector<T> (&c)[kRows][2]) {
  HSV_UNROLL
  for (int r = 0; r < kRows; r++) c[r][0] = c[r][1] = Vector<T>{};
  for (int64_t k = 0; k < depth; k++) {
    const Vector<T> b0 = load(b + k * kPanel<T>), b1 = load(b + k * kPanel<T> + kLanes<T>);
    HSV_UNROLL
    for (int r = 0; r < kRows; r++) {
      const Vector<T> x = splat(a[r * row + k * step]);
      c[r][0] += x * b0;
      c[r][1] += x * b1;
    }
  }
}

// s[i][j] = scale · ⟨z_i, z_j⟩ over the tile; s [kTile][kTile]. The scale comes in two parts: rounded to float it would
// err in the same direction everywhere, by 1e-5 in an exponent of 100.
template <class T>
void similarities(const Packed<T>& z, const Tile& t, double scale, T* s) {
  constexpr int P = kPanel<T>;
  const T head = static_cast<T>(scale), tail = static_cast<T>(scale - head);
  for (int64_t j = 0; j < t.nj; j += P) {
    for (int64_t i = 0; i < t.ni; i += kRows) {
      Vector<T> c[kRows][2];
      multiply(z.panel((t.i + i) / P * P) + (t.i + i) % P, 1, P, z.panel(t.j + j), z.dim, c);
      HSV_UNROLL
      for (int r = 0; r < kRows; r++) {
        store(s + (i + r) * kTile + j, c[r][0] * head + c[r][0] * tail);
        store(s + (i + r) * kTile + j + kLanes<T>, c[r][1] * head + c[r][1] * tail);
      }
    }
  }
}

// out[i] += Σ_k w[i·row + k·step] · z[k] for n rows i and `depth` rows k; out and z rows of the slabs.
template <class T>
void add_product(const T* w, int64_t row, int64_t step, int64_t n, int64_t depth, const T* z, T* out) {
  for (int64_t i = 0; i < n; i += kRows) {
    Vector<T> c[kRows][2];
    multiply(w + i * row, row, step, z, depth, c);
    HSV_UNROLL
    for (int r = 0; r < kRows; r++) {
      T* p = out + (i + r) * kPanel<T>;
      store(p, load(p) + c[r][0]);
      store(p + kLanes<T>, load(p + kLanes<T>) + c[r][1]);
    }
  }
}

// Marks what no row of the tile sums over: padding, and as the problem has it the row itself and its positive.
template <class T>
void leave_out(const ContrastProblem& p, const Tile& t, T* s) {
  const int64_t rows = p.rows * p.views;
  const auto mark = [&](int64_t i, int64_t j) {
    if (j >= t.j && j < t.j + t.nj) s[(i - t.i) * kTile + j - t.j] = kLeftOut<T>;
  };
  for (int64_t i = t.i; i < t.i + t.ni; i++) {
    if (p.exclude_self) mark(i, i);
    if (p.views == 2) mark(i, i < p.rows ? i + p.rows : i - p.rows);
    for (int64_t j = i < rows && rows > t.j ? rows : t.j; j < t.j + t.nj; j++) mark(i, j);
  }
}

}  // namespace hsv::HSV_ISA
