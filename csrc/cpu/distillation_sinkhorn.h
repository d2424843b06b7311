// Log-sums of columns, of which Sinkhorn–Knopp is made.
#pragma once

#include "cpu/distillation_blocks.h"

namespace hsv::HSV_ISA::distillation {

// out [K] = log Σ exp(x) over all rows, each column relative to its greatest so far.
template <class T, class E>
void first_columns(const LogitViews& v, T scale, T* out, int threads) {
  parallel_for(v.classes, threads, [&](int64_t begin, int64_t end) {
    T greatest[kBlock], total[kBlock];
    for_blocks(begin, end, [&](int64_t k, int64_t n) {
      for (int64_t j = 0; j < kBlock; j++) greatest[j] = kLowest<T>, total[j] = 0;
      for (int64_t view = 0; view < v.count; view++) {
        for (int64_t i = 0; i < v.rows; i++) {
          const E* const row = row_of<E>(v, view, i) + k;
          prefetch(row, n);
          const auto logits = [=](auto at) HSV_INLINE_LAMBDA { return at(row); };
          for_vectors<T>(n, logits, [&](int, int64_t j, Vector<T> x) HSV_INLINE_LAMBDA {
            const Vector<T> value = x * scale, before = load(greatest + j), sum = load(total + j);
            const Vector<T> step = value - before, e = exp2(step > 0 ? -step : step);
            store(total + j, step > 0 ? sum * e + 1 : sum + e);
            store(greatest + j, max(value, before));
          });
        }
      }
      for (int64_t j = 0; j < n; j++)
        out[k + j] = static_cast<T>(kLn2 * (greatest[j] + ::log2(static_cast<double>(total[j]))));
    });
  });
}

// columns += softmax of x − shift over one row; `e` is room for K values and `origins` for one of each block.
template <class T, class E>
void add_softmax(const E* row, const T* shift, T scale, int64_t K, T* e, T* origins, T* columns) {
  Running<T> sum;
  for_blocks(0, K, [&](int64_t k, int64_t n) {
    const auto value = [=](auto at) HSV_INLINE_LAMBDA { return at(row + k) * scale - at(shift + k); };
    sum.take(k == 0, n, static_cast<T>(1), value,
             [=](T origin) HSV_INLINE_LAMBDA { return exponentials(n, static_cast<T>(1), origin, e + k, value); });
    origins[k / kBlock] = sum.origin;
  });
  for_blocks(0, K, [&](int64_t k, int64_t n) {
    const double distance = static_cast<double>(origins[k / kBlock]) - static_cast<double>(sum.origin);
    const T factor = static_cast<T>(::exp2(distance) / sum.total);
    for (int64_t j = k; j < k + n; j++) columns[j] += factor * e[j];
  });
}

// out [K] = logsums + log of the column sums of rows that sum to 1.
template <class T, class E>
void next_columns(const LogitViews& v, T scale, const T* logsums, T* out, int threads) {
  const int64_t K = v.classes, blocks = (K + kBlock - 1) / kBlock, padded = whole_lines<T>(blocks * (kBlock + 1));
  const Array<T> shift(K), room(threads * padded);
  for (int64_t k = 0; k < K; k++) shift.data[k] = static_cast<T>(logsums[k] * kLog2E);
  sum_columns<T>(
      v.rows * v.count, K, threads,
      [&](int thread, T* columns, int64_t begin, int64_t end) {
        T *const e = room.data + thread * padded, *const origins = e + blocks * kBlock;
        for (int64_t i = begin; i < end; i++)
          add_softmax(row_of<E>(v, i / v.rows, i % v.rows), shift.data, scale, K, e, origins, columns);
      },
      [=](int64_t k, T total) { out[k] = static_cast<T>(logsums[k] + ::log(static_cast<double>(total))); });
}

template <class E>
void column_logsums(const LogitViews& v, double scale, const void* logsums, void* out, int threads) {
  using T = Computed<E>;
  threads = useful_threads(v.rows * v.count * v.classes, kValuesPerThread, threads);
  const T scale2 = static_cast<T>(scale * kLog2E);
  if (logsums)
    next_columns<T, E>(v, scale2, static_cast<const T*>(logsums), static_cast<T*>(out), threads);
  else
    first_columns<T, E>(v, scale2, static_cast<T*>(out), threads);
}

}  // namespace hsv::HSV_ISA::distillation
