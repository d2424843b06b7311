// Tiles of the similarity matrix: which are visited by whom, their products, what is left out of their sums.
#pragma once

#include "cpu/contrast_pack.h"
#include "cpu/parallel.h"

namespace hsv::HSV_ISA {

// Rows [i, i + ni) against columns [j, j + nj), either with i + ni ≤ j or on the diagonal, i = j and ni = nj. A tile
// off the diagonal stands for its mirror image too.
struct Tile {
  int64_t i, ni, j, nj;
  bool diagonal() const { return i == j; }
};

// Covers the upper triangle of the tile [i, i + n)² by panels on the diagonal and the rest of their rows.
template <class E, class F>
void visit_diagonal(int64_t i, int64_t n, const F& f) {
  constexpr int64_t P = kPanel<E>;
  for (int64_t k = i; k < i + n; k += P) {
    f(Tile{k, P, k, P});
    if (k + P < i + n) f(Tile{k, P, k + P, i + n - k - P});
  }
}

// f(tile) for this thread's tiles of at most kTile² that, with the team's, cover the upper triangle of rows × rows; the
// rows and the columns of a tile are the thread's own while f runs.
template <class E, int64_t kTile, class F>
void visit_tiles(int64_t rows, int thread, int team, const F& f) {
  tournament(thread, team, [&](int a, int b, int parts) {
    const int64_t panels = rows / kPanel<E>;
    const auto start = [&](int part) { return panels * part / parts * kPanel<E>; };
    const auto size = [](int64_t begin, int64_t end) { return end - begin < kTile ? end - begin : kTile; };
    for (int64_t i = start(a); i < start(a + 1); i += kTile) {
      const int64_t ni = size(i, start(a + 1));
      if (a == b) visit_diagonal<E>(i, ni, f);
      for (int64_t j = a == b ? i + kTile : start(b); j < start(b + 1); j += kTile) {
        f(Tile{i, ni, j, size(j, start(b + 1))});
      }
    }
  });
}

// f(i, j, c) for blocks c[rows][2] of the tile's similarities in base 2: rows from i, two vectors of columns from j.
template <class E, class F>
HSV_INLINE void for_similarities(const SquareRows<E>& z, const Tile& t, const F& f) {
  constexpr int P = kPanel<E>;
  for (int64_t j = t.j; j < t.j + t.nj; j += P) {
    for (int64_t i = t.i; i < t.i + t.ni; i += P) {
      for_row_blocks<P>([&](auto block) HSV_INLINE_LAMBDA {
        Vector<Sum<E>> c[block.rows][2];
        multiply(z.panel(i) + block.first, 1, P, z.panel(j), z.depth, c);
        if (z.head != 1) {
          // In two parts: a scale rounded to float would err in the same direction everywhere.
          HSV_UNROLL
          for (int r = 0; r < block.rows; r++) {
            c[r][0] = c[r][0] * z.head + c[r][0] * z.tail;
            c[r][1] = c[r][1] * z.head + c[r][1] * z.tail;
          }
        }
        f(i + block.first, j, c);
      });
    }
  }
}

// Whether `f` has anything to mark among rows [i, i + n) and one panel of columns from j.
template <class T>
HSV_INLINE bool leaves_out(const ContrastProblem& p, int64_t i, int64_t n, int64_t j) {
  const int64_t rows = p.rows * p.views;
  const auto crosses = [&](int64_t first) { return first < j + 2 * kLanes<T> && j < first + n; };
  return (p.exclude_self && crosses(i)) || (p.views == 2 && (crosses(i + p.rows) || crosses(i - p.rows))) ||
         j + 2 * kLanes<T> > rows;
}

// Sets what no row sums over to `value`: padding, and as the problem has it the row itself and its positive.
template <class T>
void mark_left_out(const ContrastProblem& p, int64_t i, int64_t n, int64_t j, T value, T (*block)[2 * kLanes<T>]) {
  constexpr int64_t P = 2 * kLanes<T>;
  for (int64_t r = 0; r < n; r++) {
    const auto mark = [&](int64_t column) {
      if (column >= j && column < j + P) block[r][column - j] = value;
    };
    if (p.exclude_self) mark(i + r);
    if (p.views == 2) mark(i + r + p.rows), mark(i + r - p.rows);
    for (int64_t column = p.rows * p.views; column < j + P; column++) mark(column);
  }
}

template <class T, int R>
HSV_INLINE void leave_out(const ContrastProblem& p, int64_t i, int64_t j, T value, Vector<T> (&c)[R][2]) {
  if (!leaves_out<T>(p, i, R, j)) return;
  alignas(64) T block[R][2 * kLanes<T>];
  HSV_UNROLL
  for (int r = 0; r < R; r++) store(block[r], c[r][0]), store(block[r] + kLanes<T>, c[r][1]);
  mark_left_out<T>(p, i, R, j, value, block);
  HSV_UNROLL
  for (int r = 0; r < R; r++) c[r][0] = load(block[r]), c[r][1] = load(block[r] + kLanes<T>);
}

// Row i from column j of the exponentials that forward kept, j right of the row's strip.
template <class T>
HSV_INLINE T* kept_row(T* exponentials, int64_t all_rows, int64_t i, int64_t j) {
  const int64_t strip = i / kStrip, columns = (all_rows + kStrip - 1) / kStrip * kStrip;
  const int64_t width = columns - (strip + 1) * kStrip;
  const int64_t before = strip * columns - strip * (strip + 1) / 2 * kStrip;  // Σ of the widths of earlier strips
  return exponentials + before * kStrip + i % kStrip * width + j - (strip + 1) * kStrip;
}
HSV_INLINE bool is_kept(int64_t i, int64_t j) {
  return i / kStrip < j / kStrip;
}

// As for_similarities, over the exponentials kept of a tile all of which is_kept.
template <class E, class T, class F>
HSV_INLINE void for_kept(const SquareRows<E>& z, const T* exponentials, const Tile& t, const F& f) {
  constexpr int P = kPanel<E>;
  for (int64_t i = t.i; i < t.i + t.ni; i += P) {
    for (int64_t j = t.j; j < t.j + t.nj; j += P) {
      for_row_blocks<P>([&](auto block) HSV_INLINE_LAMBDA {
        Vector<T> c[block.rows][2];
        HSV_UNROLL
        for (int r = 0; r < block.rows; r++) {
          const T* row = kept_row(exponentials, z.rows, i + block.first + r, j);
          c[r][0] = load(row), c[r][1] = load(row + kLanes<T>);
        }
        f(i + block.first, j, c);
      });
    }
  }
}

}  // namespace hsv::HSV_ISA
