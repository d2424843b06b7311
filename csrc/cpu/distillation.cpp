#include "cpu/distillation.h"

#include <float.h>
#include <math.h>
#include <stdlib.h>

#include "cpu/element_vectors.h"
#include "cpu/memory.h"
#include "cpu/parallel.h"

namespace hsv::HSV_ISA {
namespace {

constexpr double kLog2E = 1.4426950408889634;
constexpr int64_t kBlock = 512;         // classes at a time, of every view: they stay in the first cache
constexpr int64_t kAhead = 2 * kBlock;  // so much earlier are they asked for
constexpr int64_t kGroups = 16;  // of rows, each with column sums of its own, so that threads do not decide the order
constexpr int kChains = 4;       // sums in flight: one alone waits for each addition to end

template <class T>
constexpr int64_t kStep = kChains * kLanes<T>;
template <class T>
constexpr T kLowest = -FLT_MAX;
template <>
constexpr double kLowest<double> = -DBL_MAX;

// out = value over [0, n), then −inf up to whole steps; returns the greatest (kLowest at least), which no NaN is.
template <class T, class F>
HSV_INLINE T fill(T* out, int64_t n, const F& value) {
  Vector<T> greatest[2] = {splat(kLowest<T>), splat(kLowest<T>)};
  int64_t k = 0;
  for (; k + kStep<T> <= n; k += kStep<T>) {
    HSV_UNROLL
    for (int c = 0; c < kChains; c++) {
      const Vector<T> x = value(VectorAt{k + c * kLanes<T>});
      store(out + k + c * kLanes<T>, x);
      greatest[c % 2] = max(x, greatest[c % 2]);
    }
  }
  if (k < n) {
    for (int64_t i = k; i < k + kStep<T>; i++) out[i] = i < n ? value(ElementAt{i}) : static_cast<T>(-INFINITY);
    for (int c = 0; c < kChains; c++) greatest[0] = max(load(out + k + c * kLanes<T>), greatest[0]);
  }
  return max_lane(max(greatest[0], greatest[1]));
}

// Σ term(k) over whole steps that cover [0, n); term takes and gives vectors.
template <class T, class F>
HSV_INLINE T sum_steps(int64_t n, const F& term) {
  Vector<T> totals[kChains] = {};
  for (int64_t k = 0; k < n; k += kStep<T>) {
    HSV_UNROLL
    for (int c = 0; c < kChains; c++) totals[c] += term(k + c * kLanes<T>);
  }
  return sum((totals[0] + totals[1]) + (totals[2] + totals[3]));
}

// x = 2^(x − greatest) in place; returns their sum.
template <class T>
T exponentials(T* x, T greatest, int64_t n) {
  return sum_steps<T>(n, [=](int64_t k) HSV_INLINE_LAMBDA {
    const Vector<T> e = exp2(load(x + k) - greatest);
    store(x + k, e);
    return e;
  });
}
template <class T>
T sum_of_exponentials(const T* x, T greatest, int64_t n) {
  return sum_steps<T>(n, [=](int64_t k) HSV_INLINE_LAMBDA { return exp2(load(x + k) - greatest); });
}

// Σ e · (x − greatest), where 0 · −inf is 0.
template <class T>
T product(const T* e, const T* x, T greatest, int64_t n) {
  return sum_steps<T>(n, [=](int64_t k) HSV_INLINE_LAMBDA {
    const Vector<T> weight = load(e + k);
    return weight != 0 ? weight * (load(x + k) - greatest) : Vector<T>{};
  });
}

// A sum of exponentials relative to the greatest value so far.
template <class T>
struct Running {
  T greatest = kLowest<T>;
  double total = 0;

