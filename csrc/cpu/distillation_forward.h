// Losses of samples, what backward needs of them, and the mean of the teachers' logits, in one pass.
#pragma once

#include "cpu/distillation_blocks.h"

namespace hsv::HSV_ISA::distillation {

// What a thread keeps of one sample.
template <class T>
struct ForwardMemory {
  T *x, *teacher;                        // a block of a student's logits, and of each teacher's exponentials
  T* block_total;                        // Σ of each teacher's exponentials of the block
  Running<T>*student_sum, *teacher_sum;  // of each view
  double* product;                       // of each pair, Σ_k e_k x_k

  ForwardMemory(const DistillationProblem& p, Arena& arena)
      : x(arena.take<T>(kBlock)),
        teacher(arena.take<T>(p.teacher.count * kBlock)),
        block_total(arena.take<T>(p.teacher.count)),
        student_sum(arena.take<Running<T>>(p.student.count)),
        teacher_sum(arena.take<Running<T>>(p.teacher.count)),
        product(arena.take<double>(p.pairs)) {}
};

template <class T, class E>
struct Forward {
  const DistillationProblem& p;
  const Logits<T, E> logits;
  const ForwardMemory<T> own;

  Forward(const DistillationProblem& p, Arena arena) : p(p), logits(p), own(p, arena) {}

  // Loss of row i; adds the teachers' logits to `columns` [K].
  T row(int64_t i, T* columns) {
    for (int64_t s = 0; s < p.student.count; s++) own.student_sum[s] = {};
    for (int64_t t = 0; t < p.teacher.count; t++) own.teacher_sum[t] = {};
    for (int64_t j = 0; j < p.pairs; j++) own.product[j] = 0;
    for_blocks(0, p.student.classes, [&](int64_t k, int64_t n) {
      for (int64_t t = 0; t < p.teacher.count; t++) teacher_block(t, i, k, n, columns);
      for (int64_t s = 0; s < p.student.count; s++) student_block(s, i, k, n);
    });
    double loss = 0;
    for (int64_t j = 0; j < p.pairs; j++) {
      const Running<T>& student = own.student_sum[p.pair[j].student];
      loss += student.greatest + ::log2(student.total) - own.product[j] / own.teacher_sum[p.pair[j].teacher].total;
    }
    return static_cast<T>(loss * kLn2 / static_cast<double>(p.pairs));
  }

 private:
  void teacher_block(int64_t t, int64_t i, int64_t k, int64_t n, T* columns) {
    T* const e = own.teacher + t * kBlock;
    const double factor = own.teacher_sum[t].raise(logits.teacher(t, i, k, n, e));
    add_block(row_of<E>(p.teacher, t, i) + k, n, columns + k);
    for (int64_t j = 0; j < p.pairs && factor != 1; j++)
      if (p.pair[j].teacher == t) own.product[j] = factor == 0 ? 0 : own.product[j] * factor;
    own.block_total[t] = exponentials(e, own.teacher_sum[t].greatest, n);
    own.teacher_sum[t].total += own.block_total[t];
  }

  void student_block(int64_t s, int64_t i, int64_t k, int64_t n) {
    Running<T>& sum = own.student_sum[s];
    sum.raise(logits.student(s, i, k, n, own.x));
    sum.total += sum_of_exponentials(own.x, sum.greatest, n);
    for (int64_t j = 0; j < p.pairs; j++) {
      if (p.pair[j].student != s) continue;
      const int64_t t = p.pair[j].teacher;
      own.product[j] += product(own.teacher + t * kBlock, own.x, sum.greatest, n) +
                        static_cast<double>(sum.greatest) * own.block_total[t];
    }
  }

  static void add_block(const E* row, int64_t n, T* columns) {
    int64_t k = 0;
    for (; k + kLanes<T> <= n; k += kLanes<T>) store(columns + k, load(columns + k) + load(row + k));
    for (; k < n; k++) columns[k] += widen(row[k]);
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
void forward(const DistillationProblem& p, void* losses, void* mean, const DistillationSums& sums) {
  using T = Computed<E>;
  const int64_t N = p.student.rows, K = p.student.classes, S = p.student.count, teachers = p.teacher.count;
  const int threads = useful_threads(N * K * (S + teachers), kValuesPerThread, p.threads);
  Arena counted(nullptr);
  ForwardMemory<T>(p, counted);
  const Array<char> memory(threads * counted.used());
  sum_columns<T>(
      N, K, threads,
      [&](int thread, T* columns, int64_t begin, int64_t end) {
        Forward<T, E> forward(p, Arena(memory.data + thread * counted.used()));
        for (int64_t i = begin; i < end; i++) {
          static_cast<T*>(losses)[i] = forward.row(i, columns);
          store_sums(forward.own.student_sum, S, N, i, sums.student);
          store_sums(forward.own.teacher_sum, teachers, N, i, sums.teacher);
        }
      },
      [=](int64_t k, T total) { static_cast<T*>(mean)[k] = total / static_cast<T>(N * teachers); });
}

}  // namespace hsv::HSV_ISA::distillation
