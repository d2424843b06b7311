#include "cpu/contrast.h"

#include <math.h>

#include "cpu/arena.h"
#include "cpu/contrast_gradient.h"
#include "cpu/contrast_logsumexp.h"
#include "cpu/contrast_pack.h"

namespace hsv::HSV_ISA {
namespace {

// Whether rows of so great a square allow the fixed shift: no sum of exponentials, nor a weight made of one, leaves
// float's range.
bool bounds_shift(const ContrastProblem& p, double square) {
  return p.scale * square + log(static_cast<double>(p.rows * p.views)) < 64;
}

// Threads that the work can keep busy: each should have some 20 µs of products and two panels of rows.
template <class E>
ContrastProblem with_useful_threads(ContrastProblem p) {
  const int64_t rows = padded<E>(p.rows * p.views), panels = rows / kPanel<E>;
  const int64_t most = 1 + rows * rows / 2 * p.dim / (1 << 20);
  const int64_t limit = most < panels / 2 ? most : panels / 2;
  if (p.threads > limit) p.threads = static_cast<int>(limit);
  if (p.threads < 1) p.threads = 1;
  return p;
}

double softplus(double x) {
  return (x > 0 ? x : 0) + log1p(exp(x > 0 ? -x : x));
}
double sigmoid(double x) {
  return x > 0 ? 1 / (1 + exp(-x)) : exp(x) / (1 + exp(x));
}

// ---- rows ----

// The rows in both forms, with their norms.
template <class E>
struct RowMemory {
  SquareRows<E> z;
  double* factor;  // [row] 1 / max(‖x‖, 1e-12) with two views, NaN for NaN; 1 with one
  bool* bounded;   // [panel] that similarities of its rows among each other allow the fixed shift

  RowMemory(const ContrastProblem& p, bool slabs, Arena& arena) {
    const int64_t rows = padded<E>(p.rows * p.views), columns = padded<E>(p.dim), depth = depth_of<E>(p.dim);
    E* panels = arena.take<E>(rows * depth);
    E* slab = slabs ? arena.take<E>(rows * columns / kValues<E>) : nullptr;
    // Rows that were normalised are rounded anyway and can take a share of the scale with them, which saves two
    // products of each similarity; not those rounded to bfloat16, and not under scales so great that the rounding would
    // count. These take a power of two near it.
    const bool shared = p.views == 2 && p.shift != Shift::kOnline && bounds_shift(p, 1) && kValues<E> == 1;
    const double scale = p.scale / kLn2;
    const double root = shared ? sqrt(scale) : ::exp2(floor(log2(scale) / 2));  // a power of two rounds nothing
    const double besides = shared ? 1 : scale / root / root;
    const Sum<E> head = static_cast<Sum<E>>(besides);
    z = {{panels, slab, rows, depth}, columns, root, head, static_cast<Sum<E>>(besides - head)};
    factor = arena.take<double>(rows);
    bounded = arena.take<bool>(rows / kPanel<E>);
  }
};

// Cosine of row i < p.rows and its positive.
template <class E>
double positive_cosine(const ContrastProblem& p, const RowMemory<E>& m, int64_t i) {
  return dot_rows<Sum<E>>(p, i, i + p.rows) * m.factor[i] * m.factor[i + p.rows];
}

// Packs this thread's panels.
template <class E>
void pack(const ContrastProblem& p, const RowMemory<E>& m, int thread, int team) {
  const int64_t P = kPanel<E>, rows = p.rows * p.views;
  own_part(m.z.rows / P, thread, team, [&](int64_t begin, int64_t end) {
    for (int64_t first = begin * P; first < end * P; first += P) {
      bool bounded = true;
      for (int64_t i = first; i < first + P && i < rows; i++) {
        const double square = dot_rows<Sum<E>>(p, i, i), norm = sqrt(square);
        m.factor[i] = p.views == 1 ? 1 : 1 / (norm < 1e-12 ? 1e-12 : norm);
        bounded &= bounds_shift(p, p.views == 1 ? square : 1);
      }
      m.bounded[first / P] = bounded;
      pack_panel(p, first, m.factor + first, m.z);
    }
  });
}

// Whether exponentials are summed as they are; of packed rows.
template <class E>
bool has_fixed_shift(const ContrastProblem& p, const RowMemory<E>& m) {
  bool bounded = p.shift != Shift::kOnline;
  for (int64_t panel = 0; p.shift == Shift::kChosen && panel < m.z.rows / kPanel<E>; panel++)
    bounded &= m.bounded[panel];
  return bounded;
}

// ---- forward ----

template <class E>
struct ForwardMemory : RowMemory<E> {
  Logsumexp<Sum<E>> sums;
  TileSums<Sum<E>>* scratch;

