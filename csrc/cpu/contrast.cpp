#include "cpu/contrast.h"

#include <math.h>

#include "cpu/contrast_logsumexp.h"
#include "cpu/contrast_pack.h"
#include "cpu/contrast_tiles.h"

namespace hsv::HSV_ISA {
namespace {

constexpr double kLn2 = 0.69314718055994530942;

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

// One thread's own memory, apart from the others' cache lines.
template <class T>
struct alignas(64) Scratch {
  T tile[kTile * kTile];
  TileSums<T> sums;
  double scale_grad;
};

template <class T>
Packed<T> take_packed(const ContrastProblem& p, bool slabs, Arena& arena) {
  const int64_t rows = padded<T>(p.rows * p.views), columns = padded<T>(p.dim);
  return {arena.take<T>(rows * p.dim), slabs ? arena.take<T>(rows * columns) : nullptr, rows, p.dim, columns};
}

// Scale of similarities in base 2. Zero becomes too small to matter, so that the scale's gradient can be divided by it.
double base2_scale(const ContrastProblem& p) {
  return p.scale == 0 ? 1e-20 : p.scale / kLn2;
}

// Columns in a row's sum.
int64_t candidates(const ContrastProblem& p) {
  return p.rows * p.views - (p.views == 2 ? 2 : p.exclude_self);
}

// Threads that the work can keep busy: each should have some 20 µs of products and two panels of rows.
template <class T>
ContrastProblem with_useful_threads(ContrastProblem p) {
  const int64_t rows = padded<T>(p.rows * p.views), panels = rows / kPanel<T>;
  const int64_t most = 1 + rows * rows / 2 * p.dim / (1 << 20);
  const int64_t limit = most < panels / 2 ? most : panels / 2;
  if (p.threads > limit) p.threads = static_cast<int>(limit < 1 ? 1 : limit);
  return p;
}

double softplus(double x) {
  return (x > 0 ? x : 0) + log1p(exp(x > 0 ? -x : x));
}
double sigmoid(double x) {
  return x > 0 ? 1 / (1 + exp(-x)) : exp(x) / (1 + exp(x));
}

// Cosine of row i < p.rows and its positive.
template <class T>
double positive_cosine(const ContrastProblem& p, int64_t i) {
  return dot_rows<T>(p, i, i + p.rows) * inverse_norm<T>(p, i) * inverse_norm<T>(p, i + p.rows);
}

// ---- forward ----

template <class T>
struct ForwardMemory {
  Packed<T> z;
  Logsumexp<T> sums;
  Scratch<T>* scratch;

  ForwardMemory(const ContrastProblem& p, Arena& arena) : z(take_packed<T>(p, false, arena)) {
    sums = {p.fixed_shift ? nullptr : arena.take<T>(z.rows), arena.take<T>(z.rows)};
    scratch = arena.take<Scratch<T>>(p.threads);
  }
};

// lse, d and the loss of row i.
template <class T>
void finish_row(const ContrastProblem& p, const ForwardMemory<T>& m, int64_t i, double cosine,
                const ContrastForward& out) {
  double lse = (log2(static_cast<double>(m.sums.total[i])) + (m.sums.shift ? m.sums.shift[i] : 0)) * kLn2;
  if (!candidates(p)) lse = -HUGE_VAL;
  static_cast<T*>(out.lse)[i] = static_cast<T>(lse);
  if (p.views == 1) return;

  const double d = lse - p.scale * cosine;
  static_cast<T*>(out.d)[i] = static_cast<T>(d);
  static_cast<T*>(out.losses)[i] = static_cast<T>(softplus(d));
}

template <class T>
void finish_rows(const ContrastProblem& p, const ForwardMemory<T>& m, const ContrastForward& out) {
  parallel_for(p.rows, p.threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) {
      const double cosine = p.views == 2 ? positive_cosine<T>(p, i) : 0;
      for (int view = 0; view < p.views; view++) finish_row(p, m, i + view * p.rows, cosine, out);
    }
  });
}

template <class T>
void forward(const ContrastProblem& given, const ContrastForward& out) {
  const ContrastProblem p = with_useful_threads<T>(given);
  Arena arena(p.workspace);
  const ForwardMemory<T> m(p, arena);
  const double scale = base2_scale(p);

  pack(p, static_cast<T*>(out.inv_norm), m.z);
  for (int64_t i = 0; i < m.z.rows; i++) {
    if (m.sums.shift) m.sums.shift[i] = kLeftOut<T>;
    m.sums.total[i] = 0;
  }
  visit_tiles<T>(m.z.rows, p.threads, [&](const Tile& tile, int thread) {
    Scratch<T>& own = m.scratch[thread];
    similarities(m.z, tile, scale, own.tile);
    leave_out(p, tile, own.tile);
    add_tile(tile, own.tile, own.sums, m.sums);
  });
  finish_rows(p, m, out);
}

// ---- backward ----