  // Takes in the greatest value of a block; returns the factor for what was summed before.
  double raise(T value) {
    if (!(value > greatest)) return 1;
    const double factor = ::exp2(static_cast<double>(greatest) - static_cast<double>(value));
    greatest = value;
    total *= factor;
    return factor;
  }
};

// One row of each view.
template <class E>
const E* row_of(const LogitViews& views, int64_t view, int64_t n) {
  return static_cast<const E*>(views.view[view].data) + n * views.view[view].stride;
}

// Brings what is kAhead classes further on into the second cache level: a block is too short for the hardware to
// foresee the next one of its row.
template <class E>
HSV_INLINE void prefetch(const E* row, int64_t n) {
  const int64_t line = 64 / static_cast<int64_t>(sizeof(E));
  for (int64_t k = 0; k < n; k += line) __builtin_prefetch(row + kAhead + k, 0, 2);
}

// out = (row − centre) · scale over a block; returns the greatest.
template <class T, class E>
T scaled_block(const E* row, const T* centre, T scale, int64_t n, T* out) {
  prefetch(row, n);
  if (centre == nullptr) return fill(out, n, [=](auto at) HSV_INLINE_LAMBDA { return at(row) * scale; });
  return fill(out, n, [=](auto at) HSV_INLINE_LAMBDA { return (at(row) - at(centre)) * scale; });
}

template <class T, class E>
void add_block(const E* row, int64_t n, T* sums) {
  int64_t k = 0;
  for (; k + kLanes<T> <= n; k += kLanes<T>) store(sums + k, load(sums + k) + load(row + k));
  for (; k < n; k++) sums[k] += widen(row[k]);
}

// Runs f(column sums [K], begin, end) for every group of rows, and then finish(k, total) for every column.
template <class T, class F, class G>
void sum_columns(int64_t rows, int64_t K, int threads, const F& f, const G& finish) {
  const int64_t most = threads > kGroups ? threads : kGroups, groups = rows < most ? rows : most;
  T* const sums = static_cast<T*>(calloc(static_cast<size_t>(groups * K + 1), sizeof(T)));
  parallel(threads, [&](int thread, int team) {
    own_part(groups, thread, team, [&](int64_t first, int64_t last) {
      for (int64_t g = first; g < last; g++) f(sums + g * K, rows * g / groups, rows * (g + 1) / groups);
    });
    barrier(team);
    own_part(K, thread, team, [&](int64_t begin, int64_t end) {
      for (int64_t k = begin; k < end; k++) {
        T total = 0;
        for (int64_t g = 0; g < groups; g++) total += sums[g * K + k];
        finish(k, total);
      }
    });
  });
  free(sums);
}

// What a thread keeps of one row of every view.
template <class T>
struct Scratch {
  T *x, *target, *teacher;  // a block of a student's logits, of a sum of teachers, and of each teacher's exponentials
  T* block_total;           // Σ of each teacher's exponentials of the block
  Running<T>*student_sum, *teacher_sum;
  double* product;  // of each pair, Σ_k e_k x_k

  explicit Scratch(const DistillationProblem& p) {
    const size_t S = p.student.count, teachers = p.teacher.count;
    x = allocate<T>((2 + teachers) * kBlock + teachers);
    target = x + kBlock;
    teacher = target + kBlock;
    block_total = teacher + teachers * kBlock;
    student_sum = allocate<Running<T>>(S + teachers);
    teacher_sum = student_sum + S;
    product = allocate<double>(p.pairs);
  }
  Scratch(const Scratch&) = delete;
  ~Scratch() {
    free(x);
    free(student_sum);
    free(product);
  }

 private:
  template <class V>
  static V* allocate(size_t count) {
    return static_cast<V*>(malloc(count * sizeof(V)));
  }
};

template <class T, class E>
struct Forward {
  const DistillationProblem& p;
  const T *const centre, student_scale, teacher_scale;
  Scratch<T> own;

  explicit Forward(const DistillationProblem& problem)
      : p(problem),
        centre(static_cast<const T*>(p.centre)),
        student_scale(static_cast<T>(p.student_scale * kLog2E)),
        teacher_scale(static_cast<T>(p.teacher_scale * kLog2E)),
        own(p) {}

  // Loss of row i; adds the teachers' logits to `columns` [K].
  T row(int64_t i, T* columns) {
    for (int64_t v = 0; v < p.student.count + p.teacher.count; v++) own.student_sum[v] = {};
    for (int64_t j = 0; j < p.pairs; j++) own.product[j] = 0;
    for (int64_t k = 0; k < p.student.classes; k += kBlock) {
      const int64_t left = p.student.classes - k, n = left < kBlock ? left : kBlock;
      for (int64_t t = 0; t < p.teacher.count; t++) teacher_block(t, row_of<E>(p.teacher, t, i) + k, k, n, columns);
      for (int64_t s = 0; s < p.student.count; s++) student_block(s, row_of<E>(p.student, s, i) + k, n);
    }
    double loss = 0;
    for (int64_t j = 0; j < p.pairs; j++) {
      const Running<T>& student = own.student_sum[p.pair[j].student];
      loss += student.greatest + ::log2(student.total) - own.product[j] / own.teacher_sum[p.pair[j].teacher].total;
    }
    return static_cast<T>(loss * kLn2 / static_cast<double>(p.pairs));
  }

