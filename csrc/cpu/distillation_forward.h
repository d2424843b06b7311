// Losses of samples, what backward needs of them, and the mean of the teachers' logits, in one pass.
#pragma once

#include "cpu/distillation_blocks.h"

namespace hsv::HSV_ISA::distillation {

inline constexpr int64_t kTeachers = 2;  // whose exponentials a student's logits meet as they are read

// Of a block of a student, with d = (x − origin) · scale: Σ 2^d, and for each of `Teachers` Σ e · d.
template <class T>
struct StudentSums : BlockSums<T> {
  T product[kTeachers];
};

// Guarded: 0 · −inf is 0.
template <int Teachers, bool Guarded, class T, class E>
StudentSums<T> sums_of(const E* row, int64_t n, T scale, T origin, const T* const* teacher) {
  Vector<T> rise[kChains] = {splat(kLowest<T>), splat(kLowest<T>)}, total[kChains] = {};
  Vector<T> product[kTeachers][kChains] = {};
  const auto value = [=](auto at) HSV_INLINE_LAMBDA { return at(row); };
  for_vectors<T>(n, value, [&](int c, int64_t k, Vector<T> x) HSV_INLINE_LAMBDA {
    const Vector<T> distance = (x - origin) * scale;
    rise[c] = max(distance, rise[c]);
    total[c] += exp2(distance);
    HSV_UNROLL
    for (int t = 0; t < Teachers; t++) {
      const Vector<T> e = load(teacher[t] + k);
      product[t][c] += Guarded ? (e != 0 ? e * distance : Vector<T>{}) : e * distance;
    }
  });
  return {{max_lane(max(rise[0], rise[1])), sum(total[0] + total[1])},
          {sum(product[0][0] + product[0][1]), sum(product[1][0] + product[1][1])}};
}

// The guard is for the rare block that needs it: NaN tells.
template <int Teachers, class T, class E>
StudentSums<T> guarded_sums(const E* row, int64_t n, T scale, T origin, const T* const* teacher) {
  const StudentSums<T> sums = sums_of<Teachers, false>(row, n, scale, origin, teacher);
  const T products = sums.product[0] + sums.product[1];
  return products == products ? sums : sums_of<Teachers, true>(row, n, scale, origin, teacher);
}

template <class T, class E>
StudentSums<T> student_sums(const E* row, int64_t n, T scale, T origin, const T* const* teacher, int64_t teachers) {
  if (teachers == 0) return guarded_sums<0>(row, n, scale, origin, teacher);
  if (teachers == 1) return guarded_sums<1>(row, n, scale, origin, teacher);
  return guarded_sums<2>(row, n, scale, origin, teacher);
}

// What a thread keeps of one sample.
template <class T>
struct ForwardMemory {
  T* teacher;                            // a block of each teacher's exponentials
  T* block_total;                        // their sums
  Running<T>*student_sum, *teacher_sum;  // of each view
  double* product;                       // of each pair in the order of `pairing`, Σ_k e_k x_k

  ForwardMemory(const DistillationProblem& p, Arena& arena)
      : teacher(arena.take<T>(p.teacher.count * kBlock)),
        block_total(arena.take<T>(p.teacher.count)),
        student_sum(arena.take<Running<T>>(p.student.count)),
        teacher_sum(arena.take<Running<T>>(p.teacher.count)),
        product(arena.take<double>(p.pairs)) {}
};

template <class T, class E>
struct Forward {
  const DistillationProblem& p;
  const Pairing& pairing;
  const T *const centre, student_scale, teacher_scale;
  const ForwardMemory<T> own;

  Forward(const DistillationProblem& p, const Pairing& pairing, Arena arena)
      : p(p),
        pairing(pairing),
        centre(static_cast<const T*>(p.centre)),
        student_scale(static_cast<T>(p.student_scale * kLog2E)),
        teacher_scale(static_cast<T>(p.teacher_scale * kLog2E)),
        own(p, arena) {}

  // Loss of row i; adds the teachers' logits to `columns` [K].
  T row(int64_t i, T* columns) {
    for (int64_t s = 0; s < p.student.count; s++) own.student_sum[s] = {};
    for (int64_t t = 0; t < p.teacher.count; t++) own.teacher_sum[t] = {};
    for (int64_t j = 0; j < p.pairs; j++) own.product[j] = 0;
    for_blocks(0, p.student.classes, [&](int64_t k, int64_t n) {
      for (int64_t t = 0; t < p.teacher.count; t++) teacher_block(t, i, k, n, columns + k);
      for (int64_t s = 0; s < p.student.count; s++) student_block(s, i, k, n);
    });
    double loss = 0;
    for (int64_t s = 0; s < p.student.count; s++) {
      const Running<T>& running = own.student_sum[s];
      const double logsum = running.origin * static_cast<double>(student_scale) + ::log2(running.total);
      for (int64_t j = pairing.begin.data[s]; j < pairing.begin.data[s + 1]; j++)
        loss += logsum - own.product[j] / own.teacher_sum[pairing.teacher.data[j]].total;
    }
    return static_cast<T>(loss * kLn2 / static_cast<double>(p.pairs));
  }

