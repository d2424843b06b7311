// Sums of the queries' exponentials, and of the keys that they weigh, over chunks of keys.
#pragma once

#include <math.h>

#include "cpu/contrast_rectangle_tiles.h"

namespace hsv::HSV_ISA::rectangle {

// Σ 2^(s − shift) of each query over one part of the keys.
template <class T>
struct Sums {
  T *shift, *total;  // [rows]
  T* keys;           // [slab][rows][kPanel] the same sum with the key in it, or null
};

template <class E>
struct ForwardMemory {
  using T = Sum<E>;
  Split split;
  bool mean_key;
  Shared<E> shared;
  T *shift, *total, *keys;  // of all parts of the keys
  char* scratch;

  ForwardMemory(const RectangleProblem& p, bool mean_key, Arena& arena)
      : split(split_forward<E>(p)), mean_key(mean_key), shared(p, false, arena) {
    const int64_t rows = shared.q.rows * split.keys;
    shift = arena.take<T>(rows);
    total = arena.take<T>(rows);
    keys = mean_key ? arena.take<T>(rows * padded<E>(p.dim)) : nullptr;
    Arena one(nullptr);
    own(p, one);
    scratch = arena.take<char>(one.used() * split.queries * split.keys);
  }
  Sums<T> sums(const RectangleProblem& p, int part) const {
    const int64_t first = part * shared.q.rows;
    return {shift + first, total + first, mean_key ? keys + first * padded<E>(p.dim) : nullptr};
  }
  Scratch<E> own(const RectangleProblem& p, Arena& arena) const {
    return Scratch<E>(p, mean_key, kQueries * kLanes<T>, arena);
  }
};

// Whether 2^s of these keys stays in range without a shift, alone, in their sum, and times a key.
//
// The squares are computed in T: what underflowed in them is at most the least normal number for each of `dim` values.
template <class T>
bool in_range(double factor, T q_squares, T k_squares, int64_t m, int64_t dim) {
  const double lost = static_cast<double>(dim) * (sizeof(T) == 4 ? __FLT_MIN__ : __DBL_MIN__),
               bound = fabs(factor) * sqrt(q_squares + lost) * sqrt(k_squares + lost);
  return bound + log2(static_cast<double>(m)) + fabs(log2(sqrt(static_cast<double>(k_squares)))) < 64 / kLn2;
}

// Keys that come next, asked for bit by bit while products keep the caches idle: packing would wait for each line of
// them.
class Ahead {
 public:
  // Of keys [begin, end) of `p`, elements of so many bytes; none unless they follow each other in memory.
  Ahead(const RectangleProblem& p, int64_t bytes, int64_t begin, int64_t end, int64_t calls) {
    const bool dense = p.k.column_stride == 1 && p.k.row_stride == p.dim;
    const int64_t row = p.dim * bytes;
    next_ = static_cast<const char*>(p.k.data) + begin * row;
    left_ = dense ? (at_most(end, p.m) - begin) * row : 0;
    share_ = left_ / (calls * kLine) + 1;
  }
  HSV_INLINE void operator()() {
    for (int64_t l = 0; l < share_ && left_ > 0; l++, next_ += kLine, left_ -= kLine) __builtin_prefetch(next_, 0, 2);
  }

