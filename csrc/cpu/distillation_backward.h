// Gradients of the students' logits, of probabilities that are made again from the sums that forward kept.
#pragma once

#include "cpu/distillation_blocks.h"
#include "cpu/memory.h"

namespace hsv::HSV_ISA::distillation {

// Gradients of so many bytes do not stay in the caches until they are read: a processor's last one is about as large.
inline constexpr int64_t kStreamed = 32 << 20;

// What a thread keeps: a block of each teacher's weighted probabilities, and of a sum of them.
template <class T>
struct BackwardMemory {
  T *teacher, *sum;

  BackwardMemory(const DistillationProblem& p, Arena& arena)
      : teacher(arena.take<T>(p.teacher.count * kBlock)), sum(arena.take<T>(kBlock)) {}
};

template <class T, class E>
struct Backward {
  const DistillationProblem& p;
  const DistillationSums& sums;
  void* const* gradients;
  const Pairing& pairing;
  const bool large;  // the gradients together: streamed where they can be
  const T *const centre, student_scale, teacher_scale;
  const BackwardMemory<T> own;

  Backward(const DistillationProblem& p, const DistillationSums& sums, void* const* gradients, const Pairing& pairing,
           bool large, Arena arena)
      : p(p),
        sums(sums),
        gradients(gradients),
        pairing(pairing),
        large(large),
        centre(static_cast<const T*>(p.centre)),
        student_scale(static_cast<T>(p.student_scale * kLog2E)),
        teacher_scale(static_cast<T>(p.teacher_scale * kLog2E)),
        own(p, arena) {}

  void row(int64_t i, T weight) {
    for_blocks(0, p.student.classes, [&](int64_t k, int64_t n) {
      for (int64_t t = 0; t < p.teacher.count; t++) teacher_block(t, i, k, n, weight);
      const T* target = nullptr;
      for (int64_t s = 0, summed = -1; s < p.student.count; s++) {
        if (!gradients[s]) continue;
        if (summed < 0 || !pairing.alike(s, summed)) target = sum_of_teachers(s, n);
        summed = s;
        student_block(s, i, k, n, weight, target);
      }
    });
  }

 private:
  // own.teacher = weight · q of classes [k, k + n).
  void teacher_block(int64_t t, int64_t i, int64_t k, int64_t n, T weight) {
    const E* const row = row_of<E>(p.teacher, t, i) + k;
    T* const out = own.teacher + t * kBlock;
    const T scale = teacher_scale, origin = origin_of(sums.teacher, t, i);
    const T factor = weight / total_of(sums.teacher, p.teacher.count, t, i);
    prefetch(row, n);
    centred(row, centre ? centre + k : nullptr, [=](auto value) HSV_INLINE_LAMBDA {
      for_vectors<T>(n, value, [=](int, int64_t j, Vector<T> x) HSV_INLINE_LAMBDA {
        store(out + j, factor * exp2((x - origin) * scale));
      });
    });
  }

  // Σ weight · q over the teachers of student s; null for none.
  const T* sum_of_teachers(int64_t s, int64_t n) const {
    const int64_t* const teacher = pairing.of(s);
    if (pairing.count(s) == 0) return nullptr;
    const T* sum = own.teacher + teacher[0] * kBlock;
    for (int64_t j = 1; j < pairing.count(s); j++) {
      const T* const q = own.teacher + teacher[j] * kBlock;
      for (int64_t k = 0; k < n; k += kLanes<T>) store(own.sum + k, load(sum + k) + load(q + k));
      sum = own.sum;
    }
    return sum;
  }

  void student_block(int64_t s, int64_t i, int64_t k, int64_t n, T weight, const T* target) {
    E* const out = static_cast<E*>(gradients[s]) + i * p.student.classes + k;
    if (target == nullptr) {
      memset(static_cast<void*>(out), 0, n * sizeof(E));
      return;
    }
    const E* const row = row_of<E>(p.student, s, i) + k;
    const T scale = student_scale, origin = origin_of(sums.student, s, i);
    const T factor = weight * static_cast<T>(pairing.count(s)) / total_of(sums.student, p.student.count, s, i);
    const auto gradient = [=](int64_t j, Vector<T> x)
                              HSV_INLINE_LAMBDA { return factor * exp2((x - origin) * scale) - load(target + j); };
    prefetch(row, n);
    int64_t j = 0;
    if constexpr (sizeof(E) == sizeof(T)) {
      if (large && reinterpret_cast<uintptr_t>(out) % kVectorBytes == 0)
        for (; j + kLanes<T> <= n; j += kLanes<T>) stream(out + j, gradient(j, load(row + j)));
    }
    for (; j + kLanes<T> <= n; j += kLanes<T>) store(out + j, gradient(j, load(row + j)));
    if (j == n) return;
    T rest[kLanes<T>];
    for (int64_t l = 0; l < kLanes<T>; l++) rest[l] = j + l < n ? widen(row[j + l]) : static_cast<T>(-INFINITY);
    store(rest, gradient(j, load(rest)));
    for (int64_t l = j; l < n; l++) narrow(rest[l - j], out + l);
  }

  T origin_of(const void* of_views, int64_t v, int64_t i) const {
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
  const int64_t bytes_of_view = N * K * static_cast<int64_t>(sizeof(E));
  int64_t bytes = 0;
  for (int64_t s = 0; s < p.student.count; s++) {
    if (!gradients[s]) continue;
    prefer_huge_pages(gradients[s], bytes_of_view);
    bytes += bytes_of_view;
  }
  const Pairing pairing(p);
  const int useful = useful_threads(N * K * (p.student.count + p.teacher.count), kValuesPerThread, p.threads);
  const int most = static_cast<int>(N < useful ? N : useful);
  Arena counted(nullptr);
  BackwardMemory<T>(p, counted);
  const Array<char> memory(most * counted.used());
  parallel(most, [&](int thread, int team) {
    Backward<T, E> backward(p, sums, gradients, pairing, bytes >= kStreamed,
                            Arena(memory.data + thread * counted.used()));
    own_part(N, thread, team, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++) backward.row(i, static_cast<const T*>(weights)[i]);
    });
    fence_streams();
  });
}

}  // namespace hsv::HSV_ISA::distillation
