// Rows of logits a block of classes at a time, in base 2: read once, as exponentials, summed along rows and columns.
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
inline constexpr int kChains = 2;       // sums in flight: one alone waits for each addition to end
inline constexpr int kRise = 16;        // of a logit above the origin: exponentials and their sums stay far from 2^127

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

// f(chain, k, x) for vectors x of `value` at k, in whole steps that cover [0, n); past n they are −inf.
template <class T, class V, class F>
HSV_INLINE void for_vectors(int64_t n, const V& value, const F& f) {
  int64_t k = 0;
  for (; k + kStep<T> <= n; k += kStep<T>) {
    HSV_UNROLL
    for (int c = 0; c < kChains; c++) f(c, k + c * kLanes<T>, value(VectorAt{k + c * kLanes<T>}));
  }
  if (k == n) return;
  T rest[kStep<T>];
  for (int64_t i = 0; i < kStep<T>; i++) rest[i] = k + i < n ? value(ElementAt{k + i}) : static_cast<T>(-INFINITY);
  HSV_UNROLL
  for (int c = 0; c < kChains; c++) f(c, k + c * kLanes<T>, load(rest + c * kLanes<T>));
}

// The greatest of `value` over [0, n), kLowest at least, which no NaN is.
template <class T, class V>
HSV_INLINE T greatest_of(int64_t n, const V& value) {
  Vector<T> greatest[kChains] = {splat(kLowest<T>), splat(kLowest<T>)};
  for_vectors<T>(n, value, [&](int c, int64_t, Vector<T> x) HSV_INLINE_LAMBDA { greatest[c] = max(x, greatest[c]); });
  return max_lane(max(greatest[0], greatest[1]));
}

// Of a block's exponentials 2^((x − origin) · scale): their sum, how far the greatest logit lies above the origin in
// base 2, and the factor for what was summed before. Beyond kRise the sum is of no use.
//
// The difference is taken before the product: contracted to one multiply-add, the other way round it would not be 0 for
// the origin itself.
template <class T>
struct BlockSums {
  T rise, total;
  double factor = 1;
};

// out = the exponentials, 0 past n.
template <class T, class V>
HSV_INLINE BlockSums<T> exponentials(int64_t n, T scale, T origin, T* out, const V& value) {
  Vector<T> rise[kChains] = {splat(kLowest<T>), splat(kLowest<T>)}, total[kChains] = {};
  for_vectors<T>(n, value, [&](int c, int64_t k, Vector<T> x) HSV_INLINE_LAMBDA {
    const Vector<T> distance = (x - origin) * scale, e = exp2(distance);
    rise[c] = max(distance, rise[c]);
    total[c] += e;
    store(out + k, e);
  });
  return {max_lane(max(rise[0], rise[1])), sum(total[0] + total[1])};
}

// A sum of exponentials over blocks. The origin is the greatest logit of one of them, at most kRise below that of all.
template <class T>
struct Running {
  T origin = kLowest<T>;
  double total = 0;

  // Takes in a block of `value`: sums(origin) are its BlockSums, taken again after the origin rose.
  template <class V, class F>
  HSV_INLINE auto take(bool first, int64_t n, T scale, const V& value, const F& sums) {
    double factor = first ? raise(greatest_of<T>(n, value), scale) : 1;
    auto found = sums(origin);
    if (found.rise > kRise) {
      factor *= raise(greatest_of<T>(n, value), scale);
      found = sums(origin);
    }
    total += found.total;
    found.factor = factor;
    return found;
  }

 private:
  double raise(T greatest, T scale) {
    if (!(greatest > origin)) return 1;
    const double factor = ::exp2((static_cast<double>(origin) - static_cast<double>(greatest)) * scale);
    origin = greatest;
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

// f(value) with what reads row − centre, centre null for none.
template <class T, class E, class F>
HSV_INLINE auto centred(const E* row, const T* centre, const F& f) {
  if (centre == nullptr) return f([=](auto at) HSV_INLINE_LAMBDA { return at(row); });
  return f([=](auto at) HSV_INLINE_LAMBDA { return at(row) - at(centre); });
}

// The teachers of each student: those of s are teacher[begin[s]] to teacher[begin[s + 1]], in the order of the pairs.
struct Pairing {
  const Array<int64_t> begin, teacher;

  explicit Pairing(const DistillationProblem& p) : begin(p.student.count + 1), teacher(p.pairs) {
    int64_t n = 0;
    for (int64_t s = 0; s < p.student.count; s++) {
      begin.data[s] = n;
      for (int64_t j = 0; j < p.pairs; j++)
        if (p.pair[j].student == s) teacher.data[n++] = p.pair[j].teacher;
    }
    begin.data[p.student.count] = n;
  }

  int64_t count(int64_t s) const { return begin.data[s + 1] - begin.data[s]; }
  const int64_t* of(int64_t s) const { return teacher.data + begin.data[s]; }

  bool alike(int64_t a, int64_t b) const {
    return count(a) == count(b) && memcmp(of(a), of(b), static_cast<size_t>(count(a)) * sizeof(int64_t)) == 0;
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
      for_blocks(begin, end, [&](int64_t k, int64_t n) {
        T total[kBlock] = {};
        for (int64_t g = 0; g < groups; g++)
          for (int64_t j = 0; j < n; j++) total[j] += sums.data[g * K + k + j];
        for (int64_t j = 0; j < n; j++) finish(k + j, total[j]);
      });
    });
  });
}

}  // namespace hsv::HSV_ISA::distillation
