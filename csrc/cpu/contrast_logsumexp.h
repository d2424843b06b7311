// The logsumexp of each row as Σ = 2^shift · total, in base 2, tile by tile.
#pragma once

#include "cpu/contrast_tiles.h"

namespace hsv::HSV_ISA {

inline constexpr int64_t kSumTile = 192;  // most rows and columns of a tile: a multiple of every panel

template <class T>
struct Logsumexp {
  T* shift;  // the maximum so far; null: fixed at 0
  T* total;
};

// One thread's own memory for a tile.
template <class T>
struct alignas(64) TileSums {
  T lanes[kSumTile * kLanes<T>];  // a vector of partial sums for each row
  T shift[kSumTile];
  T total[kSumTile];                    // of columns, or what a tile gives to its rows or columns
  T similarities[kSumTile * kSumTile];  // under running maxima alone
};

// Adds Σ 2^s of each row and, off the diagonal, of each column.
template <class E, class T>
void add_exponentials(const ContrastProblem& p, const SquareRows<E>& z, const Tile& t, TileSums<T>& own, T* kept,
                      const Logsumexp<T>& out) {
  memset(own.lanes, 0, t.ni * kLanes<T> * sizeof(T));
  memset(own.total, 0, t.nj * sizeof(T));
  for_similarities(z, t, [&](int64_t i, int64_t j, auto& c) HSV_INLINE_LAMBDA {
    constexpr int R = sizeof c / sizeof c[0];
    HSV_UNROLL
    for (int r = 0; r < R; r++) c[r][0] = exp2_in_range(c[r][0]), c[r][1] = exp2_in_range(c[r][1]);
    leave_out<T, R>(p, i, j, 0, c);
    Vector<T> columns[2] = {load(own.total + j - t.j), load(own.total + j - t.j + kLanes<T>)};
    HSV_UNROLL
    for (int r = 0; r < R; r++) {
      T* row = own.lanes + (i - t.i + r) * kLanes<T>;
      store(row, load(row) + (c[r][0] + c[r][1]));
      columns[0] += c[r][0], columns[1] += c[r][1];
      if (kept && is_kept(i, j)) {
        T* place = kept_row(kept, z.rows, i + r, j);
        store(place, c[r][0]), store(place + kLanes<T>, c[r][1]);
      }
    }
    store(own.total + j - t.j, columns[0]), store(own.total + j - t.j + kLanes<T>, columns[1]);
  });
  for (int64_t i = 0; i < t.ni; i++) out.total[t.i + i] += sum(load(own.lanes + i * kLanes<T>));
  if (t.diagonal()) return;
  for (int64_t j = 0; j < t.nj; j += kLanes<T>)
    store(out.total + t.j + j, load(out.total + t.j + j) + load(own.total + j));
}

template <class E, class T>
void store_similarities(const ContrastProblem& p, const SquareRows<E>& z, const Tile& t, TileSums<T>& own) {
  for_similarities(z, t, [&](int64_t i, int64_t j, auto& c) HSV_INLINE_LAMBDA {
    constexpr int R = sizeof c / sizeof c[0];
    leave_out<T, R>(p, i, j, kLeftOut<T>, c);
    HSV_UNROLL
    for (int r = 0; r < R; r++) {
      T* place = own.similarities + (i - t.i + r) * kSumTile + j - t.j;
      store(place, c[r][0]), store(place + kLanes<T>, c[r][1]);
    }
  });
}

template <class T>
void reduce_rows(const Tile& t, TileSums<T>& own) {
  for (int64_t i = 0; i < t.ni; i++) {
    const T* row = own.similarities + i * kSumTile;
    Vector<T> most = splat(kNone<T>), total = {};
    for (int64_t j = 0; j < t.nj; j += kLanes<T>) most = max(most, load(row + j));
    own.shift[i] = max_lane(most);
    for (int64_t j = 0; j < t.nj; j += kLanes<T>) total += exp2(load(row + j) - own.shift[i]);
    own.total[i] = sum(total);
  }
}

template <class T>
void reduce_columns(const Tile& t, TileSums<T>& own) {
  for (int64_t j = 0; j < t.nj; j += kLanes<T>) {
    const T* column = own.similarities + j;
    Vector<T> most = splat(kNone<T>), total = {};
    for (int64_t i = 0; i < t.ni; i++) most = max(most, load(column + i * kSumTile));
    for (int64_t i = 0; i < t.ni; i++) total += exp2(load(column + i * kSumTile) - most);
    store(own.shift + j, most);
    store(own.total + j, total);
  }
}

// Adds the sums of n rows from `first`: both sides brought to the greater shift.
template <class T>
void merge(const TileSums<T>& own, int64_t first, int64_t n, const Logsumexp<T>& out) {
  for (int64_t i = 0; i < n; i += kLanes<T>) {
    const Vector<T> a = load(out.shift + first + i), b = load(own.shift + i);
    const Vector<T> shift = max(a, b);
    store(out.total + first + i, load(out.total + first + i) * exp2(a - shift) + load(own.total + i) * exp2(b - shift));
    store(out.shift + first + i, shift);
  }
}

// Adds one tile over running maxima.
template <class E, class T>
void merge_exponentials(const ContrastProblem& p, const SquareRows<E>& z, const Tile& t, TileSums<T>& own,
                        const Logsumexp<T>& out) {
  store_similarities(p, z, t, own);
  reduce_rows(t, own);
  merge(own, t.i, t.ni, out);
  if (t.diagonal()) return;
  reduce_columns(t, own);
  merge(own, t.j, t.nj, out);
}

}  // namespace hsv::HSV_ISA
