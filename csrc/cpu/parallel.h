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

// Splits [0, n) into contiguous parts, one per thread, and runs f(begin, end) for each.
template <class F>
void parallel_for(int64_t n, int threads, const F& f) {
  const int64_t most = n < threads ? n : threads;
  parallel(static_cast<int>(most), [&](int thread, int team) { f(n * thread / team, n * (thread + 1) / team); });
}

}  // namespace hsv::HSV_ISA
