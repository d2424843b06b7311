// The logsumexp of each row as Σ = 2^shift · total, in base 2, tile by tile.
#pragma once

#include "cpu/contrast_tiles.h"

namespace hsv::HSV_ISA {

template <class T>
struct Logsumexp {
  T* shift;  // the maximum so far; null: fixed at 0
  T* total;
};

// What one tile gives to its rows or columns.
template <class T>
struct TileSums {
  T shift[kTile];
  T total[kTile];
};

// Adds Σ 2^(s − shift) of each row and, off the diagonal, of each column to `total`, the shift [row] a row's own and
// known beforehand; null: 0.
template <class T>
void add_exponentials(const Tile& t, const T* s, const T* shift, T* total, T* columns) {
  if (!t.diagonal()) memset(columns, 0, t.nj * sizeof(T));
  for (int64_t i = 0; i < t.ni; i++) {
    Vector<T> row = {};
    for (int64_t j = 0; j < t.nj; j += kLanes<T>) {
      const Vector<T> x = load(s + i * kTile + j);
      const Vector<T> e = exp2(shift ? x - shift[t.i + i] : x);
      row += e;
      if (t.diagonal()) continue;
      store(columns + j, load(columns + j) + (shift ? exp2(x - load(shift + t.j + j)) : e));
    }
    total[t.i + i] += sum(row);
  }
  if (t.diagonal()) return;
  for (int64_t j = 0; j < t.nj; j++) total[t.j + j] += columns[j];
}

template <class T>
void reduce_rows(const Tile& t, const T* s, TileSums<T>& out) {
  for (int64_t i = 0; i < t.ni; i++) {
    const T* row = s + i * kTile;
    Vector<T> most = splat(kLeftOut<T>), total = {};
    for (int64_t j = 0; j < t.nj; j += kLanes<T>) most = max(most, load(row + j));
    out.shift[i] = max_lane(most);
    for (int64_t j = 0; j < t.nj; j += kLanes<T>) total += exp2(load(row + j) - out.shift[i]);
    out.total[i] = sum(total);
  }
}

template <class T>
void reduce_columns(const Tile& t, const T* s, TileSums<T>& out) {
  for (int64_t j = 0; j < t.nj; j += kLanes<T>) {
    Vector<T> most = splat(kLeftOut<T>), total = {};
    for (int64_t i = 0; i < t.ni; i++) most = max(most, load(s + i * kTile + j));
    for (int64_t i = 0; i < t.ni; i++) total += exp2(load(s + i * kTile + j) - most);
    store(out.shift + j, most);
    store(out.total + j, total);
  }
}

// Adds the sums of n rows from `first`: both sides brought to the greater shift.
template <class T>
void merge(const TileSums<T>& sums, int64_t first, int64_t n, const Logsumexp<T>& out) {
  for (int64_t i = 0; i < n; i += kLanes<T>) {
    const Vector<T> a = load(out.shift + first + i), b = load(sums.shift + i);
    const Vector<T> shift = max(a, b);
    store(out.total + first + i,
          load(out.total + first + i) * exp2(a - shift) + load(sums.total + i) * exp2(b - shift));
    store(out.shift + first + i, shift);
  }
}

// Adds one tile of similarities, in base 2, to the rows' sums.
template <class T>
void add_tile(const Tile& t, const T* s, TileSums<T>& sums, const Logsumexp<T>& out) {
  if (!out.shift) return add_exponentials<T>(t, s, nullptr, out.total, sums.total);
  reduce_rows(t, s, sums);
  merge(sums, t.i, t.ni, out);
  if (t.diagonal()) return;
  reduce_columns(t, s, sums);
  merge(sums, t.j, t.nj, out);
}

}  // namespace hsv::HSV_ISA
