// SPDX-License-Identifier: Apache-2.0
// Work on elements shared out over XLA's own threads. OpenMP would start a team for each of those
// that ever makes a call, beside the work that XLA has there.
#pragma once

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>

#include "call.h"

namespace revk_jax {

// Elements of a slice: enough that handing it over does not count.
constexpr int64_t kSlice = 64 * 1024;

using Slice = std::function<void(int64_t begin, int64_t end)>;

// run(begin, end) for the slices of [0, count). The calling thread takes part, and waits for none
// but slices that another has begun: in a busy pool it does them all.
inline void share_out(int64_t count, ffi::ThreadPool& pool, const Slice& run) {
  struct Shared {
    std::atomic<int64_t> next{0};
    int64_t done = 0;
    std::unique_ptr<Failure> failure;
    std::mutex mutex;
    std::condition_variable changed;
  };
  const int64_t slices = (count + kSlice - 1) / kSlice;
  const auto shared = std::make_shared<Shared>();  // a helper may come when all is over
  const auto work = [shared, slices, count, task = &run] {
    for (int64_t slice; (slice = shared->next.fetch_add(1)) < slices;) {
      std::unique_ptr<Failure> failure;
      try {
        (*task)(slice* kSlice, std::min(count, (slice + 1) * kSlice));
      } catch (const Failure& caught) {
        failure = std::make_unique<Failure>(caught);
      } catch (const std::exception& error) {
        failure = std::make_unique<Failure>(Failure{ffi::ErrorCode::kInternal, error.what()});
      }
      const std::lock_guard<std::mutex> lock(shared->mutex);
      if (failure) shared->failure = std::move(failure);
      if (++shared->done == slices) shared->changed.notify_one();
    }
  };
  const int64_t helpers = std::min(slices, pool.num_threads()) - 1;
  for (int64_t helper = 0; helper < helpers; ++helper) pool.Schedule(std::function<void()>(work));
  work();
  std::unique_lock<std::mutex> lock(shared->mutex);
  shared->changed.wait(lock, [&] { return shared->done == slices; });
  if (shared->failure) throw *shared->failure;
}

// A device takes everything at once, and so does a thread that has little to do.
inline void for_slices(const Place& place, int64_t count, const Slice& run) {
  if (place.pool == nullptr || count <= kSlice)
    run(0, count);
  else
    share_out(count, *place.pool, run);
}

}  // namespace revk_jax