 private:
  void teacher_block(int64_t t, const E* row, int64_t k, int64_t n, T* columns) {
    T* const e = own.teacher + t * kBlock;
    const T greatest = scaled_block(row, centre ? centre + k : nullptr, teacher_scale, n, e);
    add_block(row, n, columns + k);
    const double factor = own.teacher_sum[t].raise(greatest);
    for (int64_t j = 0; j < p.pairs && factor != 1; j++)
      if (p.pair[j].teacher == t) own.product[j] = factor == 0 ? 0 : own.product[j] * factor;
    own.block_total[t] = exponentials(e, own.teacher_sum[t].greatest, n);
    own.teacher_sum[t].total += own.block_total[t];
  }

  void student_block(int64_t s, const E* row, int64_t n) {
    Running<T>& sum = own.student_sum[s];
    sum.raise(scaled_block<T>(row, nullptr, student_scale, n, own.x));
    sum.total += sum_of_exponentials(own.x, sum.greatest, n);
    for (int64_t j = 0; j < p.pairs; j++) {
      if (p.pair[j].student != s) continue;
      const int64_t t = p.pair[j].teacher;
      own.product[j] += product(own.teacher + t * kBlock, own.x, sum.greatest, n) +
                        static_cast<double>(sum.greatest) * own.block_total[t];
    }
  }
};

template <class T>
void store_sums(const Running<T>* sums, int64_t views, int64_t rows, int64_t i, void* out) {
  T* const greatest = static_cast<T*>(out);
  for (int64_t v = 0; v < views; v++) {
    greatest[v * rows + i] = sums[v].greatest;
    greatest[(views + v) * rows + i] = static_cast<T>(sums[v].total);
  }
}

template <class E>
void forward_typed(const DistillationProblem& p, void* losses, void* mean, const DistillationSums& sums) {
  using T = Computed<E>;
  const int64_t N = p.student.rows, K = p.student.classes, S = p.student.count, teachers = p.teacher.count;
  sum_columns<T>(
      N, K, useful_threads(N * K * (S + teachers), kValuesPerThread, p.threads),
      [&](T* columns, int64_t begin, int64_t end) {
        Forward<T, E> forward(p);
        for (int64_t i = begin; i < end; i++) {
          static_cast<T*>(losses)[i] = forward.row(i, columns);
          store_sums(forward.own.student_sum, S, N, i, sums.student);
          store_sums(forward.own.teacher_sum, teachers, N, i, sums.teacher);
        }
      },
      [=](int64_t k, T total) { static_cast<T*>(mean)[k] = total / static_cast<T>(N * teachers); });
}

template <class T, class E>
struct Backward {
  const DistillationProblem& p;
  const DistillationSums& sums;
  void* const* gradients;
  const T *const centre, student_scale, teacher_scale;
  Scratch<T> own;
  int64_t *const count, *const alike;  // of each student: how many teachers, and the first student that has the same
  int64_t summed = -1;                 // the student whose target there is

  Backward(const DistillationProblem& problem, const DistillationSums& sums, void* const* gradients)
      : p(problem),
        sums(sums),
        gradients(gradients),
        centre(static_cast<const T*>(p.centre)),
        student_scale(static_cast<T>(p.student_scale * kLog2E)),
        teacher_scale(static_cast<T>(p.teacher_scale * kLog2E)),
        own(p),
        count(static_cast<int64_t*>(malloc(2 * p.student.count * sizeof(int64_t)))),
        alike(count + p.student.count) {
    for (int64_t s = 0; s < p.student.count; s++) find_teachers(s);
  }
  ~Backward() { free(count); }

  void row(int64_t i, T weight) {
    for (int64_t k = 0; k < p.student.classes; k += kBlock) {
      const int64_t left = p.student.classes - k, n = left < kBlock ? left : kBlock;
      summed = -1;
      for (int64_t t = 0; t < p.teacher.count; t++) teacher_block(t, i, k, n);
      for (int64_t s = 0; s < p.student.count; s++)
        if (gradients[s]) student_block(s, i, k, n, weight);
    }
  }

 private:
  void find_teachers(int64_t s) {
    count[s] = 0;
    for (int64_t j = 0; j < p.pairs; j++) count[s] += p.pair[j].student == s;
    alike[s] = 0;
    while (!same_teachers(alike[s], s)) alike[s]++;
  }

