// The keys' gradient: the weights of each chunk of keys once more, and their products with the queries.
#pragma once

#include <math.h>

#include "cpu/contrast_rectangle_tiles.h"
#include "cpu/memory.h"

namespace hsv::HSV_ISA::rectangle {

template <class E>
struct BackwardMemory {
  using T = Sum<E>;
  int parts;  // of the keys
  Shared<E> shared;
  T *offset, *weight;  // [rows] W_ij = weight_i · 2^(s_ij − offset_i); zero for padding and without candidates
  char* scratch;

  BackwardMemory(const RectangleProblem& p, Arena& arena)
      : parts(static_cast<int>(at_most(useful_threads<E>(p), padded<E>(p.m) / kPanel<E>))), shared(p, true, arena) {
    offset = arena.take<T>(shared.q.rows);
    weight = arena.take<T>(shared.q.rows);
    Arena one(nullptr);
    own(p, one);
    scratch = arena.take<char>(one.used() * parts);
  }
  Scratch<E> own(const RectangleProblem& p, Arena& arena) const {
    return Scratch<E>(p, false, kKeys * padded<E>(p.dim), arena);
  }
};

template <class E>
void weigh_row(const RectangleProblem& p, const RectangleBackward& b, const BackwardMemory<E>& m, int64_t i) {
  using T = Sum<E>;
  const T* sum = static_cast<const T*>(b.log2_sum);
  const bool some = i < p.n && sum[i] != static_cast<T>(-HUGE_VAL);
  m.offset[i] = some ? sum[i] : 0;
  m.weight[i] =
      some ? static_cast<T>(static_cast<const T*>(b.grad)[i] * ::exp2(-static_cast<double>(sum[p.n + i]))) : 0;
}

// Adds Σ_i W_ij q_i over the tile's queries to the sums of its keys.
template <class E>
void add_gradients(const RectangleProblem& p, const BackwardMemory<E>& m, const Tile& t, const Scratch<E>& own) {
  using T = Sum<E>;
  constexpr int L = kLanes<T>;
  const Base2<E> base2(p);
  const bool whole = !leaves_out<E>(p, t);
  for_products(own.keys, 0, t.nj, m.shared.q, t.i, t.ni, [&](int64_t j, int64_t i, auto& c) HSV_INLINE_LAMBDA {
    constexpr int R = sizeof c / sizeof c[0];
    const Vector<T> offset[2] = {load(m.offset + t.i + i), load(m.offset + t.i + i + L)};
    const Vector<T> weight[2] = {load(m.weight + t.i + i), load(m.weight + t.i + i + L)};
    HSV_UNROLL
    for (int r = 0; r < R; r++) {
      const Vector<T> low = base2(c[r][0]), high = base2(c[r][1]);
      if (whole) {
        store_weights(own.weights() + (j + r) * kQueries + i / kValues<E>, weight[0] * exp2(low - offset[0]),
                      weight[1] * exp2(high - offset[1]));
      } else {
        store(own.tile + (j + r) * kQueries + i, low);
        store(own.tile + (j + r) * kQueries + i + L, high);
      }
    }
  });

  if (!whole) {
    for_left_out(p, t, [&](int64_t i, int64_t j) { own.tile[(j - t.j) * kQueries + i - t.i] = kLeftOut<T>; });
    if (p.q_labels) leave_out_label<T>(m.shared.k_ids + t.j, t.nj, m.shared.q_ids + t.i, t.ni, own.tile, kQueries);
    for (int64_t j = 0; j < t.nj; j++) {
      const auto weigh = [&](int64_t i) {
        return load(m.weight + t.i + i) * exp2(load(own.tile + j * kQueries + i) - load(m.offset + t.i + i));
      };
      for (int64_t i = 0; i < t.ni; i += 2 * L) {
        const Vector<T> low = weigh(i), high = weigh(i + L);
        store_weights(own.weights() + j * kQueries + i / kValues<E>, low, high);
      }
    }
  }
  add_weighted(own.weights(), kQueries, t.nj, m.shared.q, t.i, t.ni, p.dim, own.sums, kKeys);
}

// Adds h_i q_i to the positive of each query, in the order of the queries, and writes the gradients of keys [j, end).
template <class E>
void finish_keys(const RectangleProblem& p, const RectangleBackward& b, int64_t j, int64_t end, Sum<E>* sums) {
  using T = Sum<E>;
  constexpr int P = kPanel<E>;
  with_element<T>(p.dtype, [&](auto element) {
    using S = decltype(element);
    const auto place = [&](int64_t row, int64_t k) { return sums + k / P * P * kKeys + (row - j) * P + k % P; };
    for (int64_t i = 0; p.positive && i < p.n; i++) {
      if (p.positive[i] < j || p.positive[i] >= end) continue;
      const T pull = static_cast<const T*>(b.positive_grad)[i];
      const S* q = static_cast<const S*>(p.q.data) + i * p.q.row_stride;
      for (int64_t k = 0; k < p.dim; k++) *place(p.positive[i], k) += pull * widen(q[k * p.q.column_stride]);
    }
    const T scale = static_cast<T>(p.scale), *besides = static_cast<const T*>(b.besides);
    for (int64_t row = j; row < end; row++) {
      S* out = static_cast<S*>(b.k_grad) + row * p.dim;
      for (int64_t column = 0; column < p.dim; column += P) {
        T* x = place(row, column);
        const int64_t width = at_most(P, p.dim - column);
        for (int64_t k = 0; k < width; k++) x[k] *= scale;
        for (int64_t k = 0; besides && k < width; k++) x[k] += besides[row * p.dim + column + k];
        for (int64_t k = 0; k < width; k++) narrow(x[k], out + column + k);
      }
    }
  });
}

template <class E>
void backward(const RectangleProblem& p, const RectangleBackward& b) {
  Arena arena(p.workspace);
  const BackwardMemory<E> m(p, arena);
  Arena one(nullptr);
  m.own(p, one);
  prefer_huge_pages(b.k_grad, p.m * p.dim * with_element<Sum<E>>(p.dtype, [](auto x) -> int64_t { return sizeof x; }));
  parallel(m.parts, [&](int thread, int team) {
    m.shared.prepare(p, thread, team);
    own_part(m.shared.q.rows, thread, team, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++) weigh_row(p, b, m, i);
    });
    barrier(team);
    for (int part = thread; part < m.parts; part += team) {
      Arena memory(m.scratch + part * one.used());
      const Scratch<E> own = m.own(p, memory);
      const int64_t end = part_begin<E>(p.m, part + 1, m.parts), step = even_step<E>(m.shared.q.rows, kQueries);
      for (int64_t j = part_begin<E>(p.m, part, m.parts); j < end; j += kKeys) {
        const int64_t nj = at_most(kKeys, end - j);
        pack_keys(p, j, j + nj, own.keys);
        memset(own.sums, 0, kKeys * padded<E>(p.dim) * sizeof(Sum<E>));
        for (int64_t i = 0; i < m.shared.q.rows; i += step) {
          add_gradients(p, m, Tile{i, at_most(step, m.shared.q.rows - i), j, nj}, own);
        }
        finish_keys<E>(p, b, j, at_most(j + nj, p.m), own.sums);
      }
    }
  });
}

}  // namespace hsv::HSV_ISA::rectangle
