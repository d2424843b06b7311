// The four OpenMP functions that csrc/cpu/parallel.h calls, over pthreads: ThreadSanitizer knows the order that these
// give, and not that of libgomp, whose own code is not instrumented. Linked in place of libgomp in its builds.
#include <pthread.h>

#include <vector>

#include "cpu/parallel.h"

namespace {

struct Team {
  void (*function)(void*);
  void* data;
  int size;
  pthread_barrier_t barrier;
};

struct Member {
  Team* team;
  int number;
};

thread_local Member self = {nullptr, 0};

void* work(void* member) {
  const Member before = self;
  self = *static_cast<Member*>(member);
  self.team->function(self.team->data);
  self = before;
  return nullptr;
}

}  // namespace

extern "C" {

void GOMP_parallel(void (*function)(void*), void* data, unsigned num_threads, unsigned) {
  Team team = {function, data, static_cast<int>(num_threads), {}};
  pthread_barrier_init(&team.barrier, nullptr, num_threads);
  std::vector<Member> members(num_threads);
  std::vector<pthread_t> threads(num_threads);
  for (unsigned i = 0; i < num_threads; i++) members[i] = {&team, static_cast<int>(i)};
  for (unsigned i = 1; i < num_threads; i++) pthread_create(&threads[i], nullptr, work, &members[i]);
  work(&members[0]);
  for (unsigned i = 1; i < num_threads; i++) pthread_join(threads[i], nullptr);
  pthread_barrier_destroy(&team.barrier);
}

void GOMP_barrier(void) {
  pthread_barrier_wait(&self.team->barrier);
}
int omp_get_thread_num(void) {
  return self.number;
}
int omp_get_num_threads(void) {
  return self.team ? self.team->size : 1;
}

}  // extern "C"