  // Whether the pairs name the same teachers, in the same order, for students a and b.
  bool same_teachers(int64_t a, int64_t b) const {
    if (count[a] != count[b]) return false;
    int64_t i = 0, j = 0;
    for (int64_t left = count[a]; left > 0; left--, i++, j++) {
      while (p.pair[i].student != a) i++;
      while (p.pair[j].student != b) j++;
      if (p.pair[i].teacher != p.pair[j].teacher) return false;
    }
    return true;
  }

  // own.teacher = q of classes [k, k + n).
  void teacher_block(int64_t t, int64_t i, int64_t k, int64_t n) {
    T* const q = own.teacher + t * kBlock;
    scaled_block(row_of<E>(p.teacher, t, i) + k, centre ? centre + k : nullptr, teacher_scale, n, q);
    const T greatest = greatest_of(sums.teacher, t, i), factor = 1 / total_of(sums.teacher, p.teacher.count, t, i);
    for (int64_t j = 0; j < n; j += kLanes<T>) store(q + j, factor * exp2(load(q + j) - greatest));
  }

  void student_block(int64_t s, int64_t i, int64_t k, int64_t n, T weight) {
    E* const out = static_cast<E*>(gradients[s]) + i * p.student.classes + k;
    if (count[s] == 0) {
      memset(static_cast<void*>(out), 0, n * sizeof(E));
      return;
    }
    sum_teachers(s, n);
    // scaled as in the forward: a product within a multiply-add would not be the one that `greatest` is taken of
    scaled_block<T>(row_of<E>(p.student, s, i) + k, nullptr, student_scale, n, own.x);
    const T greatest = greatest_of(sums.student, s, i);
    const T factor = static_cast<T>(count[s]) / total_of(sums.student, p.student.count, s, i);
    const auto gradient = [=, this](int64_t j) HSV_INLINE_LAMBDA {
      return weight * (factor * exp2(load(own.x + j) - greatest) - load(own.target + j));
    };
    int64_t j = 0;
    for (; j + kLanes<T> <= n; j += kLanes<T>) store(out + j, gradient(j));
    if (j == n) return;
    T rest[kLanes<T>];
    store(rest, gradient(j));
    for (int64_t l = j; l < n; l++) narrow(rest[l - j], out + l);
  }

  // own.target = Σ q over the teachers of student s, which may be there already.
  void sum_teachers(int64_t s, int64_t n) {
    if (summed >= 0 && alike[s] == alike[summed]) return;
    bool first = true;
    for (int64_t j = 0; j < p.pairs; j++) {
      if (p.pair[j].student != s) continue;
      const T* const q = own.teacher + p.pair[j].teacher * kBlock;
      for (int64_t k = 0; k < n; k += kLanes<T>)
        store(own.target + k, first ? load(q + k) : load(own.target + k) + load(q + k));
      first = false;
    }
    summed = s;
  }

