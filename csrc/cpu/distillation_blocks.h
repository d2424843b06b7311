// Rows of logits a block of classes at a time, in base 2: scaled, as exponentials, summed along rows and columns.
#pragma once

#include <float.h>
#include <math.h>

#include "cpu/arena.h"
#include "cpu/distillation.h"
#include "cpu/element_vectors.h"
#include "cpu/parallel.h"

namespace hsv::HSV_ISA::distillation {

inline constexpr double kLog2E = 1.4426950408889634;
inline constexpr int64_t kBlock = 512;         // classes at a time, of every view: they stay in the first cache
inline constexpr int64_t kAhead = 2 * kBlock;  // so much earlier are they asked for
inline constexpr int64_t kGroups = 16;  // of rows, each with column sums, so that threads do not decide their order
inline constexpr int kChains = 4;       // sums in flight: one alone waits for each addition to end

template <class T>
inline constexpr int64_t kStep = kChains * kLanes<T>;
template <class T>
inline constexpr T kLowest = -FLT_MAX;
template <>
inline constexpr double kLowest<double> = -DBL_MAX;

// f(k, n) for each block [k, k + n) of [begin, end).
template <class F>
HSV_INLINE void for_blocks(int64_t begin, int64_t end, const F& f) {
  for (int64_t k = begin; k < end; k += kBlock) f(k, end - k < kBlock ? end - k : kBlock);
}

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

template <class E>
const E* row_of(const LogitViews& views, int64_t view, int64_t i) {
  return static_cast<const E*>(views.view[view].data) + i * views.view[view].stride;
}

// Brings what is kAhead classes further on into the second cache level: a block is too short for the hardware to
// foresee the next one of its row.
template <class E>
HSV_INLINE void prefetch(const E* row, int64_t n) {
  const int64_t line = 64 / static_cast<int64_t>(sizeof(E));
  for (int64_t k = 0; k < n; k += line) __builtin_prefetch(row + kAhead + k, 0, 2);
}

// out = (row − centre) · scale over a block, centre null for none; returns the greatest.
template <class T, class E>
T scaled_block(const E* row, const T* centre, T scale, int64_t n, T* out) {
  prefetch(row, n);
  if (centre == nullptr) return fill(out, n, [=](auto at) HSV_INLINE_LAMBDA { return at(row) * scale; });
  return fill(out, n, [=](auto at) HSV_INLINE_LAMBDA { return (at(row) - at(centre)) * scale; });
}

// The logits of a problem, of elements E and computed in T.
template <class T, class E>
struct Logits {
  const DistillationProblem& p;
  const T *const centre, student_scale, teacher_scale;

  explicit Logits(const DistillationProblem& problem)
      : p(problem),
        centre(static_cast<const T*>(p.centre)),
        student_scale(static_cast<T>(p.student_scale * kLog2E)),
        teacher_scale(static_cast<T>(p.teacher_scale * kLog2E)) {}

  // out = x of classes [k, k + n) of row i of student s, or of teacher t; returns the greatest.
  T student(int64_t s, int64_t i, int64_t k, int64_t n, T* out) const {
    return scaled_block<T>(row_of<E>(p.student, s, i) + k, nullptr, student_scale, n, out);
  }
  T teacher(int64_t t, int64_t i, int64_t k, int64_t n, T* out) const {
    return scaled_block(row_of<E>(p.teacher, t, i) + k, centre ? centre + k : nullptr, teacher_scale, n, out);
  }
};

// Runs f(thread, column sums [K], begin, end) for every group of rows, and then finish(k, total) for every column.
template <class T, class F, class G>
void sum_columns(int64_t rows, int64_t K, int threads, const F& f, const G& finish) {
  const int64_t most = threads > kGroups ? threads : kGroups, groups = rows < most ? rows : most;
  const Array<T> sums(groups * K);
  parallel(threads, [&](int thread, int team) {
    own_part(groups, thread, team, [&](int64_t first, int64_t last) {
      for (int64_t g = first; g < last; g++) {
        memset(sums.data + g * K, 0, static_cast<size_t>(K) * sizeof(T));
        f(thread, sums.data + g * K, rows * g / groups, rows * (g + 1) / groups);
      }
    });
    barrier(team);
    own_part(K, thread, team, [&](int64_t begin, int64_t end) {
      for (int64_t k = begin; k < end; k++) {
        T total = 0;
        for (int64_t g = 0; g < groups; g++) total += sums.data[g * K + k];
        finish(k, total);
      }
    });
  });
}

}  // namespace hsv::HSV_ISA::distillation