  ForwardMemory(const ContrastProblem& p, Arena& arena) : RowMemory<E>(p, false, arena) {
    sums = {arena.take<Sum<E>>(this->z.rows), arena.take<Sum<E>>(this->z.rows)};
    scratch = arena.take<TileSums<Sum<E>>>(p.threads);
  }
};

// lse, d and the loss of row i, and its sum for backward. A row without candidates has an empty sum, and lse = −∞.
template <class T>
void finish_row(const ContrastProblem& p, const Logsumexp<T>& sums, int64_t i, double cosine,
                const ContrastForward& out) {
  const T shift = sums.shift ? sums.shift[i] : 0, total = sums.total[i];
  const double lse = total == 0 ? -HUGE_VAL : (log2(static_cast<double>(total)) + shift) * kLn2;
  if (out.lse) static_cast<T*>(out.lse)[i] = static_cast<T>(lse);
  if (out.sums) {
    static_cast<T*>(out.sums)[i] = shift;
    static_cast<T*>(out.sums)[p.rows * p.views + i] = total;
  }
  if (p.views == 1) return;

  const double d = lse - p.scale * cosine;
  static_cast<T*>(out.d)[i] = static_cast<T>(d);
  static_cast<T*>(out.losses)[i] = static_cast<T>(softplus(d));
}

template <class E>
void finish_rows(const ContrastProblem& p, const ForwardMemory<E>& m, const Logsumexp<Sum<E>>& sums, int thread,
                 int team, const ContrastForward& out) {
  own_part(p.rows, thread, team, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) {
      const double cosine = p.views == 2 ? positive_cosine(p, m, i) : 0;
      for (int64_t row = i; row < p.rows * p.views; row += p.rows) finish_row(p, sums, row, cosine, out);
    }
  });
}

template <class E>
void forward(const ContrastProblem& given, const ContrastForward& out) {
  using T = Sum<E>;
  const ContrastProblem p = with_useful_threads<E>(given);
  Arena arena(p.workspace);
  const ForwardMemory<E> m(p, arena);
  parallel(p.threads, [&](int thread, int team) {
    pack(p, m, thread, team);
    own_part(m.z.rows, thread, team, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++) m.sums.shift[i] = kNone<T>, m.sums.total[i] = 0;
    });
    barrier(team);
    const bool fixed = has_fixed_shift(p, m);
    const Logsumexp<T> sums = {fixed ? nullptr : m.sums.shift, m.sums.total};
    T* kept = static_cast<T*>(out.exponentials);
    visit_tiles<E, kSumTile>(m.z.rows, thread, team, [&](const Tile& tile) {
      if (fixed) {
        add_exponentials(p, m.z, tile, m.scratch[thread], kept, sums);
      } else {
        merge_exponentials(p, m.z, tile, m.scratch[thread], sums);
      }
    });
    barrier(team);
    finish_rows(p, m, sums, thread, team, out);
  });
}

// ---- backward ----

template <class E>
struct BackwardMemory : RowMemory<E> {
  using T = Sum<E>;
  struct alignas(64) Scratch {
    WeightTile<E> weights;
    double scale_grad;
  };
  T* grad;  // [slab][row][kPanel], Σ_j W_ij z_j
  T* pull;  // [row] what the row's negatives weigh together, g σ(d), or g without positives
  T *weight, *offset;
  Scratch* scratch;

  BackwardMemory(const ContrastProblem& p, Arena& arena) : RowMemory<E>(p, true, arena) {
    const int64_t rows = this->z.rows;
    grad = arena.take<T>(rows * this->z.columns);
    pull = arena.take<T>(rows);
    weight = arena.take<T>(rows);
    offset = arena.take<T>(rows);
    scratch = arena.take<Scratch>(p.threads);
  }
};

// A power of two near the greatest incoming gradient: weights are computed in units of it, so that those of the fixed
// shift, exp(−64) and less, neither vanish nor overflow whatever a loss is scaled by.
template <class T>
double gradient_unit(const ContrastProblem& p, const T* grad) {
  T most = 0;
  for (int64_t i = 0; i < p.rows * p.views; i++) {
    const T size = grad[i] < 0 ? -grad[i] : grad[i];
    if (size > most) most = size;
  }
  return most > 0 && most < static_cast<T>(HUGE_VAL) ? ::exp2(floor(log2(static_cast<double>(most)))) : 1;
}

