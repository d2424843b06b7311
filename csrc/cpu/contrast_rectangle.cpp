#include "cpu/contrast_rectangle.h"

#include <math.h>

#include "cpu/contrast_block.h"
#include "cpu/memory.h"
#include "cpu/parallel.h"

namespace hsv::HSV_ISA {
namespace {

constexpr double kLn2 = 0.69314718055994530942;
constexpr int64_t kQueries = 192, kKeys = 192;  // most of a tile: multiples of every panel

// A similarity that is left out of a sum, and the maximum of none: 2^(kLeftOut − kNone) is 0.
template <class T>
constexpr T kLeftOut = sizeof(T) == 4 ? static_cast<T>(-__FLT_MAX__) : static_cast<T>(-__DBL_MAX__);
template <class T>
constexpr T kNone = kLeftOut<T> / 2;

template <class T>
using Id = std::remove_reference_t<decltype(typename VectorTypes<T>::Bits{}[0])>;

// Hands out 64-byte aligned pieces of the workspace; over null it only counts.
class Arena {
 public:
  explicit Arena(void* base) : base_(static_cast<char*>(base)) {}

  template <class T>
  T* take(int64_t n) {
    char* p = base_ ? base_ + used_ : nullptr;
    used_ += (n * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
    return reinterpret_cast<T*>(p);
  }
  int64_t used() const { return used_; }

 private:
  char* base_;
  int64_t used_ = 0;
};

// Queries [i, i + ni) against keys [j, j + nj).
struct Tile {
  int64_t i, ni, j, nj;
};

int64_t at_most(int64_t n, int64_t most) {
  return n < most ? n : most;
}

// Steps of at most `most` that part n rows evenly, in whole panels.
template <class E>
int64_t even_step(int64_t n, int64_t most) {
  const int64_t steps = (n + most - 1) / most;
  return padded<E>((n + steps - 1) / steps);
}

// ---- what both directions share ----

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

// ---- forward ----

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
template <class T>
bool in_range(double factor, T q_squares, T k_squares, int64_t m) {
  const double k = sqrt(static_cast<double>(k_squares)),
               bound = fabs(factor) * sqrt(static_cast<double>(q_squares)) * k;
  return bound + log2(static_cast<double>(m)) + fabs(log2(k)) < 64 / kLn2;
}

// A tile that leaves nothing out, under the shift 0: exponentials while the products are in registers.
template <class E>
void add_whole_tile(const RectangleProblem& p, const PackedRows<E>& q, const Tile& t, const Scratch<E>& own,
                    const Sums<Sum<E>>& out) {
  using T = Sum<E>;
  constexpr int L = kLanes<T>;
  const Base2<E> base2(p);
  memset(own.sums, 0, t.ni * L * sizeof(T));
  for_products(q, t.i, t.ni, own.keys, 0, t.nj, [&](int64_t i, int64_t j, auto& c) HSV_INLINE_LAMBDA {
    constexpr int R = sizeof c / sizeof c[0];
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
      store_weights(own.weights() + i * kKeys + j / kValues<E>, a, b);
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
  for (int64_t j = j_begin; j < j_end; j += kKeys) {
    const int64_t nj = at_most(kKeys, j_end - j);
    const T k_squares = pack_keys(p, j, j + nj, own.keys);
    if (fixed && !in_range(p.scale / kLn2, q_squares, k_squares, p.m)) {
      fixed = false;
      for (int64_t i = i_begin; i < i_end; i++) out.shift[i] = out.total[i] == 0 ? kNone<T> : 0;
    }
    for (int64_t i = i_begin; i < i_end; i += step) {
      const Tile t{i, at_most(step, i_end - i), j, nj};
      if (fixed && t.j + t.nj <= p.m && !leaves_out<E>(p, t)) {
        add_whole_tile(p, shared.q, t, own, out);
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

// ---- backward: the keys' gradient ----

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
    const T scale = static_cast<T>(p.scale);
    for (int64_t row = j; row < end; row++) {
      S* out = static_cast<S*>(b.k_grad) + row * p.dim;
      const T* besides = static_cast<const T*>(b.besides) + row * p.dim;
      for (int64_t column = 0; column < p.dim; column += P) {
        T* x = place(row, column);
        const int64_t width = at_most(P, p.dim - column);
        for (int64_t k = 0; k < width; k++) x[k] *= scale;
        for (int64_t k = 0; b.besides && k < width; k++) x[k] += besides[column + k];
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

// ---- the table ----

// f(E{}) with the elements that products take.
template <class F>
auto with_products(const RectangleProblem& p, const F& f) {
  if (p.dtype == DType::kFloat64) return f(double{});
  if constexpr (kHasPairs) {
    if (p.bfloat16) return f(Pair{});
  }
  return f(float{});
}

}  // namespace

RectangleKernels rectangle_kernels() {
  return {
      [](const RectangleProblem& p, const RectangleForward& f) {
        with_products(p, [&](auto element) { forward<decltype(element)>(p, f); });
      },
      [](const RectangleProblem& p, const RectangleBackward& b) {
        with_products(p, [&](auto element) { backward<decltype(element)>(p, b); });
      },
      [](const RectangleProblem& p, bool mean_key, bool backward) {
        return with_products(p, [&](auto element) {
          using E = decltype(element);
          Arena arena(nullptr);
          if (backward) {
            BackwardMemory<E>(p, arena);
          } else {
            ForwardMemory<E>(p, mean_key, arena);
          }
          return arena.used();
        });
      },
  };
}

}  // namespace hsv::HSV_ISA
