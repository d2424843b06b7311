// Threads of the OpenMP runtime that is already in the process (libgomp, which torch brings).
//
// The runtime is called by its functions and not by pragmas, so that every compiler, clang included, binds to the same
// one: torch.set_num_threads and the thread pool stay shared.
#pragma once

#include <stdint.h>

extern "C" {
void GOMP_parallel(void (*fn)(void*), void* data, unsigned num_threads, unsigned flags);
void GOMP_barrier(void);
int omp_get_thread_num(void);
int omp_get_num_threads(void);
}

namespace hsv {

// True in a child of fork(), where the parent's thread pool does not exist and starting a team would hang.
bool in_forked_child();

}  // namespace hsv

namespace hsv::HSV_ISA {

// Runs f(thread, team) in a team of at most `threads`; the team may be smaller, so split the work by `team`.
template <class F>
void parallel(int threads, const F& f) {
  if (threads <= 1 || in_forked_child()) {
    f(0, 1);
    return;
  }
  auto body = [](void* data) { (*static_cast<const F*>(data))(omp_get_thread_num(), omp_get_num_threads()); };
  GOMP_parallel(body, const_cast<F*>(&f), static_cast<unsigned>(threads), 0);
}

// Values of an operation of a few steps on each: a thread for less costs more to wake than it saves.
inline constexpr int64_t kValuesPerThread = 1 << 15;

// How many of `threads` the work can keep busy, where each should have `per_thread` of it.
inline int useful_threads(int64_t work, int64_t per_thread, int threads) {
  const int64_t most = 1 + work / per_thread;
  return most < threads ? static_cast<int>(most) : threads;
}

// Waits for the whole team.
inline void barrier(int team) {
  if (team > 1) GOMP_barrier();
}

// f(begin, end) with this thread's contiguous part of [0, n).
template <class F>
void own_part(int64_t n, int thread, int team, const F& f) {
  f(n * thread / team, n * (thread + 1) / team);
}

// Splits [0, n) into contiguous parts, one per thread, and runs f(begin, end) for each.
template <class F>
void parallel_for(int64_t n, int threads, const F& f) {
  const int64_t most = n < threads ? n : threads;
  parallel(static_cast<int>(most), [&](int thread, int team) { own_part(n, thread, team, f); });
}

// Visits every unordered pair of 2·team parts, each with itself included, as f(a, b, parts) with a ≤ b; every thread of
// the team calls it.
//
// A round-robin tournament with a barrier between rounds: no two threads hold the same part at once, so f may write to
// both parts without atomics, and the order in which a part is written depends on the size of the team alone.
template <class F>
void tournament(int thread, int team, const F& f) {
  const int parts = 2 * team, others = parts - 1;
  for (int part = thread; part < parts; part += team) f(part, part, parts);
  for (int round = 0; round < others; round++) {
    barrier(team);
    const int a = thread ? (round + thread) % others : others;
    const int b = thread ? (round - thread + others) % others : round;
    f(a < b ? a : b, a < b ? b : a, parts);
  }
}

}  // namespace hsv::HSV_ISA