// The weights of row i, from its incoming gradient and what forward saved; zero for padding and without candidates.
// The shift is the forward's own and the total is divided by, so that the shares of a row add up to 1 however great its
// similarities are.
template <class E>
void weigh_row(const ContrastProblem& p, const ContrastBackward& b, const BackwardMemory<E>& m, double unit,
               int64_t i) {
  using T = Sum<E>;
  const int64_t rows = p.rows * p.views;
  const T *sums = static_cast<const T*>(b.sums), total = i < rows ? sums[rows + i] : 0;
  double pull = i < rows ? static_cast<const T*>(b.grad)[i] / unit : 0;
  if (p.views == 2 && i < rows) pull *= sigmoid(static_cast<const T*>(b.d)[i]);
  m.pull[i] = static_cast<T>(pull);
  m.weight[i] = total == 0 ? 0 : static_cast<T>(pull / total);
  m.offset[i] = total == 0 ? 0 : sums[i];
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

// Finishes the gradient of row i: the positive's share, the scale, and the Jacobian of the normalisation,
// dx = (dz − z ⟨z, dz⟩) / ‖x‖, or dz / 1e-12 where the norm was below that. Returns ⟨z, Σ_j W_ij z_j − share z_pos⟩,
// in units of the incoming gradients' `unit` as the weights are.
template <class E>
double write_row_grad(const ContrastProblem& p, const ContrastBackward& b, const BackwardMemory<E>& m, double unit,
                      int64_t i) {
  using T = Sum<E>;
  constexpr int P = kPanel<E>;
  const int view = i >= p.rows;
  const int64_t positive = view ? i - p.rows : i + p.rows, row = i - view * p.rows;
  const T share = p.views == 2 ? m.pull[i] + m.pull[positive] : 0;
  const T own_factor = static_cast<T>(m.factor[i]),
          factor = p.views == 2 ? static_cast<T>(m.factor[positive]) * share : 0;
  const bool project = p.views == 2 && !(m.factor[i] >= 1e12);
  const auto width = [&](int64_t k) { return p.dim - k < P ? p.dim - k : P; };

  T buffers[2][P];
  Vector<T> along = {};
  for (int64_t k = 0; k < p.dim; k += P) {
    T* grad = m.grad + k * m.z.rows + i * P;
    const T* x = row_values(p, i, k, width(k), buffers[0]);
    const T* other = p.views == 2 ? row_values(p, positive, k, width(k), buffers[1]) : x;
    for (int h = 0; h < P; h += kLanes<T>) {
      const Vector<T> dz = load(grad + h) - factor * load(other + h);
      along += dz * (own_factor * load(x + h));
      store(grad + h, dz);
    }
  }
  if (b.view_grad[view]) {
    const T projection = project ? sum(along) * own_factor : 0, outer = static_cast<T>(unit * p.scale * m.factor[i]);
    for (int64_t k = 0; k < p.dim; k += P) {
      T* grad = m.grad + k * m.z.rows + i * P;
      const T* x = row_values(p, i, k, width(k), buffers[0]);
      for (int h = 0; h < P; h += kLanes<T>) store(grad + h, outer * (load(grad + h) - projection * load(x + h)));
      write_elements(p.dtype, grad, width(k), b.view_grad[view], row * p.dim + k);
    }
  }
  return sum(along);
}

template <class E>
void backward(const ContrastProblem& given, const ContrastBackward& b) {
  using T = Sum<E>;
  const ContrastProblem p = with_useful_threads<E>(given);
  Arena arena(p.workspace);
  const BackwardMemory<E> m(p, arena);
  parallel(p.threads, [&](int thread, int team) {
    pack(p, m, thread, team);
    barrier(team);
    const bool fixed = has_fixed_shift(p, m);
    const double unit = gradient_unit(p, static_cast<const T*>(b.grad));
    own_part(m.z.rows, thread, team, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++) weigh_row(p, b, m, unit, i);
      for (int64_t k = 0; k < m.z.columns; k += kPanel<E>) {
        memset(m.grad + k * m.z.rows + begin * kPanel<E>, 0, (end - begin) * kPanel<E> * sizeof(T));
      }
    });
    barrier(team);
    const RowWeights<T> rows = {m.weight, fixed ? nullptr : m.offset};
    visit_tiles<E, kWeightTile>(m.z.rows, thread, team, [&](const Tile& tile) {
      WeightTile<E>& weights = m.scratch[thread].weights;
      weigh_tile(p, m.z, tile, rows, static_cast<const T*>(b.exponentials), weights);
      add_gradients(m.z, tile, weights, m.grad);
    });
    barrier(team);

    double scale_grad = 0;
    own_part(p.rows * p.views, thread, team, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++) scale_grad += write_row_grad(p, b, m, unit, i);
    });
    m.scratch[thread].scale_grad = scale_grad;
    barrier(team);
    if (thread || !b.scale_grad) return;
    // Each pair counts in both of its rows.
    *b.scale_grad = 0;
    for (int other = 0; other < team; other++) *b.scale_grad += m.scratch[other].scale_grad * unit / 2;
  });
}

}  // namespace

ContrastKernels contrast_kernels() {
  return {
      [](const ContrastProblem& p, const ContrastForward& f) {
        with_elements(p.dtype, p.bfloat16, [&](auto element) { forward<decltype(element)>(p, f); });
      },
      [](const ContrastProblem& p, const ContrastBackward& b) {
        with_elements(p.dtype, p.bfloat16, [&](auto element) { backward<decltype(element)>(p, b); });
      },
      [](const ContrastProblem& p, bool backward) {
        return with_elements(p.dtype, p.bfloat16, [&](auto element) {
          using E = decltype(element);
          const ContrastProblem used = with_useful_threads<E>(p);
          Arena arena(nullptr);
          backward ? void(BackwardMemory<E>(used, arena)) : void(ForwardMemory<E>(used, arena));
          return arena.used();
        });
      },
  };
}

}  // namespace hsv::HSV_ISA
