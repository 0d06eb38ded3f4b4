// SPDX-License-Identifier: Apache-2.0
// What the library uses of libgomp, on threads that ThreadSanitizer sees. GCC's own runtime is not
// instrumented: its barriers and joins are invisible, and correct programs look racy, while to
// suppress all that happens under it would hide the races too. Here a team is created with every
// parallel region and joined at its end. The entry points are those that GCC's code calls.
#include <omp.h>
#include <pthread.h>

#include <mutex>
#include <thread>
#include <vector>

namespace {

struct Team {
  explicit Team(unsigned size) : size(size) { pthread_barrier_init(&barrier, nullptr, size); }
  ~Team() { pthread_barrier_destroy(&barrier); }
  const unsigned size;
  pthread_barrier_t barrier;
};

thread_local Team* team = nullptr;
thread_local int self = 0;
std::mutex atomic;

}  // namespace

extern "C" {

void GOMP_parallel(void (*body)(void*), void* data, unsigned threads, unsigned) {
  Team own(threads > 0 ? threads : unsigned(omp_get_max_threads()));
  const auto run = [&own, body, data](int number) {
    team = &own;
    self = number;
    body(data);
    team = nullptr;
    self = 0;
  };
  std::vector<std::thread> others;
  for (unsigned i = 1; i < own.size; ++i) others.emplace_back(run, int(i));
  run(0);
  for (std::thread& other : others) other.join();
}
void GOMP_barrier() {
  if (team != nullptr) pthread_barrier_wait(&team->barrier);
}
void GOMP_atomic_start() { atomic.lock(); }
void GOMP_atomic_end() { atomic.unlock(); }
int omp_get_thread_num() { return self; }
int omp_get_num_threads() { return team != nullptr ? int(team->size) : 1; }
int omp_get_max_threads() { return 2; }
int omp_get_num_procs() { return 2; }

}  // extern "C"
