// The weights of pairs, W_ij = pull_i exp(S_ij − lse_i) + pull_j exp(S_ij − lse_j), and their products with the rows.
#pragma once

#include "cpu/contrast_tiles.h"

namespace hsv::HSV_ISA {

inline constexpr int64_t kWeightTile = 192;    // most rows and columns of a tile: a multiple of every panel
inline constexpr int64_t kWeightStride = 208;  // lines of the cache between two rows are odd in number, or nearly so

// The weights of a tile as both products take them: by rows, and by columns for the mirror image.
template <class E>
struct alignas(64) WeightTile {
  static constexpr int64_t row_stride = kWeightStride, column_step = kWeightStride;
  E values[kWeightTile * kWeightStride];

  const E* row(int64_t i) const { return values + i * row_stride; }
  const E* column(int64_t j) const { return values + j; }

  template <int R>
  HSV_INLINE void put(int64_t i, int64_t j, const Vector<E> (&w)[R][2]) {
    HSV_UNROLL
    for (int r = 0; r < R; r++) {
      E* place = values + (i + r) * row_stride + j;
      store(place, w[r][0]), store(place + kLanes<E>, w[r][1]);
    }
  }
};

#if defined(__AVX512BF16__)
// Pairs lie along the dimension that is summed over, so that each direction needs its own.
template <>
struct alignas(64) WeightTile<Pair> {
  static constexpr int64_t row_stride = kWeightTile / 2 + 16, column_step = kWeightStride;
  Pair rows[kWeightTile * row_stride];            // columns j and j + 1 of row i
  Pair columns[kWeightTile / 2 * kWeightStride];  // rows i and i + 1 of column j

  const Pair* row(int64_t i) const { return rows + i * row_stride; }
  const Pair* column(int64_t j) const { return columns + j; }

  template <int R>
  HSV_INLINE void put(int64_t i, int64_t j, const Vec (&w)[R][2]) {
    HSV_UNROLL
    for (int r = 0; r < R; r++) store_pairs(rows + (i + r) * row_stride + j / 2, w[r][0], w[r][1]);
    const __m512i interleave = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8,  //
                                                23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    HSV_UNROLL
    for (int r = 0; r < R; r += 2) {
      HSV_UNROLL
      for (int h = 0; h < 2; h++) {
        const __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)w[r + 1][h], (__m512)w[r][h]);
        _mm512_storeu_si512(columns + (i + r) / 2 * column_step + j + h * kLanes<float>,
                            _mm512_permutexvar_epi16(interleave, both));
      }
    }
  }

 private:
  HSV_INLINE static void store_pairs(Pair* out, Vec low, Vec high) {
    _mm512_storeu_si512(out, (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low));
  }
};
#endif

// What the exponentials of a row are weighed with.
template <class T>
struct RowWeights {
  T* weight;  // [row] pull; times exp(−lse) under the fixed shift
  T* offset;  // [row] lse in base 2, taken off before the exponential; null under the fixed shift
};

// Weights of a tile from its similarities, or from what forward kept of them.
template <class E, class T>
void weigh_tile(const ContrastProblem& p, const SquareRows<E>& z, const Tile& t, const RowWeights<T>& rows,
                const T* kept, WeightTile<E>& out) {
  const auto put = [&](int64_t i, int64_t j, auto& c) HSV_INLINE_LAMBDA {
    constexpr int R = sizeof c / sizeof c[0];
    HSV_UNROLL
    for (int h = 0; h < 2; h++) {
      const Vector<T> weights = load(rows.weight + j + h * kLanes<T>);
      HSV_UNROLL
      for (int r = 0; r < R; r++) c[r][h] *= weights + rows.weight[i + r];
    }
    leave_out<T, R>(p, i, j, 0, c);
    out.template put<R>(i - t.i, j - t.j, c);
  };
  const auto exponentials = [&](int64_t i, int64_t j, auto& c) HSV_INLINE_LAMBDA {
    constexpr int R = sizeof c / sizeof c[0];
    HSV_UNROLL
    for (int r = 0; r < R; r++) c[r][0] = exp2_in_range(c[r][0]), c[r][1] = exp2_in_range(c[r][1]);
    put(i, j, c);
  };
  const auto online = [&](int64_t i, int64_t j, auto& c) HSV_INLINE_LAMBDA {
    constexpr int R = sizeof c / sizeof c[0];
    HSV_UNROLL
    for (int h = 0; h < 2; h++) {
      const Vector<T> weights = load(rows.weight + j + h * kLanes<T>), offsets = load(rows.offset + j + h * kLanes<T>);
      HSV_UNROLL
      for (int r = 0; r < R; r++) {
        c[r][h] = weights * exp2(c[r][h] - offsets) + rows.weight[i + r] * exp2(c[r][h] - rows.offset[i + r]);
      }
    }
    leave_out<T, R>(p, i, j, 0, c);
    out.template put<R>(i - t.i, j - t.j, c);
  };
  if (rows.offset) return for_similarities(z, t, online);
  if (!kept || !is_kept(t.i + t.ni - 1, t.j)) return for_similarities(z, t, exponentials);
  for_kept(z, kept, t, put);
}

// Adds W z to the gradients of the tile's rows and, off the diagonal, Wᵀ z to those of its columns; grad
// [slab][row][kPanel].
template <class E, class T>
void add_gradients(const SquareRows<E>& z, const Tile& t, const WeightTile<E>& w, T* grad) {
  constexpr int P = kPanel<E>;
  const auto add = [&](T* out, const E* weights, int64_t row, int64_t step, const E* values, int64_t depth, auto block)
                       HSV_INLINE_LAMBDA {
                         Vector<T> c[block.rows][2];
                         multiply(weights, row, step, values, depth, c);
                         HSV_UNROLL
                         for (int r = 0; r < block.rows; r++) {
                           store(out + r * P, load(out + r * P) + c[r][0]);
                           store(out + r * P + kLanes<T>, load(out + r * P + kLanes<T>) + c[r][1]);
                         }
                       };
  for (int64_t column = 0; column < z.columns; column += P) {
    T* slab = grad + column * z.rows;
    for (int64_t i = 0; i < t.ni; i += P) {
      for_row_blocks<P>([&](auto block) HSV_INLINE_LAMBDA {
        const int64_t row = i + block.first;
        add(slab + (t.i + row) * P, w.row(row), w.row_stride, 1, z.slab(column, t.j), t.nj / kValues<E>, block);
      });
    }
    for (int64_t j = 0; j < t.nj && !t.diagonal(); j += P) {
      for_row_blocks<P>([&](auto block) HSV_INLINE_LAMBDA {
        const int64_t row = j + block.first;
        add(slab + (t.j + row) * P, w.column(row), 1, w.column_step, z.slab(column, t.i), t.ni / kValues<E>, block);
      });
    }
  }
}

}  // namespace hsv::HSV_ISA