template <class T>
struct BackwardMemory {
  Packed<T> z;
  T* slabs_grad;   // [slab][row][kPanel], Σ_j W_ij z_j
  T* pull;         // [row] what the row's negatives weigh together, g σ(d), or g without positives
  T* weight;       // [row] factor of the row's exponentials: pull, times exp(−lse) under the fixed shift
  T* offset;       // [row] lse in base 2, taken off before the exponential; null under the fixed shift
  T* share_total;  // [row] what the shares exp(S_ij − lse_i) add up to; null with positives
  Scratch<T>* scratch;

  BackwardMemory(const ContrastProblem& p, const ContrastBackward& b, Arena& arena)
      : z(take_packed<T>(p, b.view_grad[0], arena)) {
    slabs_grad = b.view_grad[0] ? arena.take<T>(z.rows * z.columns) : nullptr;
    pull = arena.take<T>(z.rows);
    weight = arena.take<T>(z.rows);
    offset = p.fixed_shift ? nullptr : arena.take<T>(z.rows);
    share_total = p.views == 1 ? arena.take<T>(z.rows) : nullptr;
    scratch = arena.take<Scratch<T>>(p.threads);
  }
};

// The weights of row i, from its incoming gradient and what forward saved; zero for padding and without candidates.
template <class T>
void weigh_row(const ContrastProblem& p, const ContrastBackward& b, const BackwardMemory<T>& m, int64_t i) {
  const bool padding = i >= p.rows * p.views, some = !padding && candidates(p);
  double pull = padding ? 0 : static_cast<const T*>(b.grad)[i];
  if (p.views == 2 && !padding) pull *= sigmoid(static_cast<const T*>(b.d)[i]);
  const double lse = some ? static_cast<const T*>(b.lse)[i] : 0;
  m.pull[i] = static_cast<T>(pull);
  m.weight[i] = some ? static_cast<T>(m.offset ? pull : pull * exp(-lse)) : 0;
  if (m.offset) m.offset[i] = static_cast<T>(lse / kLn2);
}

// Makes the shares exp(S_ij − lse_i) of each row add up to 1. Rows that nothing normalised have similarities in the
// thousands, whose lse, saved in float, is off by more than their gradient may be.
template <class T>
void renormalise(const ContrastProblem& p, double scale, const BackwardMemory<T>& m) {
  memset(m.share_total, 0, m.z.rows * sizeof(T));
  visit_tiles<T>(m.z.rows, p.threads, [&](const Tile& tile, int thread) {
    Scratch<T>& own = m.scratch[thread];
    similarities(m.z, tile, scale, own.tile);
    leave_out(p, tile, own.tile);
    add_exponentials(tile, own.tile, m.offset, m.share_total, own.sums.total);
  });
  for (int64_t i = 0; i < p.rows; i++) m.weight[i] /= m.share_total[i];
}

// s_ij becomes W_ij = pull_i exp(S_ij − lse_i) + pull_j exp(S_ij − lse_j). Returns Σ W_ij s_ij if `moment`.
template <class T>
double weigh_tile(const BackwardMemory<T>& m, const Tile& t, bool moment, T* s) {
  double total = 0;
  for (int64_t i = 0; i < t.ni; i++) {
    const T weight = m.weight[t.i + i], offset = m.offset ? m.offset[t.i + i] : 0;
    Vector<T> row = {};
    for (int64_t j = 0; j < t.nj; j += kLanes<T>) {
      T* p = s + i * kTile + j;
      const Vector<T> x = load(p), weights = load(m.weight + t.j + j);
      const Vector<T> w = m.offset ? weight * exp2(x - offset) + weights * exp2(x - load(m.offset + t.j + j))
                                   : exp2(x) * (weight + weights);
      if (moment) row += w * x;
      store(p, w);
    }
    total += sum(row);
  }
  return total;
}

// Adds W z to the gradients of the tile's rows and, off the diagonal, Wᵀ z to those of its columns.
template <class T>
void add_gradients(const BackwardMemory<T>& m, const Tile& t, const T* w) {
  constexpr int P = kPanel<T>;
  for (int64_t column = 0; column < m.z.columns; column += P) {
    const T* z = m.z.slabs + column * m.z.rows;
    T* grad = m.slabs_grad + column * m.z.rows;
    add_product(w, kTile, 1, t.ni, t.nj, z + t.j * P, grad + t.i * P);
    if (!t.diagonal()) add_product(w, 1, kTile, t.nj, t.ni, z + t.i * P, grad + t.j * P);
  }
}

// Σ_i g_i σ(d_i) cos(i, pos(i)): what the positives take off the scale's gradient.
template <class T>
double positive_moment(const ContrastProblem& p, const BackwardMemory<T>& m) {
  double total = 0;
  for (int64_t i = 0; p.views == 2 && i < p.rows; i++) {
    total += (static_cast<double>(m.pull[i]) + m.pull[i + p.rows]) * positive_cosine<T>(p, i);
  }
  return total;
}

