// Tiles of queries against keys: who visits them, their products, what is left out, and the memory for it.
#pragma once

#include "cpu/arena.h"
#include "cpu/contrast_block.h"
#include "cpu/contrast_rectangle.h"
#include "cpu/parallel.h"

namespace hsv::HSV_ISA::rectangle {

inline constexpr int64_t kQueries = 192, kKeys = 192;  // most of a tile: multiples of every panel

template <class T>
using Id = std::remove_reference_t<decltype(typename VectorTypes<T>::Bits{}[0])>;

// Queries [i, i + ni) against keys [j, j + nj).
struct Tile {
  int64_t i, ni, j, nj;
};

inline int64_t at_most(int64_t n, int64_t most) {
  return n < most ? n : most;
}

// Steps of at most `most` that part n rows evenly, in whole panels.
template <class E>
int64_t even_step(int64_t n, int64_t most) {
  const int64_t steps = (n + most - 1) / most;
  return padded<E>((n + steps - 1) / steps);
}

// Parts of the queries and of the keys, one part of each to a thread; one of the two counts is 1.
struct Split {
  int queries, keys;
};

// Threads that the work can keep busy: each should have some 20 µs of products.
template <class E>
int useful_threads(const RectangleProblem& p) {
  const int64_t most = 1 + padded<E>(p.n) * padded<E>(p.m) * depth_of<E>(p.dim) / (1 << 20);
  return static_cast<int>(at_most(p.threads < 1 ? 1 : p.threads, most));
}

// Each part of the queries packs all keys for itself, so it should be large; each part of the keys has sums of its own
// for all queries, so these should be few.
template <class E>
Split split_forward(const RectangleProblem& p) {
  const int threads = useful_threads<E>(p);
  const int64_t query_panels = padded<E>(p.n) / kPanel<E>, key_panels = padded<E>(p.m) / kPanel<E>;
  if (p.n < 4 * kQueries * threads && p.n * threads <= 2 * p.m) {
    return {1, static_cast<int>(at_most(threads, key_panels))};
  }
  return {static_cast<int>(at_most(threads, query_panels)), 1};
}

// Multiples of a panel, the last padded.
template <class E>
int64_t part_begin(int64_t rows, int64_t part, int64_t parts) {
  return padded<E>(rows) / kPanel<E> * part / parts * kPanel<E>;
}

// Rows of ids as wide as the lanes of T; what pads them is of no matter.
template <class T>
void copy_ids(const int32_t* from, int64_t n, int thread, int team, Id<T>* out) {
  own_part(n, thread, team, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) out[i] = from[i];
  });
}

// The factor that takes similarities to base 2. In packed queries, unless rounding to bfloat16 would come after it.
template <class E>
double packed_factor(const RectangleProblem& p) {
  return kValues<E> == 1 ? p.scale / kLn2 : 1;
}

template <class E>
struct Base2 {
  Sum<E> head, tail;  // the factor in two parts: rounded to float it errs in the same direction everywhere

  explicit Base2(const RectangleProblem& p)
      : head(static_cast<Sum<E>>(p.scale / kLn2)), tail(static_cast<Sum<E>>(p.scale / kLn2 - head)) {}
  HSV_INLINE Vector<Sum<E>> operator()(Vector<Sum<E>> product) const {
    return kValues<E> == 1 ? product : product * head + product * tail;
  }
};

// f(r, c, block) for blocks block[R][2] of products: rows from r of a, two vectors of columns from c, rows of b.
template <class E, class F>
HSV_INLINE void for_products(const PackedRows<E>& a, int64_t a_begin, int64_t a_count, const PackedRows<E>& b,
                             int64_t b_begin, int64_t b_count, const F& f) {
  constexpr int P = kPanel<E>;
  for (int64_t c = 0; c < b_count; c += P) {
    for (int64_t r = 0; r < a_count; r += P) {
      for_row_blocks<P>([&](auto block) HSV_INLINE_LAMBDA {
        if (r + block.first >= a_count) return;
        Vector<Sum<E>> products[block.rows][2];
        multiply(a.panel(a_begin + r) + block.first, 1, P, b.panel(b_begin + c), a.depth, products);
        f(r + block.first, c, products);
      });
    }
  }
}

// sums[slab][r][kPanel] += Σ_k w[r][k] · b[k] for rows r of weights, b's rows k from b_begin; w [rows][stride].
template <class E>
void add_weighted(const E* w, int64_t stride, int64_t rows, const PackedRows<E>& b, int64_t b_begin, int64_t b_count,
                  int64_t dim, Sum<E>* sums, int64_t sums_rows) {
  using T = Sum<E>;
  constexpr int P = kPanel<E>, L = kLanes<T>;
  for (int64_t column = 0; column < dim; column += P) {
    const E* slab = b.slab(column, b_begin);
    T* out = sums + column * sums_rows;
    for (int64_t r = 0; r < rows; r += P) {
      for_row_blocks<P>([&](auto block) HSV_INLINE_LAMBDA {
        if (r + block.first >= rows) return;
        Vector<T> products[block.rows][2];
        multiply(w + (r + block.first) * stride, stride, 1, slab, depth_of<E>(b_count), products);
        HSV_UNROLL
        for (int i = 0; i < block.rows; i++) {
          T* place = out + (r + block.first + i) * P;
          store(place, load(place) + products[i][0]);
          store(place + L, load(place + L) + products[i][1]);
        }
      });
    }
  }
}