 private:
  static constexpr int64_t kLine = 64;
  const char* next_;
  int64_t left_, share_;
};

// A tile that leaves nothing out, under the shift 0: exponentials while the products are in registers.
template <class E>
void add_whole_tile(const RectangleProblem& p, const PackedRows<E>& q, const Tile& t, const Scratch<E>& own,
                    Ahead& ahead, const Sums<Sum<E>>& out) {
  using T = Sum<E>;
  constexpr int L = kLanes<T>;
  const Base2<E> base2(p);
  memset(own.sums, 0, t.ni * L * sizeof(T));
  for_products(q, t.i, t.ni, own.keys, 0, t.nj, [&](int64_t i, int64_t j, auto& c) HSV_INLINE_LAMBDA {
    constexpr int R = sizeof c / sizeof c[0];
    ahead();
    HSV_UNROLL
    for (int r = 0; r < R; r++) {
      const Vector<T> a = exp2_in_range(base2(c[r][0])), b = exp2_in_range(base2(c[r][1]));
      T* lanes = own.sums + (i + r) * L;
      store(lanes, load(lanes) + (a + b));
      if (out.keys) store_weights(own.weights() + (i + r) * kKeys + j / kValues<E>, a, b);
    }
  });
  for (int64_t i = 0; i < t.ni; i++) out.total[t.i + i] += sum(load(own.sums + i * L));
}

// Brings the sums of row i to the shift `to`.
template <class T>
void raise_shift(const Sums<T>& sums, int64_t i, T to, int64_t rows, int64_t dim) {
  const T factor = exp2(splat(sums.shift[i] - to))[0];
  sums.shift[i] = to;
  sums.total[i] *= factor;
  for (int64_t column = 0; sums.keys && column < dim; column += kPanel<T>) {
    T* keys = sums.keys + column * rows + i * kPanel<T>;
    for (int k = 0; k < kPanel<T>; k++) keys[k] *= factor;
  }
}

// Any tile: similarities first, then what is left out, the maximum unless the shift is fixed, and the exponentials.
template <class E>
void add_tile(const RectangleProblem& p, const Shared<E>& shared, const Tile& t, bool fixed, const Scratch<E>& own,
              const Sums<Sum<E>>& out) {
  using T = Sum<E>;
  constexpr int L = kLanes<T>;
  const Base2<E> base2(p);
  for_products(shared.q, t.i, t.ni, own.keys, 0, t.nj, [&](int64_t i, int64_t j, auto& c) HSV_INLINE_LAMBDA {
    constexpr int R = sizeof c / sizeof c[0];
    HSV_UNROLL
    for (int r = 0; r < R; r++) {
      store(own.tile + (i + r) * kKeys + j, base2(c[r][0]));
      store(own.tile + (i + r) * kKeys + j + L, base2(c[r][1]));
    }
  });

  for_left_out(p, t, [&](int64_t i, int64_t j) { own.tile[(i - t.i) * kKeys + j - t.j] = kLeftOut<T>; });
  if (p.q_labels) leave_out_label<T>(shared.q_ids + t.i, t.ni, shared.k_ids + t.j, t.nj, own.tile, kKeys);
  const int64_t keys = at_most(t.nj, p.m - t.j);
  for (int64_t i = 0; i < t.ni; i++) {
    T* s = own.tile + i * kKeys;
    for (int64_t j = keys; j < t.nj; j++) s[j] = kLeftOut<T>;
    if (!fixed) {
      Vector<T> most = splat(out.shift[t.i + i]);
      for (int64_t j = 0; j < t.nj; j += L) most = max(load(s + j), most);
      const T shift = max_lane(most);
      if (shift > out.shift[t.i + i]) raise_shift(out, t.i + i, shift, shared.q.rows, p.dim);
    }
    const T shift = out.shift[t.i + i];
    Vector<T> total = {};
    for (int64_t j = 0; j < t.nj; j += 2 * L) {
      const Vector<T> a = exp2(load(s + j) - shift), b = exp2(load(s + j + L) - shift);
      total += a + b;
      if (out.keys) store_weights(own.weights() + i * kKeys + j / kValues<E>, a, b);
    }
    out.total[t.i + i] += sum(total);
  }
}

// One thread's part: its queries against its keys, chunk by chunk.
template <class E>
void forward_part(const RectangleProblem& p, const Shared<E>& shared, int64_t i_begin, int64_t i_end, int64_t j_begin,
                  int64_t j_end, const Scratch<E>& own, const Sums<Sum<E>>& out) {
  using T = Sum<E>;
  T q_squares = 0;
  for (int64_t panel = i_begin / kPanel<E>; panel < i_end / kPanel<E>; panel++) {
    if (!(shared.q_squares[panel] <= q_squares)) q_squares = shared.q_squares[panel];
  }
  bool fixed = true;  // until keys come that do not allow it
  for (int64_t i = i_begin; i < i_end; i++) out.shift[i] = out.total[i] = 0;
  for (int64_t column = 0; out.keys && column < p.dim; column += kPanel<E>) {
    memset(out.keys + column * shared.q.rows + i_begin * kPanel<E>, 0, (i_end - i_begin) * kPanel<E> * sizeof(T));
  }

  const int64_t step = even_step<E>(i_end - i_begin, kQueries);
  const int64_t bytes = with_element<T>(p.dtype, [](auto element) { return static_cast<int64_t>(sizeof element); });
  for (int64_t j = j_begin; j < j_end; j += kKeys) {
    const int64_t nj = at_most(kKeys, j_end - j);
    const T k_squares = pack_keys(p, j, j + nj, own.keys);
    if (fixed && !in_range(p.scale / kLn2, q_squares, k_squares, p.m, p.dim)) {
      fixed = false;
      for (int64_t i = i_begin; i < i_end; i++) out.shift[i] = out.total[i] == 0 ? kNone<T> : 0;
    }
    // a block of products is kPanel keys by a dozen queries
    Ahead ahead(p, bytes, j + nj, at_most(j + nj + kKeys, j_end), (i_end - i_begin) / 12 * (nj / kPanel<E>)+1);
    for (int64_t i = i_begin; i < i_end; i += step) {
      const Tile t{i, at_most(step, i_end - i), j, nj};
      if (fixed && t.j + t.nj <= p.m && !leaves_out<E>(p, t)) {
        add_whole_tile(p, shared.q, t, own, ahead, out);
      } else {
        add_tile(p, shared, t, fixed, own, out);
      }
      if (out.keys) {
        add_weighted(own.weights(), kKeys, t.ni, own.keys, 0, t.nj, p.dim, out.keys + t.i * kPanel<E>, shared.q.rows);
      }
    }
  }
}

// scale · ⟨q_i, positive_i⟩ of the rows as given, in double.
template <class T>
double positive_logit(const RectangleProblem& p, const RectangleForward& f, int64_t i) {
  const Rows& rows = f.positive_rows.data ? f.positive_rows : p.k;
  const int64_t row = f.positive_rows.data ? i : p.positive[i];
  double total = 0;
  with_element<T>(p.dtype, [&](auto element) {
    using S = decltype(element);
    const S* q = static_cast<const S*>(p.q.data) + i * p.q.row_stride;
    const S* x = static_cast<const S*>(rows.data) + row * rows.row_stride;
    for (int64_t k = 0; k < p.dim; k++) {
      total += static_cast<double>(widen(q[k * p.q.column_stride])) * widen(x[k * rows.column_stride]);
    }
  });
  return p.scale * total;
}

// The results of row i, from the sums of all parts of the keys in their order.
template <class E>
void finish_row(const RectangleProblem& p, const RectangleForward& f, const ForwardMemory<E>& m, int64_t i) {
  using T = Sum<E>;
  constexpr int P = kPanel<E>;
  double shift = -HUGE_VAL, total = 0;
  for (int part = 0; part < m.split.keys; part++) {
    const Sums<T> sums = m.sums(p, part);
    if (sums.total[i] != 0 && !(sums.shift[i] <= shift)) shift = sums.shift[i];
  }
  const auto factor = [&](const Sums<T>& sums) { return sums.total[i] == 0 ? 0 : ::exp2(sums.shift[i] - shift); };
  for (int part = 0; part < m.split.keys; part++) total += factor(m.sums(p, part)) * m.sums(p, part).total[i];

  const double log2_sum = total == 0 ? -HUGE_VAL : log2(total) + shift;
  const double logit = f.positive_logit ? positive_logit<T>(p, f, i) : 0;
  static_cast<T*>(f.lse)[i] = static_cast<T>(log2_sum * kLn2 - logit);
  if (f.positive_logit) static_cast<T*>(f.positive_logit)[i] = static_cast<T>(logit);
  if (f.log2_sum) {
    T* out = static_cast<T*>(f.log2_sum);
    out[i] = static_cast<T>(log2_sum);
    out[p.n + i] = static_cast<T>(log2_sum - out[i]);
  }
  if (!f.mean_key) return;
  T* mean = static_cast<T*>(f.mean_key) + i * p.dim;
  memset(mean, 0, p.dim * sizeof(T));
  for (int part = 0; total != 0 && part < m.split.keys; part++) {
    const Sums<T> sums = m.sums(p, part);
    const T share = static_cast<T>(factor(sums) / total);
    for (int64_t column = 0; share != 0 && column < p.dim; column += P) {
      const T* keys = sums.keys + column * m.shared.q.rows + i * P;
      for (int64_t k = 0; k < at_most(P, p.dim - column); k++) mean[column + k] += share * keys[k];
    }
  }
}

template <class E>
void forward(const RectangleProblem& p, const RectangleForward& f) {
  Arena arena(p.workspace);
  const ForwardMemory<E> m(p, f.mean_key, arena);
  const int parts = m.split.queries * m.split.keys;
  Arena one(nullptr);
  m.own(p, one);
  parallel(parts, [&](int thread, int team) {
    m.shared.prepare(p, thread, team);
    barrier(team);
    for (int part = thread; part < parts; part += team) {
      Arena own(m.scratch + part * one.used());
      const int q_part = m.split.keys == 1 ? part : 0, k_part = m.split.keys == 1 ? 0 : part;
      forward_part(p, m.shared, part_begin<E>(p.n, q_part, m.split.queries),
                   part_begin<E>(p.n, q_part + 1, m.split.queries), part_begin<E>(p.m, k_part, m.split.keys),
                   part_begin<E>(p.m, k_part + 1, m.split.keys), m.own(p, own), m.sums(p, k_part));
    }
    barrier(team);
    own_part(p.n, thread, team, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++) finish_row(p, f, m, i);
    });
  });
}

}  // namespace hsv::HSV_ISA::rectangle
