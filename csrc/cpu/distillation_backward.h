// Gradients of the students' logits, of probabilities that are made again from the sums that forward kept.
#pragma once

#include "cpu/distillation_blocks.h"
#include "cpu/memory.h"

namespace hsv::HSV_ISA::distillation {

// The teachers of each student.
struct Pairing {
  const Array<int64_t> count;  // how many pairs name the student
  const Array<int64_t> alike;  // the first student that is paired with the same ones

  explicit Pairing(const DistillationProblem& p) : count(p.student.count), alike(p.student.count) {
    for (int64_t s = 0; s < p.student.count; s++) {
      count.data[s] = alike.data[s] = 0;
      for (int64_t j = 0; j < p.pairs; j++) count.data[s] += p.pair[j].student == s;
      while (!same_teachers(p, alike.data[s], s)) alike.data[s]++;
    }
  }

 private:
  // Whether the pairs name the same teachers, in the same order, for students a and b.
  bool same_teachers(const DistillationProblem& p, int64_t a, int64_t b) const {
    if (count.data[a] != count.data[b]) return false;
    int64_t i = 0, j = 0;
    for (int64_t left = count.data[a]; left > 0; left--, i++, j++) {
      while (p.pair[i].student != a) i++;
      while (p.pair[j].student != b) j++;
      if (p.pair[i].teacher != p.pair[j].teacher) return false;
    }
    return true;
  }
};

// What a thread keeps: blocks of a student's logits, of a sum of teachers, and of each teacher's probabilities.
template <class T>
struct BackwardMemory {
  T *x, *target, *teacher;

  BackwardMemory(const DistillationProblem& p, Arena& arena)
      : x(arena.take<T>(kBlock)), target(arena.take<T>(kBlock)), teacher(arena.take<T>(p.teacher.count * kBlock)) {}
};

template <class T, class E>
struct Backward {
  const DistillationProblem& p;
  const DistillationSums& sums;
  void* const* gradients;
  const Pairing& pairing;
  const Logits<T, E> logits;
  const BackwardMemory<T> own;
  int64_t summed = -1;  // the student whose target there is

  Backward(const DistillationProblem& p, const DistillationSums& sums, void* const* gradients, const Pairing& pairing,
           Arena arena)
      : p(p), sums(sums), gradients(gradients), pairing(pairing), logits(p), own(p, arena) {}

  void row(int64_t i, T weight) {
    for_blocks(0, p.student.classes, [&](int64_t k, int64_t n) {
      summed = -1;
      for (int64_t t = 0; t < p.teacher.count; t++) teacher_block(t, i, k, n);
      for (int64_t s = 0; s < p.student.count; s++)
        if (gradients[s]) student_block(s, i, k, n, weight);
    });
  }

 private:
  // own.teacher = q of classes [k, k + n).
  void teacher_block(int64_t t, int64_t i, int64_t k, int64_t n) {
    T* const q = own.teacher + t * kBlock;
    logits.teacher(t, i, k, n, q);
    const T greatest = greatest_of(sums.teacher, t, i), factor = 1 / total_of(sums.teacher, p.teacher.count, t, i);
    for (int64_t j = 0; j < n; j += kLanes<T>) store(q + j, factor * exp2(load(q + j) - greatest));
  }

  void student_block(int64_t s, int64_t i, int64_t k, int64_t n, T weight) {
    E* const out = static_cast<E*>(gradients[s]) + i * p.student.classes + k;
    const int64_t count = pairing.count.data[s];
    if (count == 0) {
      memset(static_cast<void*>(out), 0, n * sizeof(E));
      return;
    }
    sum_teachers(s, n);
    // scaled as in the forward: a product within a multiply-add would not be the one that `greatest` is taken of
    logits.student(s, i, k, n, own.x);
    const T greatest = greatest_of(sums.student, s, i);
    const T factor = static_cast<T>(count) / total_of(sums.student, p.student.count, s, i);
    const auto gradient = [=, x = own.x, target = own.target](int64_t j) HSV_INLINE_LAMBDA {
      return weight * (factor * exp2(load(x + j) - greatest) - load(target + j));
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
    if (summed >= 0 && pairing.alike.data[s] == pairing.alike.data[summed]) return;
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
void backward(const DistillationProblem& p, const void* weights, const DistillationSums& sums, void* const* gradients) {
  using T = Computed<E>;
  const int64_t N = p.student.rows, K = p.student.classes;
  for (int64_t s = 0; s < p.student.count; s++)
    if (gradients[s]) prefer_huge_pages(gradients[s], N * K * static_cast<int64_t>(sizeof(E)));
  const Pairing pairing(p);
  const int useful = useful_threads(N * K * (p.student.count + p.teacher.count), kValuesPerThread, p.threads);
  const int most = static_cast<int>(N < useful ? N : useful);
  Arena counted(nullptr);
  BackwardMemory<T>(p, counted);
  const Array<char> memory(most * counted.used());
  parallel(most, [&](int thread, int team) {
    Backward<T, E> backward(p, sums, gradients, pairing, Arena(memory.data + thread * counted.used()));
    own_part(N, thread, team, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++) backward.row(i, static_cast<const T*>(weights)[i]);
    });
  });
}

}  // namespace hsv::HSV_ISA::distillation