template <class T>
void write_elements(DType dtype, const T* x, int64_t n, void* out, int64_t begin) {
  const auto write = [&](auto* p) {
    for (int64_t k = 0; k < n; k++) narrow(x[k], p + begin + k);
  };
  if constexpr (sizeof(T) == 8) {
    write(static_cast<double*>(out));
  } else if (dtype == DType::kBFloat16) {
    write(static_cast<BFloat16*>(out));
  } else if (dtype == DType::kFloat16) {
    write(static_cast<Float16*>(out));
  } else {
    write(static_cast<float*>(out));
  }
}

// The gradient of row i: the positive's share, the scale, and the Jacobian of the normalisation,
// dx = (dz − z ⟨z, dz⟩) / ‖x‖, or dz / 1e-12 where the norm was below that.
template <class T>
void write_row_grad(const ContrastProblem& p, const ContrastBackward& b, const BackwardMemory<T>& m, int64_t i) {
  constexpr int P = kPanel<T>;
  const int view = i >= p.rows;
  const int64_t positive = view ? i - p.rows : i + p.rows;
  const T share = p.views == 2 ? m.pull[i] + m.pull[positive] : 0;
  const T inv_norm = p.views == 2 ? static_cast<const T*>(b.inv_norm)[i] : 1;
  const bool project = p.views == 2 && !(inv_norm >= static_cast<T>(1e12));

  Vector<T> along = {};
  for (int64_t k = 0; k < m.z.columns; k += P) {
    const T* z = m.z.slabs + k * m.z.rows;
    T* grad = m.slabs_grad + k * m.z.rows + i * P;
    for (int h = 0; h < P; h += kLanes<T>) {
      if (p.views == 2) store(grad + h, load(grad + h) - share * load(z + positive * P + h));
      along += load(grad + h) * load(z + i * P + h);
    }
  }
  const T projection = project ? sum(along) : 0, factor = static_cast<T>(p.scale * inv_norm);
  for (int64_t k = 0; k < p.dim; k += P) {
    const T* z = m.z.slabs + k * m.z.rows + i * P;
    T* grad = m.slabs_grad + k * m.z.rows + i * P;
    for (int h = 0; h < P; h++) grad[h] = factor * (project ? grad[h] - projection * z[h] : grad[h]);
    write_elements(p.dtype, grad, p.dim - k < P ? p.dim - k : P, b.view_grad[view], (i - view * p.rows) * p.dim + k);
  }
}

template <class T>
void backward(const ContrastProblem& given, const ContrastBackward& b) {
  const ContrastProblem p = with_useful_threads<T>(given);
  Arena arena(p.workspace);
  const BackwardMemory<T> m(p, b, arena);
  const double scale = base2_scale(p);

  pack<T>(p, nullptr, m.z);
  parallel_for(m.z.rows, p.threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) weigh_row(p, b, m, i);
    for (int64_t k = 0; m.slabs_grad && k < m.z.columns; k += kPanel<T>) {
      memset(m.slabs_grad + k * m.z.rows + begin * kPanel<T>, 0, (end - begin) * kPanel<T> * sizeof(T));
    }
  });
  if (m.share_total && candidates(p)) renormalise(p, scale, m);
  for (int thread = 0; thread < p.threads; thread++) m.scratch[thread].scale_grad = 0;

  visit_tiles<T>(m.z.rows, p.threads, [&](const Tile& tile, int thread) {
    Scratch<T>& own = m.scratch[thread];
    similarities(m.z, tile, scale, own.tile);
    leave_out(p, tile, own.tile);
    own.scale_grad += weigh_tile(m, tile, b.scale_grad, own.tile) * (tile.diagonal() ? 0.5 : 1);
    if (m.slabs_grad) add_gradients(m, tile, own.tile);
  });

  if (b.scale_grad) {
    double total = 0;
    for (int thread = 0; thread < p.threads; thread++) total += m.scratch[thread].scale_grad;
    *b.scale_grad = total / scale - positive_moment(p, m);
  }
  if (!m.slabs_grad) return;
  parallel_for(p.rows * p.views, p.threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) write_row_grad(p, b, m, i);
  });
}

// ---- the table ----

template <class T>
int64_t workspace(const ContrastProblem& given, const ContrastBackward* b) {
  const ContrastProblem p = with_useful_threads<T>(given);
  Arena arena(nullptr);
  if (b) {
    BackwardMemory<T>(p, *b, arena);
  } else {
    ForwardMemory<T>(p, arena);
  }
  return arena.used();
}

}  // namespace

ContrastKernels contrast_kernels() {
  return {
      [](const ContrastProblem& p, const ContrastForward& f) {
        p.dtype == DType::kFloat64 ? forward<double>(p, f) : forward<float>(p, f);
      },
      [](const ContrastProblem& p, const ContrastBackward& b) {
        p.dtype == DType::kFloat64 ? backward<double>(p, b) : backward<float>(p, b);
      },
      [](const ContrastProblem& p, const ContrastBackward* b) {
        return p.dtype == DType::kFloat64 ? workspace<double>(p, b) : workspace<float>(p, b);
      },
  };
}

}  // namespace hsv::HSV_ISA