  T greatest_of(const void* of_views, int64_t v, int64_t i) const {
    return static_cast<const T*>(of_views)[v * p.student.rows + i];
  }
  T total_of(const void* of_views, int64_t views, int64_t v, int64_t i) const {
    return static_cast<const T*>(of_views)[(views + v) * p.student.rows + i];
  }
};

template <class E>
void backward_typed(const DistillationProblem& p, const void* weights, const DistillationSums& sums,
                    void* const* gradients) {
  using T = Computed<E>;
  const int64_t N = p.student.rows, K = p.student.classes;
  for (int64_t s = 0; s < p.student.count; s++)
    if (gradients[s]) prefer_huge_pages(gradients[s], N * K * static_cast<int64_t>(sizeof(E)));
  const int threads = useful_threads(N * K * (p.student.count + p.teacher.count), kValuesPerThread, p.threads);
  parallel_for(N, threads, [&](int64_t begin, int64_t end) {
    Backward<T, E> backward(p, sums, gradients);
    for (int64_t i = begin; i < end; i++) backward.row(i, static_cast<const T*>(weights)[i]);
  });
}

// out [K] = log Σ exp(x) over all rows, each column relative to its greatest so far.
template <class T, class E>
void first_columns(const LogitViews& v, T scale, T* out, int threads) {
  parallel_for(v.classes, threads, [&](int64_t begin, int64_t end) {
    T x[kBlock], greatest[kBlock], total[kBlock];
    for (int64_t k = begin; k < end; k += kBlock) {
      const int64_t n = end - k < kBlock ? end - k : kBlock;
      for (int64_t j = 0; j < kBlock; j++) greatest[j] = kLowest<T>, total[j] = 0;
      for (int64_t view = 0; view < v.count; view++) {
        for (int64_t i = 0; i < v.rows; i++) {
          scaled_block<T>(row_of<E>(v, view, i) + k, nullptr, scale, n, x);
          for (int64_t j = 0; j < n; j += kLanes<T>) {
            const Vector<T> value = load(x + j), before = load(greatest + j), sum = load(total + j);
            const Vector<T> step = value - before, e = exp2(step > 0 ? -step : step);
            store(total + j, step > 0 ? sum * e + 1 : sum + e);
            store(greatest + j, max(value, before));
          }
        }
      }
      for (int64_t j = 0; j < n; j++)
        out[k + j] = static_cast<T>(kLn2 * (greatest[j] + ::log2(static_cast<double>(total[j]))));
    }
  });
}

// columns += softmax of x − shift over one row; `e` is room for K values and `greatest` for one of each block.
template <class T, class E>
void add_softmax(const E* row, const T* shift, T scale, int64_t K, T* e, T* greatest, T* columns) {
  Running<T> sum;
  for (int64_t k = 0; k < K; k += kBlock) {
    const int64_t n = K - k < kBlock ? K - k : kBlock;
    sum.raise(fill(e + k, n, [=](auto at) HSV_INLINE_LAMBDA { return at(row + k) * scale - at(shift + k); }));
    sum.total += exponentials(e + k, sum.greatest, n);
    greatest[k / kBlock] = sum.greatest;
  }
  for (int64_t k = 0; k < K; k += kBlock) {
    const double distance = static_cast<double>(greatest[k / kBlock]) - static_cast<double>(sum.greatest);
    const T factor = static_cast<T>(::exp2(distance) / sum.total);
    const int64_t n = K - k < kBlock ? K - k : kBlock;
    for (int64_t j = k; j < k + n; j++) columns[j] += factor * e[j];
  }
}

// out [K] = logsums + log of the column sums of rows that sum to 1.
template <class T, class E>
void next_columns(const LogitViews& v, T scale, const T* logsums, T* out, int threads) {
  const int64_t K = v.classes, rows = v.rows * v.count, padded = (K + kBlock - 1) / kBlock * kBlock;
  T* const shift = static_cast<T*>(malloc(K * sizeof(T)));
  for (int64_t k = 0; k < K; k++) shift[k] = static_cast<T>(logsums[k] * kLog2E);
  sum_columns<T>(
      rows, K, threads,
      [&](T* columns, int64_t begin, int64_t end) {
        T *const e = static_cast<T*>(malloc((padded + padded / kBlock) * sizeof(T))), *const greatest = e + padded;
        for (int64_t i = begin; i < end; i++)
          add_softmax(row_of<E>(v, i / v.rows, i % v.rows), shift, scale, K, e, greatest, columns);
        free(e);
      },
      [=](int64_t k, T total) { out[k] = static_cast<T>(logsums[k] + ::log(static_cast<double>(total))); });
  free(shift);
}

template <class E>
void column_logsums_typed(const LogitViews& v, double scale, const void* logsums, void* out, int threads) {
  using T = Computed<E>;
  threads = useful_threads(v.rows * v.count * v.classes, kValuesPerThread, threads);
  const T scale2 = static_cast<T>(scale * kLog2E);
  if (logsums)
    next_columns<T, E>(v, scale2, static_cast<const T*>(logsums), static_cast<T*>(out), threads);
  else
    first_columns<T, E>(v, scale2, static_cast<T*>(out), threads);
}

void forward(const DistillationProblem& p, void* losses, void* mean, const DistillationSums& sums) {
  with_type(p.student.type, [&](auto e) { forward_typed<decltype(e)>(p, losses, mean, sums); });
}

void backward(const DistillationProblem& p, const void* weights, const DistillationSums& sums, void* const* gradients) {
  with_type(p.student.type, [&](auto e) { backward_typed<decltype(e)>(p, weights, sums, gradients); });
}

void column_logsums(const LogitViews& teacher, double scale, const void* logsums, void* out, int threads) {
  with_type(teacher.type, [&](auto e) { column_logsums_typed<decltype(e)>(teacher, scale, logsums, out, threads); });
}

}  // namespace

DistillationKernels distillation_kernels() {
  return {forward, backward, column_logsums};
}

}  // namespace hsv::HSV_ISA