// The weights of kPanel columns in the elements that products take.
template <class T>
HSV_INLINE void store_weights(T* p, Vector<T> low, Vector<T> high) {
  store(p, low);
  store(p + kLanes<T>, high);
}
#if defined(__AVX512BF16__)
HSV_INLINE void store_weights(Pair* p, Vec low, Vec high) {
  _mm512_storeu_si512(p, (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low));
}
#endif

// f(i, j) for what the query i leaves out by place, of the tile's keys.
template <class F>
void for_left_out(const RectangleProblem& p, const Tile& t, const F& f) {
  const auto inside = [&](int64_t j) { return j >= t.j && j < t.j + t.nj; };
  for (int64_t i = t.i; i < at_most(t.i + t.ni, p.n); i++) {
    if (p.exclude_self && inside(i + p.self_offset)) f(i, i + p.self_offset);
    if (p.positive && inside(p.positive[i])) f(i, p.positive[i]);
  }
}

template <class E>
bool leaves_out(const RectangleProblem& p, const Tile& t) {
  bool any = p.q_labels;
  if (p.exclude_self || p.positive) for_left_out(p, t, [&](int64_t, int64_t) { any = true; });
  return any;
}

// Marks columns of the row's own label; s [rows][stride].
template <class T>
void leave_out_label(const Id<T>* row_ids, int64_t rows, const Id<T>* column_ids, int64_t columns, T* s,
                     int64_t stride) {
  using Ids = typename VectorTypes<T>::Bits;
  for (int64_t r = 0; r < rows; r++) {
    const Ids own = row_ids[r] + Ids{};
    for (int64_t c = 0; c < columns; c += kLanes<T>) {
      Ids ids;
      memcpy(&ids, column_ids + c, sizeof ids);
      T* place = s + r * stride + c;
      store(place, ids == own ? splat(kLeftOut<T>) : load(place));
    }
  }
}

// One thread's own memory: packed keys, and a tile of similarities that become weights in their place.
template <class E>
struct Scratch {
  PackedRows<E> keys;
  Sum<E>* tile;  // [kQueries][kKeys] or the other way round
  Sum<E>* sums;  // forward: [kQueries][lanes], partial sums of each row; backward: [slab][kKeys][kPanel], Σ_i W_ij q_i

  Scratch(const RectangleProblem& p, bool slabs, int64_t num_sums, Arena& arena) {
    const int64_t rows = at_most(padded<E>(p.m), kKeys), depth = depth_of<E>(p.dim);
    keys = {arena.take<E>(rows * depth), slabs ? arena.take<E>(rows * padded<E>(p.dim) / kValues<E>) : nullptr, rows,
            depth};
    tile = arena.take<Sum<E>>(kQueries * kKeys);
    sums = arena.take<Sum<E>>(num_sums);
  }
  E* weights() const { return reinterpret_cast<E*>(tile); }
};

// What threads share: the packed queries and the ids of labels.
template <class E>
struct Shared {
  PackedRows<E> q;
  Sum<E>* q_squares;  // [panel] max ‖q‖²
  Id<Sum<E>>*q_ids, *k_ids;

  Shared(const RectangleProblem& p, bool slabs, Arena& arena) {
    const int64_t rows = padded<E>(p.n), depth = depth_of<E>(p.dim);
    q = {arena.take<E>(rows * depth), slabs ? arena.take<E>(rows * padded<E>(p.dim) / kValues<E>) : nullptr, rows,
         depth};
    q_squares = arena.take<Sum<E>>(rows / kPanel<E>);
    q_ids = p.q_labels ? arena.take<Id<Sum<E>>>(rows) : nullptr;
    k_ids = p.q_labels ? arena.take<Id<Sum<E>>>(padded<E>(p.m)) : nullptr;
  }

  // This thread's share of filling it.
  void prepare(const RectangleProblem& p, int thread, int team) const {
    own_part(q.rows / kPanel<E>, thread, team, [&](int64_t begin, int64_t end) {
      for (int64_t panel = begin; panel < end; panel++) {
        const int64_t row = panel * kPanel<E>;
        q_squares[panel] = pack_panel(p.dtype, p.q, p.n, p.dim, row, packed_factor<E>(p), q, row);
      }
    });
    if (!p.q_labels) return;
    copy_ids<Sum<E>>(p.q_labels, p.n, thread, team, q_ids);
    copy_ids<Sum<E>>(p.k_labels, p.m, thread, team, k_ids);
  }
};

// Packs keys [begin, end), panels as they are; returns max ‖k‖².
template <class E>
Sum<E> pack_keys(const RectangleProblem& p, int64_t begin, int64_t end, const PackedRows<E>& out) {
  Sum<E> most = 0;
  for (int64_t row = begin; row < end; row += kPanel<E>) {
    const Sum<E> squares = pack_panel(p.dtype, p.k, p.m, p.dim, row, 1, out, row - begin);
    if (!(squares <= most)) most = squares;
  }
  return most;
}

}  // namespace hsv::HSV_ISA::rectangle
