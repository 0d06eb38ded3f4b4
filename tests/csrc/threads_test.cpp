// SPDX-License-Identifier: Apache-2.0
// Calls from several threads at once, each on its own memory: every one gets the results that it
// would get alone, and its own last error. `threads_test race` lets them share memory, which is the
// caller's mistake, and what ThreadSanitizer must see if it sees anything.
#include <atomic>
#include <cstdio>
#include <cstring>
#include <string>
#include <thread>
#include <vector>

#include "revkernels/revkernels.h"

namespace {

constexpr int kThreads = 4, kRounds = 2;
constexpr int64_t kRows = 130, kChannels = 260;  // enough for a team of threads within a call

struct Arrays {
  std::vector<float> y, f, dy, df, h, mean, rstd, sums;
  uint64_t checksum = 0;
  float amax = 0.0f;

  explicit Arrays(int seed)
      : y(kRows * kChannels), f(y.size()), dy(y.size()), df(y.size()), h(y.size()) {
    mean.resize(kRows), rstd.resize(kRows), sums.resize(2 * kChannels);
    for (size_t i = 0; i < y.size(); ++i) {
      y[i] = float((i * 37 + size_t(seed)) % 101) * 0.125f;
      f[i] = float(i * 11 % 23) * 0.25f;
      dy[i] = df[i] = float(i % 7);
    }
  }
  bool operator==(const Arrays& other) const {
    return y == other.y && dy == other.dy && h == other.h && mean == other.mean &&
           rstd == other.rstd && sums == other.sums && checksum == other.checksum &&
           amax == other.amax;
  }
};

revk_view view(std::vector<float>& of) {
  return {
      int32_t(sizeof(revk_view)), REVK_FLOAT32, of.data(), kRows, kChannels, 1, kChannels, 1, 1};
}

// A step of each kind; the number of failures.
int use_everything(Arrays& a, int32_t threads) {
  const revk_where where{int32_t(sizeof(revk_where)), -1, nullptr, threads};
  const revk_view y = view(a.y), f = view(a.f), dy = view(a.dy), df = view(a.df), h = view(a.h);
  revk_coupling coupling{};
  coupling.struct_size = int32_t(sizeof coupling);
  coupling.grid_exponent = 10;
  coupling.checksum = &a.checksum;
  coupling.amax = &a.amax;
  revk_norm norm{};
  norm.struct_size = int32_t(sizeof norm);
  norm.kind = REVK_LAYER_NORM;
  norm.activation = REVK_GELU;
  norm.eps = 1e-5;
  norm.parameter_dtype = norm.running_dtype = REVK_FLOAT32;
  norm.mean = a.mean.data(), norm.rstd = a.rstd.data(), norm.statistics_outer_stride = 1;
  revk_norm_gradient gradient{};
  gradient.struct_size = int32_t(sizeof gradient);
  gradient.dweight = a.sums.data(), gradient.dbias = a.sums.data() + kChannels;

  int failed = 0;
  failed += revk_couple(&y, &y, &f, &coupling, &where) != REVK_OK;
  failed += revk_reverse_step(&y, &f, &dy, &df, &coupling, &where) != REVK_OK;
  failed += revk_accumulate(&dy, &df, 1, &where) != REVK_OK;
  failed += revk_couple_norm_act(&h, &y, &y, &f, &norm, &where) != REVK_OK;
  norm.statistics_given = 1;
  failed += revk_norm_act_backward(&dy, &dy, &df, &y, &norm, &gradient, &where) != REVK_OK;
  norm.kind = REVK_BATCH_NORM, norm.statistics_given = 0;
  std::vector<float> mean(kChannels), rstd(kChannels);
  norm.mean = mean.data(), norm.rstd = rstd.data();
  failed += revk_norm_act(&h, &y, &norm, &where) != REVK_OK;
  failed += revk_abi_version() != REVK_ABI_VERSION || revk_version()[0] == '\0' ||
            revk_cpu_isa()[0] == '\0' || revk_cuda_archs() == nullptr;
  return failed;
}

// A mistake whose text is this thread's alone: is it still there after the others made theirs?
int make_a_mistake(int number) {
  revk_where where{int32_t(sizeof(revk_where)), -1, nullptr, -1 - number};
  const revk_view none{};
  const std::string expected = "where: threads is " + std::to_string(-1 - number) + ",";
  int failed = revk_norm_workspace(&none, nullptr, &where) != -1;
  std::this_thread::yield();
  failed += std::strncmp(revk_last_error(), expected.c_str(), expected.size()) != 0;
  where.threads = 1;  // a success leaves the text
  failed += revk_accumulate(nullptr, nullptr, 0, &where) != REVK_OK;
  failed += std::strncmp(revk_last_error(), expected.c_str(), expected.size()) != 0;
  return failed;
}

int run_together(bool race) {
  std::vector<Arrays> own, alone;
  for (int i = 0; i < kThreads; ++i) own.emplace_back(i), alone.emplace_back(i);
  int expected = 0;
  for (Arrays& arrays : alone)
    for (int round = 0; round < kRounds; ++round) expected += use_everything(arrays, 1);
  std::atomic<int> failed{expected};
  std::vector<std::thread> threads;
  for (int i = 0; i < kThreads; ++i)
    threads.emplace_back([&, i] {
      if (revk_last_error()[0] != '\0') ++failed;  // a new thread has not failed yet
      for (int round = 0; round < kRounds; ++round) {
        failed += use_everything(own[race ? 0 : size_t(i)], i % 2 == 0 ? 1 : 3);
        failed += make_a_mistake(i);
      }
    });
  for (std::thread& thread : threads) thread.join();
  for (int i = 0; i < kThreads && !race; ++i)
    if (!(own[size_t(i)] == alone[size_t(i)])) {
      std::fprintf(stderr, "thread %d has other results than it had alone\n", i);
      ++failed;
    }
  return failed;
}

}  // namespace

int main(int count, char** words) {
  const int failed = run_together(count > 1 && std::strcmp(words[1], "race") == 0);
  std::printf("%s\n", failed ? "failed" : "all passed");
  return failed ? 1 : 0;
}