 private:
  void teacher_block(int64_t t, int64_t i, int64_t k, int64_t n, T* columns) {
    const E* const row = row_of<E>(p.teacher, t, i) + k;
    T* const e = own.teacher + t * kBlock;
    Running<T>& running = own.teacher_sum[t];
    prefetch(row, n);
    add_block(row, n, columns);
    const BlockSums<T> sums = centred(row, centre ? centre + k : nullptr, [=, &running](auto value) HSV_INLINE_LAMBDA {
      return running.take(k == 0, n, teacher_scale, value,
                          [=](T origin) HSV_INLINE_LAMBDA { return exponentials(n, teacher_scale, origin, e, value); });
    });
    own.block_total[t] = sums.total;
    for (int64_t j = 0; j < p.pairs && sums.factor != 1; j++)
      if (pairing.teacher.data[j] == t) own.product[j] = sums.factor == 0 ? 0 : own.product[j] * sums.factor;
  }

  void student_block(int64_t s, int64_t i, int64_t k, int64_t n) {
    const E* const row = row_of<E>(p.student, s, i) + k;
    const auto value = [=](auto at) HSV_INLINE_LAMBDA { return at(row); };
    prefetch(row, n);
    add_products(s, 0, own.student_sum[s].take(k == 0, n, student_scale, value, [=](T origin) {
      return with_teachers(s, row, n, origin, 0);
    }));
    for (int64_t j = kTeachers; j < pairing.count(s); j += kTeachers)
      add_products(s, j, with_teachers(s, row, n, own.student_sum[s].origin, j));
  }

  // Sums of a block of student s with its teachers from number j on, as many as are taken at a time.
  StudentSums<T> with_teachers(int64_t s, const E* row, int64_t n, T origin, int64_t j) const {
    const T* teacher[kTeachers] = {};
    const int64_t left = pairing.count(s) - j;
    for (int64_t l = 0; l < kTeachers && l < left; l++) teacher[l] = own.teacher + pairing.of(s)[j + l] * kBlock;
    return student_sums(row, n, student_scale, origin, teacher, left);
  }

  void add_products(int64_t s, int64_t j, const StudentSums<T>& sums) {
    const double origin = own.student_sum[s].origin * static_cast<double>(student_scale);
    for (int64_t l = 0; l < kTeachers && j + l < pairing.count(s); l++)
      own.product[pairing.begin.data[s] + j + l] += sums.product[l] + origin * own.block_total[pairing.of(s)[j + l]];
  }

  static void add_block(const E* row, int64_t n, T* columns) {
    int64_t k = 0;
    for (; k + kLanes<T> <= n; k += kLanes<T>) store(columns + k, load(columns + k) + load(row + k));
    for (; k < n; k++) columns[k] += widen(row[k]);
  }
};

template <class T>
void store_sums(const Running<T>* sums, int64_t views, int64_t rows, int64_t i, void* out) {
  T* const origin = static_cast<T*>(out);
  for (int64_t v = 0; v < views; v++) {
    origin[v * rows + i] = sums[v].origin;
    origin[(views + v) * rows + i] = static_cast<T>(sums[v].total);
  }
}

template <class E>
void forward(const DistillationProblem& p, void* losses, void* mean, const DistillationSums& sums) {
  using T = Computed<E>;
  const int64_t N = p.student.rows, K = p.student.classes, S = p.student.count, teachers = p.teacher.count;
  const int threads = useful_threads(N * K * (S + teachers), kValuesPerThread, p.threads);
  const Pairing pairing(p);
  Arena counted(nullptr);
  ForwardMemory<T>(p, counted);
  const Array<char> memory(threads * counted.used());
  sum_columns<T>(
      N, K, threads,
      [&](int thread, T* columns, int64_t begin, int64_t end) {
        Forward<T, E> forward(p, pairing, Arena(memory.data + thread * counted.used()));
        for (int64_t i = begin; i < end; i++) {
          static_cast<T*>(losses)[i] = forward.row(i, columns);
          store_sums(forward.own.student_sum, S, N, i, sums.student);
          store_sums(forward.own.teacher_sum, teachers, N, i, sums.teacher);
        }
      },
      [=](int64_t k, T total) { static_cast<T*>(mean)[k] = total / static_cast<T>(N * teachers); });
}

}  // namespace hsv::HSV_ISA::distillation
